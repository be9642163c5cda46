"""Records that are nearly right, for hypothesis: every value of Kafka that a producer's mistake could make."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

from conftest import NOW, event
from hypothesis import strategies as st

from clickstream.event import FIELDS

# As they stand in the text; some are no JSON.
NUMBERS = (
    *("0", "-0", "-0.0", "0.01", "0.009", "0.005", "1e-400", "5e-324", "1e400", "-1e400", "-7", "7", "2.675", "1.005"),
    *("9999999999.99", "9999999999.994", "9999999999.995", "10000000000", "100000", "100000.01", "1e5", "1E2", "33.10"),
    *("19.990000000000000000001", "1.999e1", "0.1e1", "12345678901234567890123", "NaN", "Infinity", "-Infinity"),
    *("01", "1.", ".5", "+1", "0x10", "1_000", "1e", "--1"),
)
TEXTS = (
    "",
    " ",
    "true",
    "null",
    "7",
    "view",
    "mobile",
    "Mobile",
    "fridge",
    "Home",
    "19.99",
    "NaN",
    "é",
    "😀",
    "\0",
    "a]b",
)
TWISTS = ("{}\n", " {}", "{}\0", "{}x", "{}0", "{}\u0663", "x{}", "\ufeff{}", "{}é", "{}]", "{}/", "/{}")
MEMBERS = (*FIELDS, "coupon", "Price")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "price"]), inner, max_size=2),
    max_leaves=3,
)
MOMENTS = st.builds(
    "{}-{:02d}-{:02d}T{:02d}:{}:{}{}{}".format,
    st.sampled_from(["2025", "2025", "2025", "0000", "0001", "1582", "1969", "2024", "9999", "02025"]),
    st.sampled_from([11, 11, 11, 2, 0, 1, 12, 13]),
    st.sampled_from([29, 29, 29, 22, 0, 1, 28, 30, 31, 32]),
    st.integers(0, 24),
    st.sampled_from(["00", "05", "59", "60"]),
    st.sampled_from(["00", "00", "59", "60"]),
    st.sampled_from(["", ".000", ".1", ".123456", ".1234567", ".", ",5"]),
    st.sampled_from(["Z", "Z", "+00:00", "-00:00", "-05:30", "+18:00", "+18:01", "+05:60", "+0100", "", "z", "[UTC]"]),
)
# To the microsecond.
LIMITS = st.builds(
    lambda limit, by, zone: (NOW + limit + timedelta(microseconds=by)).astimezone(zone).isoformat(),
    st.sampled_from([timedelta(), timedelta(minutes=5), timedelta(days=-7), timedelta(days=1)]),
    st.integers(-1, 1),
    st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-11))]),
)
PIECES = (
    *(b"]", b"[", b",", b"}", b"{", b"x", b" ", b"\t", b"\0", b"\f", b'"', b"\\", b"'", b"//", b"null", b"1"),
    # no UTF-8, a surrogate, too great, cut off; then a byte order mark and a blank that JSON does not know
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98", b"\xef\xbb\xbf", b"\xc2\xa0"),
)
# Kafka's clock and ours: also apart, and a record without a time.
CLOCKS = st.tuples(
    st.sampled_from(
        [NOW] * 4
        + [NOW + timedelta(days=1), NOW - timedelta(days=1), NOW + timedelta(microseconds=1)]
        + [datetime(1970, 1, 1, tzinfo=UTC), datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)]
    ),
    st.sampled_from([NOW] * 3 + [NOW + timedelta(days=14), NOW - timedelta(microseconds=1)]),
)


def _broken(body: bytes) -> st.SearchStrategy[bytes | None]:
    """What is left of a value when it is no longer one object."""
    piece, place = st.sampled_from(PIECES), st.integers(0, len(body))
    return st.one_of(
        st.sampled_from([None, b"", b" \r\n\t", b"\f", b"null", b"[]", b"{}", b'"{}"', b"42"]),
        st.sampled_from([b"[" + body + b"]", body + body, body + b"," + body, body + b"],[" + body]),
        st.just(body.replace(b'"', b"'")),
        st.builds(lambda at, piece: body[:at] + piece + body[at:], place, piece),
        st.builds(lambda piece: body + piece, piece),
        st.builds(lambda piece: piece + body, piece),
        st.builds(lambda at: body[:at], place),
        st.binary(max_size=20),
    )


@st.composite
def payloads(draw: st.DrawFn) -> bytes | None:
    """An event with some fields gone, changed, there twice or of another type; now and then broken as a whole."""
    fields = event(device_type=draw(st.sampled_from(["mobile", "desktop", "tablet"])))
    members = {name: json.dumps(value) for name, value in fields.items()}
    again = []
    for name in draw(st.lists(st.sampled_from(MEMBERS), max_size=3, unique=True)):
        how = draw(st.sampled_from(["gone", "other", "again", "number", "text", "twist", "moment", "page"]))
        if how == "gone":
            members.pop(name, None)
        elif how == "other":
            members[name] = json.dumps(draw(JSON), ensure_ascii=draw(st.booleans()))
        elif how == "again":
            again.append((name, json.dumps(draw(JSON))))
        elif how == "number":
            members[name] = draw(st.sampled_from(NUMBERS))
        elif how == "text":
            members[name] = json.dumps(draw(st.sampled_from(TEXTS)))
        elif how == "twist":
            members[name] = json.dumps(draw(st.sampled_from(TWISTS)).format(fields.get(name, "")))
        elif how == "moment":
            members["timestamp"] = json.dumps(draw(MOMENTS | LIMITS))
        else:
            members |= {"product_id": draw(st.sampled_from(['"7"', "7"])), "page_url": '"/product/7"'}
    order = [*again, *members.items()] if draw(st.booleans()) else [*members.items(), *again]
    body = ("{" + ", ".join(f'"{name}": {text}' for name, text in order) + "}").encode()
    return draw(_broken(body)) if draw(st.integers(0, 3)) == 0 else body
