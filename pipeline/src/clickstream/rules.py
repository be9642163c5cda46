"""What makes an event valid: the rules as data, and the function that applies them to raw bytes.

A rule *fails* a record when its SQL condition is true; NULL counts as not failing, so that a missing field is
reported by its own rule only. All failing rules of a record are reported.

A rule set is a version: the rules with `since` <= version < `until`. One that has judged records never changes: to
change a rule, end it with `until`, begin another with `since`, and add the version to settings.RULESET_VERSIONS.
`pipeline_settings: {ruleset_version: N}` has the streams judge by it from then on; `clickstream backfill --ruleset N`
judges what is there already.

Decisions the rules embody:
- JSON is strict (RFC 8259): no single quotes, no NaN, nothing before or after the one object.
- A key the contract does not name is ignored; Bronze keeps it. Of a repeated key the last value counts; of `price`
  the last that is a number or null, and null after another price fails `price_not_number`.
- JSON null is a missing field. A wrong JSON type is not: it fails the field's own format rule, as the text it has in
  JSON. So `true` and `false` are no words to `device_format`, which cannot tell them from "true" and "false".
- `price` must be a JSON number with at most two decimals. "299.99" in quotes is rejected, not guessed.
- `timestamp` is ISO 8601 with a zone (Z or an offset) and none to six decimals of a second.
- The key of the Kafka record is not checked: it decides the partition, it says nothing about the event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.sql import functions as F  # noqa: N812

from clickstream.catalogue import CATEGORIES, DEVICE_TYPES, EVENT_TYPES
from clickstream.event import FIELDS
from clickstream.settings import seconds

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from clickstream.settings import Settings

PRICE_TYPE = "DECIMAL(12,2)"


@dataclass(frozen=True)
class Rule:
    code: str
    reason: str
    fails: str
    since: int = 1
    until: int | None = None

    def applies(self, version: int) -> bool:
        return self.since <= version and (self.until is None or version < self.until)


def _one_of(field: str, values: tuple[str, ...]) -> str:
    return f"e.{field} NOT IN ({', '.join(repr(v) for v in values)})"


# On the bytes themselves; `blank` is derived from them and `e`. A record that fails one has no fields to check.
PAYLOAD_RULES = (
    Rule("tombstone", "the record has no value", "value IS NULL"),
    Rule("empty_value", "the value has no bytes, or white space only", "blank"),
    Rule("not_utf8", "the bytes are not UTF-8", "NOT is_valid_utf8(text)"),
    Rule("not_json_object", "the value is not exactly one JSON object", "e IS NULL AND NOT blank"),
)

# On the fields: `e` is the parsed object, `event_time`, `amount` and `price_text` are derived from it.
FIELD_RULES = (
    *(
        Rule(f"{field}_missing", f"{field} is absent or null", f"e.{field} IS NULL")
        for field in FIELDS
        if field != "price"
    ),
    Rule(
        "event_id_format",
        "event_id is not evt_ and 8 to 20 digits",
        "e.event_id NOT RLIKE '^evt_[0-9]{8,20}\\\\z'",
    ),
    Rule(
        "user_id_format",
        "user_id is not user_ and 4 to 20 digits",
        "e.user_id NOT RLIKE '^user_[0-9]{4,20}\\\\z'",
    ),
    Rule(
        "product_id_format",
        "product_id is not prod_ and 4 to 20 digits",
        "e.product_id NOT RLIKE '^prod_[0-9]{4,20}\\\\z'",
    ),
    Rule(
        "session_id_format",
        "session_id is not session_ and 4 to 20 digits",
        "e.session_id NOT RLIKE '^session_[0-9]{4,20}\\\\z'",
    ),
    Rule(
        "event_type_unknown",
        f"event_type is none of {', '.join(EVENT_TYPES)}",
        _one_of("event_type", EVENT_TYPES),
    ),
    Rule(
        "category_unknown",
        "product_category is not in the catalogue",
        _one_of("product_category", tuple(CATEGORIES)),
    ),
    Rule(
        "device_unknown",
        f"device_type is none of {', '.join(DEVICE_TYPES)}",
        _one_of("device_type", DEVICE_TYPES),
        until=2,
    ),
    Rule(
        "device_format",
        "device_type is not one lower-case word of 2 to 20 letters, or is true or false",
        "e.device_type NOT RLIKE '^[a-z]{2,20}\\\\z' OR e.device_type IN ('true', 'false')",
        since=2,
    ),
    Rule(
        "page_url_mismatch",
        "page_url is not the page of product_id",
        "e.page_url != concat('/product/', e.product_id)",
    ),
    Rule("price_missing", "price is absent or null", "e.price IS NULL AND price_text IS NULL"),
    Rule("price_not_number", "price is not a JSON number", "e.price IS NULL AND price_text IS NOT NULL"),
    Rule("price_not_positive", "price is zero or negative", "e.price <= 0"),
    Rule(
        "price_not_exact",
        "price has more than two decimals, or is 10^10 or more",
        "e.price > 0 AND (amount IS NULL OR CAST(amount AS DOUBLE) != e.price)",
    ),
    Rule("price_implausible", "price is above 100,000", "e.price > 100000", since=2),
    Rule(
        "timestamp_format",
        "timestamp is not an ISO 8601 moment with a zone",
        "e.timestamp IS NOT NULL AND event_time IS NULL",
    ),
    Rule(
        "timestamp_future",
        "timestamp is further ahead of Kafka's or our clock than the allowed skew",
        "event_time > reference_time + skew",
    ),
    Rule(
        "timestamp_too_old",
        "timestamp is further behind Kafka's clock than the allowed age",
        "event_time < reference_time - max_age",
    ),
)

RULES = PAYLOAD_RULES + FIELD_RULES

# Nothing but what JSON counts as white space; looked for only where no object is, as it takes the whole text.
BLANK = r"CASE WHEN e IS NULL THEN trim(BOTH ' \t\n\r' FROM text) = '' ELSE false END"
_STRICT = "map('allowSingleQuotes', 'false', 'allowNonNumericNumbers', 'false')"
_ISO = r"^\\d{4}-\\d{2}-\\d{2}T\\d{2}:\\d{2}:\\d{2}([.]\\d{1,6})?(Z|[+-]\\d{2}:\\d{2})\\z"


def _codes(rules: tuple[Rule, ...], version: int, gate: str) -> str:
    cases = ",\n".join(
        f"CASE WHEN {gate} AND ({rule.fails}) THEN '{rule.code}' END" for rule in rules if rule.applies(version)
    )
    # array_compact would do the same, interpreted row by row: it is a filter with a lambda.
    return f"array_except(array({cases}), array(CAST(NULL AS STRING)))"


def check(raw: DataFrame, settings: Settings) -> DataFrame:
    """Adds `e` (the parsed event), `event_time`, `amount` and `codes`: all rules of the settings' version that fail,
    none when valid.

    `raw` has Kafka's `value` and `kafka_timestamp`, and `received_at`, our clock when the record was read.
    Pure: the same record with the same times gives the same codes, in a stream and in a batch.
    """
    fields = ", ".join(f"{f} {'DOUBLE' if f == 'price' else 'STRING'}" for f in FIELDS)
    return (
        raw.withColumn("text", F.expr("CAST(value AS STRING)"))
        # Parsed as the one element of an array, because the parser ignores what follows a top-level value.
        .withColumn(
            "parsed",
            F.expr(
                f"""from_json(concat('[', text, ']'), 'ARRAY<STRUCT<{fields}>>',
                    {_STRICT})"""
            ),
        )
        # A value may close that array itself, `{...}]rubbish`; then a second copy of it is not found behind the first.
        .withColumn(
            "alone",
            F.expr(
                f"""CASE WHEN contains(text, ']') THEN size(from_json(concat('[', text, ',', text, ']'),
                    'ARRAY<STRUCT<{fields}>>', {_STRICT})) = 2
                    ELSE true END"""
            ),
        )
        .withColumn("e", F.expr("CASE WHEN size(parsed) = 1 AND alone THEN parsed[0] END"))
        .withColumn("blank", F.expr(BLANK))
        # Nothing below may throw on any input: ANSI mode would end the stream over one record.
        .withColumn(
            "event_time",
            F.expr(f"CASE WHEN e.timestamp RLIKE '{_ISO}' THEN TRY_CAST(e.timestamp AS TIMESTAMP) END"),
        )
        .withColumn("amount", F.expr(f"TRY_CAST(e.price AS {PRICE_TYPE})"))
        .withColumn(
            "price_text",
            F.expr("CASE WHEN e IS NOT NULL AND e.price IS NULL THEN get_json_object(text, '$.price') END"),
        )
        # A record's own timestamp may be absent (-1); then only our clock can judge it.
        .withColumn(
            "reference_time",
            F.expr(
                "CASE WHEN kafka_timestamp > TIMESTAMP '1970-01-01' "
                "THEN least(kafka_timestamp, received_at) ELSE received_at END"
            ),
        )
        .withColumn("skew", F.expr(f"make_dt_interval(0, 0, 0, {seconds(settings.max_clock_skew):f})"))
        .withColumn("max_age", F.expr(f"make_dt_interval(0, 0, 0, {seconds(settings.max_event_age):f})"))
        .withColumn(
            "codes",
            F.expr(
                f"concat({_codes(PAYLOAD_RULES, settings.ruleset_version, 'true')}, "
                f"{_codes(FIELD_RULES, settings.ruleset_version, 'e IS NOT NULL')})"
            ),
        )
        .drop("text", "parsed", "alone", "blank", "price_text", "reference_time", "skew", "max_age")
    )
