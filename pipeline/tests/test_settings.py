"""Settings: every wrong value is refused with the variable's name and what to do."""

from __future__ import annotations

import pytest

from clickstream.settings import Settings, SettingsError, seconds, size_bytes

LAKE = {"CLICKSTREAM_LAKE_URI": "file:///var/lib/lake"}


def test_defaults_and_places() -> None:
    settings = Settings.from_env(LAKE)
    assert settings.table("silver.events") == "file:///var/lib/lake/silver/events"
    assert settings.checkpoint("gold") == "file:///var/lib/lake/_checkpoints/gold"
    assert settings.topic == "ecom_clickstream_raw"


def test_a_flag_wins_over_the_environment() -> None:
    env = LAKE | {"CLICKSTREAM_TOPIC": "a"}
    assert Settings.from_env(env).topic == "a"
    assert Settings.from_env(env, topic="b").topic == "b"
    assert Settings.from_env(env, topic=None).topic == "a"


def test_a_trailing_slash_makes_no_difference() -> None:
    assert Settings(lake_uri="hdfs://nn:8020/lake/").table("a.b") == "hdfs://nn:8020/lake/a/b"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LAKE_URI", "lake", "not an absolute URI"),
        ("LAKE_URI", "/var/lib/lake", "file:///var/lib/lake"),
        ("LAKE_URI", "file:lake", "not an absolute URI"),
        ("LAKE_URI", "", "not an absolute URI"),
        ("BOOTSTRAP_SERVERS", "localhost", "host:port"),
        ("BOOTSTRAP_SERVERS", "", "it is empty"),
        ("WATERMARK", "10", "'10 minutes'"),
        ("TRIGGER_GOLD", "3 fortnights", "'3 seconds'"),
        ("TRIGGER_GOLD_HOURLY", "hourly", "'10 minutes'"),
        ("MAX_OFFSETS_PER_TRIGGER", "many", "whole number"),
        ("SHUFFLE_PARTITIONS", "0", "1 or more"),
        ("EXECUTOR_MEMORY", "1 GB", "'1g'"),
        ("RULESET_VERSION", "3", "there is no rule set 3; choose one of 1, 2"),
        ("HOURLY_PERCENT", "0", "1 or more"),
        ("HOURLY_PERCENT", "101", "choose 1 to 100"),
        ("MART_RETENTION_DAYS", "7", "raise it, or lower CLICKSTREAM_MAX_EVENT_AGE"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_env(LAKE | {f"CLICKSTREAM_{name}": value})
    assert f"CLICKSTREAM_{name}" in str(error.value)
    assert message in str(error.value)


def test_a_missing_lake_is_named() -> None:
    with pytest.raises(SettingsError, match="CLICKSTREAM_LAKE_URI: it is not set"):
        Settings.from_env({})


def test_units() -> None:
    assert (seconds("10 minutes"), seconds("1 day"), seconds("500 milliseconds")) == (600, 86400, 0.5)
    assert (size_bytes("1g"), size_bytes("768m")) == (1 << 30, 768 << 20)
