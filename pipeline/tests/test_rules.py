"""Every rule with records that fail it and near misses that pass; and nothing a byte can do may throw."""

from __future__ import annotations

import hashlib
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import oracle
import pytest
from conftest import NOW, event, without
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from payloads import CLOCKS, payloads
from pyspark.sql import functions as F  # noqa: N812

from clickstream import faults, gold, rules, silver
from clickstream.event import FIELDS
from clickstream.shop import Shop

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from clickstream.settings import Settings


def raw(**changes: Any) -> bytes:
    return json.dumps(event(**changes)).encode()


def text(old: str, new: str) -> bytes:
    """A valid event's JSON with a piece of its text replaced."""
    whole = raw().decode()
    assert old in whole
    return whole.replace(old, new).encode()


PRICE = '"price": 19.99'
DEVICE = '"device_type": "mobile"'

# value -> all codes it must get; in the order of rules.RULES
CASES: dict[str, tuple[bytes | None, list[str]]] = {
    # the whole record
    "valid": (raw(), []),
    "white space around": (b" \n" + raw() + b"\t", []),
    "keys in another order": (json.dumps(dict(reversed(event().items()))).encode(), []),
    "an unknown key is ignored": (raw(coupon="X", nested={"a": [1, {"b": None}]}), []),
    "the last of two equal keys counts": (text("{", '{"price": "no", '), []),
    "a price of another type counts after none": (text(PRICE, PRICE + ', "price": "no"'), []),
    "a price of null after one": (text(PRICE, PRICE + ', "price": null'), ["price_not_number"]),
    "a price of null before one": (text("{", '{"price": null, '), []),
    "two prices of null": (text(PRICE, '"price": null, "price": null'), ["price_missing"]),
    "tombstone": (None, ["tombstone"]),
    "no bytes": (b"", ["empty_value"]),
    "spaces only": (b"   ", ["empty_value"]),
    "white space only": (b" \t\r\n", ["empty_value"]),
    "not JSON": (b"hello", ["not_json_object"]),
    "rubbish after a bracket": (raw() + b"]rubbish", ["not_json_object"]),
    "a bracket after the object": (raw() + b"]", ["not_json_object"]),
    "a bracket and a brace after the object": (raw() + b"]}", ["not_json_object"]),
    "a bracket inside": (raw(coupon="a]b"), []),
    "XML": (b"<event/>", ["not_json_object"]),
    "cut off": (raw()[:-20], ["not_json_object"]),
    "cut inside a character": (raw(user_id="user_0001")[:-40] + "é".encode()[:1], ["not_utf8", "not_json_object"]),
    "broken character inside": (text("mobile", "mob\ufffd").replace(b"\\ufffd", b"\xff"), None),  # type: ignore[dict-item]
    "zero bytes": (b"\x00" * 16, ["not_json_object"]),
    "random bytes": (bytes(range(256)), ["not_utf8", "not_json_object"]),
    "UTF-16": (raw().decode().encode("utf-16"), ["not_utf8", "not_json_object"]),
    "array": (b"[" + raw() + b"]", ["not_json_object"]),
    "number": (b"42", ["not_json_object"]),
    "string": (b'"event"', ["not_json_object"]),
    "null": (b"null", ["not_json_object"]),
    "true": (b"true", ["not_json_object"]),
    "two objects": (raw() + raw(), ["not_json_object"]),
    "two objects with a comma": (raw() + b"," + raw(), None),  # type: ignore[dict-item]
    "rubbish after the object": (raw() + b"x", ["not_json_object"]),
    "single quotes": (raw().replace(b'"', b"'"), ["not_json_object"]),
    "unquoted key": (text('"price"', "price"), ["not_json_object"]),
    "comment": (text(PRICE, PRICE + " /* sale */"), ["not_json_object"]),
    "trailing comma": (text(PRICE, PRICE + ","), ["not_json_object"]),
    "900 KB of text": (b"x" * 900_000, ["not_json_object"]),
    "900 KB event": (raw(user_id="u" * 900_000), ["user_id_format"]),
    "900 KB of an unknown key": (raw(blob="b" * 900_000), []),
    "nested 100,000 deep": (b'{"a":' * 100_000, ["not_json_object"]),
    "brackets 5,000 deep": (b"[" * 5_000 + b"]" * 5_000, ["not_json_object"]),
    # all reasons at once
    "empty object": (b"{}", [f"{f}_missing" for f in FIELDS if f != "price"] + ["price_missing"]),
    "many reasons": (
        raw(event_type="click", device_type="watch", price=-1, user_id="bob"),
        ["user_id_format", "event_type_unknown", "device_unknown", "price_not_positive"],
    ),
    # identifiers
    **{f"{f} missing": (json.dumps(without(event(), f)).encode(), [f"{f}_missing"]) for f in FIELDS},
    **{f"{f} null": (raw(**{f: None}), [f"{f}_missing"]) for f in FIELDS},
    "event_id short": (raw(event_id="evt_1"), ["event_id_format"]),
    "event_id number": (raw(event_id=12345678), ["event_id_format"]),
    "event_id empty": (raw(event_id=""), ["event_id_format"]),
    "event_id with newline": (raw(event_id="evt_00000001\n"), ["event_id_format"]),
    "event_id of 20 digits": (raw(event_id="evt_" + "9" * 20), []),
    "event_id of 21 digits": (raw(event_id="evt_" + "9" * 21), ["event_id_format"]),
    "user_id object": (raw(user_id={"id": 1}), ["user_id_format"]),
    "user_id case": (raw(user_id="User_0001"), ["user_id_format"]),
    "user_id of 9 digits": (raw(user_id="user_123456789"), []),
    "product_id array": (raw(product_id=["prod_0001"]), ["product_id_format", "page_url_mismatch"]),
    "product_id unknown but well formed": (raw(product_id="prod_99999"), []),
    "session_id wrong": (raw(session_id="sess-1"), ["session_id_format"]),
    # vocabularies
    "purchase": (raw(event_type="purchase"), []),
    "add_to_cart": (raw(event_type="add_to_cart"), []),
    "event_type unknown": (raw(event_type="VIEW"), ["event_type_unknown"]),
    "event_type boolean": (raw(event_type=True), ["event_type_unknown"]),
    "category unknown": (raw(product_category="Weapons"), ["category_unknown"]),
    "device unknown": (raw(device_type="fridge"), ["device_unknown"]),
    "page of another product": (raw(page_url="/product/prod_0008"), ["page_url_mismatch"]),
    "page with host": (raw(page_url="https://shop/product/prod_0007"), ["page_url_mismatch"]),
    # price
    "price integer": (raw(price=20), []),
    "price exponent": (text("19.99", "1.999e1"), []),
    "price smallest": (raw(price=0.01), []),
    "price largest": (text("19.99", "9999999999.99"), []),
    "price zero": (raw(price=0), ["price_not_positive"]),
    "price negative": (raw(price=-19.99), ["price_not_positive"]),
    "price three decimals": (raw(price=19.999), ["price_not_exact"]),
    "price tiny": (raw(price=0.001), ["price_not_exact"]),
    "price too large": (text("19.99", "10000000000"), ["price_not_exact"]),
    "price overflow": (text("19.99", "1e400"), ["price_not_exact"]),
    "price NaN": (text("19.99", "NaN"), ["not_json_object"]),
    "price string": (raw(price="19.99"), ["price_not_number"]),
    "price NaN string": (raw(price="NaN"), None),  # type: ignore[dict-item]
    "price text": (raw(price="free"), ["price_not_number"]),
    "price boolean": (raw(price=True), ["price_not_number"]),
    "price object": (raw(price={"eur": 1}), ["price_not_number"]),
    "price array": (raw(price=[1]), ["price_not_number"]),
    # time
    "no milliseconds": (raw(timestamp="2025-11-29T12:00:00Z"), []),
    "microseconds": (raw(timestamp="2025-11-29T12:00:00.123456Z"), []),
    "offset": (raw(timestamp="2025-11-29T13:00:00.000+01:00"), []),
    "no zone": (raw(timestamp="2025-11-29T12:00:00.000"), ["timestamp_format"]),
    "blank between": (raw(timestamp="2025-11-29 12:00:00Z"), ["timestamp_format"]),
    "date only": (raw(timestamp="2025-11-29"), ["timestamp_format"]),
    "no such day": (raw(timestamp="2025-02-30T12:00:00.000Z"), ["timestamp_format"]),
    "hour 25": (raw(timestamp="2025-11-29T25:00:00.000Z"), ["timestamp_format"]),
    "epoch millis": (raw(timestamp=1764417600000), ["timestamp_format"]),
    "timestamp words": (raw(timestamp="yesterday"), ["timestamp_format"]),
    "5 minutes ahead": (raw(timestamp="2025-11-29T12:05:00.000Z"), []),
    "more than 5 minutes ahead": (raw(timestamp="2025-11-29T12:05:00.001Z"), ["timestamp_future"]),
    "year 9999": (raw(timestamp="9999-12-31T23:59:59.999Z"), ["timestamp_future"]),
    "7 days old": (raw(timestamp="2025-11-22T12:00:00.000Z"), []),
    "more than 7 days old": (raw(timestamp="2025-11-22T11:59:59.999Z"), ["timestamp_too_old"]),
    "1970": (raw(timestamp="1970-01-01T00:00:00.000Z"), ["timestamp_too_old"]),
    "year 0": (raw(timestamp="0000-01-01T00:00:00.000Z"), ["timestamp_too_old"]),
}


def check(
    spark: SparkSession,
    settings: Settings,
    values: list[bytes | None],
    kafka: datetime = NOW,
    ours: datetime = NOW,
) -> list[list[str]]:
    rows = [(number, value, kafka, ours) for number, value in enumerate(values)]
    frame = spark.createDataFrame(rows, "offset BIGINT, value BINARY, kafka_timestamp TIMESTAMP, received_at TIMESTAMP")
    return [row["codes"] for row in rules.check(frame, settings).orderBy("offset").select("codes").collect()]


@pytest.fixture(scope="module")
def found(spark: SparkSession) -> dict[str, list[str]]:
    from clickstream.settings import Settings

    settings = Settings(lake_uri="file:///unused")
    codes = check(spark, settings, [value for value, _ in CASES.values()])
    return dict(zip(CASES, codes, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_codes(name: str, found: dict[str, list[str]]) -> None:
    expected = CASES[name][1]
    if expected is None:
        assert found[name], "must be rejected"
    else:
        assert found[name] == expected


# Judged otherwise by rule set 2.
BY_2: dict[str, tuple[bytes, list[str]]] = {
    "valid": (raw(), []),
    "a new kind of device": (raw(device_type="fridge"), []),
    "a device in capitals": (raw(device_type="Fridge"), ["device_format"]),
    "a device of one letter": (raw(device_type="x"), ["device_format"]),
    "JSON's true": (text(DEVICE, '"device_type": true'), ["device_format"]),
    "JSON's false": (text(DEVICE, '"device_type": false'), ["device_format"]),
    "the word of it": (raw(device_type="true"), ["device_format"]),
    "a word that begins so": (raw(device_type="trueish"), []),
    "a number for a device": (raw(device_type=42), ["device_format"]),
    "the largest price": (raw(price=100_000), []),
    "a larger price": (raw(price=100_000.01), ["price_implausible"]),
}


def test_every_rule_has_a_failing_and_a_passing_example(spark: SparkSession, found: dict[str, list[str]]) -> None:
    from clickstream.settings import Settings

    by_2 = check(spark, Settings(lake_uri="file:///unused", ruleset_version=2), [value for value, _ in BY_2.values()])
    assert dict(zip(BY_2, by_2, strict=True)) == {name: codes for name, (_, codes) in BY_2.items()}
    failing = {code for codes in (*found.values(), *by_2) for code in codes}
    assert failing == {rule.code for rule in rules.RULES}
    assert [] in found.values()


def test_a_rule_set_that_has_judged_records_stays_as_it_was() -> None:
    """A row's ruleset_version is worth something only then. Has a rule changed? See how, at the top of rules.py."""
    from clickstream.settings import RULESET_VERSIONS

    told = {
        version: hashlib.sha256(
            repr([rules.BLANK, *((rule.code, rule.fails) for rule in rules.RULES if rule.applies(version))]).encode()
        ).hexdigest()[:12]
        for version in RULESET_VERSIONS
    }
    assert told == {1: "67a688592b9c", 2: "5782f85e954d"}


def test_codes_are_unique_and_explained() -> None:
    codes = [rule.code for rule in rules.RULES]
    assert len(set(codes)) == len(codes)
    assert all(rule.reason and "\n" not in rule.reason for rule in rules.RULES)


def test_a_producer_with_a_fast_clock_is_judged_by_ours(spark: SparkSession, settings: Settings) -> None:
    """Kafka's timestamp is the producer's word: both may be wrong together."""
    tomorrow = NOW + timedelta(days=1)
    value = raw(timestamp="2025-11-30T12:00:00.000Z")
    assert check(spark, settings, [value], kafka=tomorrow, ours=NOW) == [["timestamp_future"]]


def test_a_record_without_a_timestamp_is_judged_by_our_clock(spark: SparkSession, settings: Settings) -> None:
    nothing = datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)
    assert check(spark, settings, [raw()], kafka=nothing, ours=NOW) == [[]]


def test_an_old_backlog_is_judged_by_kafkas_clock(spark: SparkSession, settings: Settings) -> None:
    """A stream that catches up after two weeks rejects nothing for its age."""
    assert check(spark, settings, [raw()], kafka=NOW, ours=NOW + timedelta(days=14)) == [[]]


def test_limits_are_settings(spark: SparkSession) -> None:
    from clickstream.settings import Settings

    strict = Settings(lake_uri="file:///unused", max_clock_skew="1 second", max_event_age="1 hour")
    late, early = raw(timestamp="2025-11-29T10:59:59Z"), raw(timestamp="2025-11-29T12:00:02Z")
    assert check(spark, strict, [late, early]) == [["timestamp_too_old"], ["timestamp_future"]]


def test_a_price_is_exact_to_the_cent(spark: SparkSession, settings: Settings) -> None:
    prices = ["0.01", "0.07", "1.10", "19.99", "299.99", "1234567.89", "99999999.99", "9999999999.99"]
    rows = [(text("19.99", price), NOW, NOW) for price in prices]
    frame = spark.createDataFrame(rows, "value BINARY, kafka_timestamp TIMESTAMP, received_at TIMESTAMP")
    checked = rules.check(frame, settings).select(F.col("amount").cast("string"), "codes").collect()
    assert [row["codes"] for row in checked] == [[]] * len(prices)
    assert sorted(row["amount"] for row in checked) == sorted(prices)


def test_a_rejects_bytes_and_place_are_kept(spark: SparkSession, settings: Settings) -> None:
    blob = bytes(range(256)) * 3_600
    rows = [("t", 2, 7, NOW, 0, b"\xff\x00", blob, [])]
    from conftest import KAFKA_COLUMNS

    judged = silver.judge(silver.received(spark.createDataFrame(rows, KAFKA_COLUMNS)), settings)
    (reject,) = silver.rejects(judged, settings).collect()
    assert (bytes(reject["key"]), bytes(reject["value"])) == (b"\xff\x00", blob)
    assert (reject["topic"], reject["partition"], reject["offset"]) == ("t", 2, 7)
    assert (reject["disposition"], reject["ruleset_version"]) == ("invalid", settings.ruleset_version)


def test_a_malformed_record_fails_the_rule_that_its_truth_names(spark: SparkSession, settings: Settings) -> None:
    """The producer's faults and the rules agree on what is wrong."""
    found = check(spark, settings, [make(event()) for _, make in faults.MALFORMED])
    for (code, _), codes in zip(faults.MALFORMED, found, strict=True):
        assert code in codes


def test_what_the_shop_says_is_valid(spark: SparkSession, settings: Settings) -> None:
    """After many events too, when prices have moved."""
    events = itertools.islice(Shop(seed=1, clock=NOW.timestamp), 0, 100_000, 20)
    assert {*map(tuple, check(spark, settings, [json.dumps(event).encode() for event in events]))} == {()}


@examples(
    max_examples=5,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # to make an example smaller takes minutes
)
@given(records=st.lists(st.tuples(payloads(), CLOCKS), min_size=200, max_size=200))
def test_the_oracle_finds_the_same_codes(
    spark: SparkSession, records: list[tuple[bytes | None, tuple[datetime, datetime]]]
) -> None:
    """Whatever is wrong with a record, the rules and a judge that shares nothing with them say the same of it."""
    from clickstream.settings import Settings

    columns = "offset BIGINT, value BINARY, kafka_timestamp TIMESTAMP, received_at TIMESTAMP"
    frame = spark.createDataFrame([(n, value, *clocks) for n, (value, clocks) in enumerate(records)], columns)
    both = [
        rules.check(frame, Settings(lake_uri="file:///unused", ruleset_version=version)).select(
            F.lit(version).alias("version"), "offset", "codes"
        )
        for version in (1, 2)
    ]
    micros = [[(clock - gold.EPOCH) // timedelta(microseconds=1) for clock in clocks] for _, clocks in records]
    differing = {}
    for version, offset, codes in both[0].unionByName(both[1]).collect():
        value, clocks = records[offset]
        wanted, _ = oracle.judge(value, *micros[offset], version)
        if sorted(codes) != sorted(wanted):
            differing[version, value, clocks] = (codes, wanted)
    assert not differing
