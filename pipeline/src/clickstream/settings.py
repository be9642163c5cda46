"""Settings of the streams and bounded jobs, read once from CLICKSTREAM_* variables.

Every error names the variable and says how to fix it; nothing is guessed from a broken value.
"""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "CLICKSTREAM_"
# What rules.py has; known here, so that a wrong one is told without Spark.
RULESET_VERSIONS = (1, 2)
_UNITS = {"millisecond": 0.001, "second": 1, "minute": 60, "hour": 3600, "day": 86400}
_INTERVAL = re.compile(r"(\d+) (millisecond|second|minute|hour|day)s?")
_SIZE = re.compile(r"(\d+)([kmg])b?", re.IGNORECASE)


class SettingsError(ValueError):
    """A setting is missing or wrong; the message names it and the fix."""


def seconds(interval: str) -> float:
    """Seconds in an interval such as '10 minutes'."""
    match = _INTERVAL.fullmatch(interval.strip())
    if not match:
        raise ValueError(f"{interval!r} is not an interval; write for example '10 minutes' or '3 seconds'")
    return int(match[1]) * _UNITS[match[2]]


def size_bytes(size: str) -> int:
    """Bytes in a size such as '64m'."""
    match = _SIZE.fullmatch(size.strip())
    if not match:
        raise ValueError(f"{size!r} is not a size; write for example '768m' or '1g'")
    power = "kmg".index(match[2].lower()) + 1
    return int(match[1]) * int(1024**power)


@dataclass(frozen=True)
class Settings:
    lake_uri: str
    bootstrap_servers: str = "localhost:9092"
    topic: str = "ecom_clickstream_raw"
    spark_master: str = "local[2]"
    marts_dsn: str = ""
    status_dir: str = ""
    # Where `clickstream report` keeps the days' reports.
    report_dir: str = ""

    trigger_bronze: str = "10 seconds"
    trigger_silver: str = "3 seconds"
    trigger_gold: str = "1 second"
    trigger_gold_hourly: str = "1 minute"
    # The hours' query works at most this part of the time, in percent, and rests the others, so that under load the
    # newest minutes have the processors.
    hourly_percent: int = 20
    # How late a valid event may come and still be deduplicated and counted by the streams.
    watermark: str = "10 minutes"
    # An event may be this far ahead of Kafka's and our clock, and this far behind Kafka's, to be believed.
    max_clock_skew: str = "5 minutes"
    max_event_age: str = "7 days"
    # Which version of the rules judges records.
    ruleset_version: int = 1

    max_offsets_per_trigger: int = 200_000
    # Gold reads at most this much of Silver a batch; it bounds a catch-up after a long stop.
    max_bytes_per_trigger: str = "64m"
    # So many visitors and sessions of products are kept of each Gold table's live windows in the driver, 8 bytes each
    # (a product counts as 120 more); windows with more are computed whole at each batch.
    live_entries: int = 8_000_000
    spark_cores_max: int = 2
    shuffle_partitions: int = 2
    executor_memory: str = "1g"
    driver_memory: str = "768m"
    # Where the nodes have a Java that gives way to others, for the executors of bounded jobs; empty is the usual one.
    batch_java_home: str = ""
    # A batch of this many rows or fewer becomes one file; a larger one is written by all cores.
    rows_per_file: int = 20_000
    # Batches that a checkpoint keeps; also how far a query can be taken back by hand.
    checkpoint_batches: int = 20

    compact_target_size: str = "128m"
    # How long replaced data files and table history stay: longer than the longest stop of a reader.
    retention_hours: int = 48
    # How many days behind its newest row a mart goes back. Delta keeps everything.
    mart_retention_days: int = 90

    def __post_init__(self) -> None:
        uri = urlsplit(self.lake_uri)
        if not uri.scheme or not uri.path.startswith("/"):
            self._fail(
                "lake_uri",
                f"{self.lake_uri!r} is not an absolute URI",
                "write the scheme and a full path, for example file:///var/lib/lake or hdfs://namenode:8020/lake",
            )
        if self.lake_uri.endswith("/"):
            object.__setattr__(self, "lake_uri", self.lake_uri.rstrip("/"))
        for name in ("bootstrap_servers", "topic", "spark_master"):
            if not getattr(self, name):
                self._fail(name, "it is empty", "remove the variable to use its default, or give it a value")
        for server in self.bootstrap_servers.split(","):
            if not re.fullmatch(r"\[?[^\s\]]+\]?:\d{1,5}", server.strip()):
                self._fail("bootstrap_servers", f"{server!r} is not host:port", "write host1:9092,host2:9092")
        for name in (
            "trigger_bronze",
            "trigger_silver",
            "trigger_gold",
            "trigger_gold_hourly",
            "watermark",
            "max_clock_skew",
            "max_event_age",
        ):
            self._check(name, seconds)
        if self.ruleset_version not in RULESET_VERSIONS:
            known = ", ".join(map(str, RULESET_VERSIONS))
            self._fail("ruleset_version", f"there is no rule set {self.ruleset_version}", f"choose one of {known}")
        # An event from the future moves the watermark as far ahead as it is believed; twice that has to fit in it,
        # or events that come on time would be late.
        if 2 * seconds(self.max_clock_skew) > seconds(self.watermark):
            self._fail(
                "max_clock_skew",
                f"{self.max_clock_skew} is more than half of the watermark, {self.watermark}",
                f"lower it, or raise {PREFIX}WATERMARK",
            )
        # Else an event that is believed would be counted in a window that is gone, as if it were all of it.
        if self.mart_retention_days * 86400 < seconds(self.max_event_age) + 86400:
            self._fail(
                "mart_retention_days",
                f"{self.mart_retention_days} is less than a day more than the age of events, {self.max_event_age}",
                f"raise it, or lower {PREFIX}MAX_EVENT_AGE",
            )
        if self.hourly_percent > 100:
            self._fail("hourly_percent", f"{self.hourly_percent} is more than all of the time", "choose 1 to 100")
        for name in ("executor_memory", "driver_memory", "max_bytes_per_trigger", "compact_target_size"):
            self._check(name, size_bytes)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                self._fail(field.name, f"{value} is too small", "give it a whole number of 1 or more")

    def _check(self, name: str, parse: object) -> None:
        try:
            parse(getattr(self, name))  # type: ignore[operator]
        except ValueError as error:
            self._fail(name, str(error), "correct it")

    @staticmethod
    def _fail(name: str, problem: str, fix: str) -> None:
        raise SettingsError(f"{PREFIX}{name.upper()}: {problem}; {fix}")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **overrides: str | None) -> Settings:
        """Settings from the environment; an override that is not None (a command-line flag) wins."""
        env = os.environ if env is None else env
        values: dict[str, str | int] = {}
        for field in fields(cls):
            override = overrides.get(field.name)
            raw = override if override is not None else env.get(PREFIX + field.name.upper())
            if raw is None:
                if field.default is MISSING:
                    cls._fail(field.name, "it is not set", "export it, for example file:///var/lib/lake")
                continue
            if isinstance(field.default, int):
                if not re.fullmatch(r"\d+", raw.strip()):
                    cls._fail(field.name, f"{raw!r} is not a whole number", "write digits only")
                values[field.name] = int(raw)
            else:
                values[field.name] = raw.strip()
        return cls(**values)  # type: ignore[arg-type]

    def require_marts(self) -> None:
        """SettingsError without the marts' connection string."""
        if not self.marts_dsn:
            self._fail("marts_dsn", "it is not set", "export it, for example service=analytics, or pass --marts-dsn")

    def table(self, name: str) -> str:
        """Where table `layer.name` lives."""
        layer, _, table = name.partition(".")
        return f"{self.lake_uri}/{layer}/{table}"

    def checkpoint(self, query: str) -> str:
        return f"{self.lake_uri}/_checkpoints/{query}"
