"""Thresholds of the bounded jobs, read from the environment and checked; the numbers and what they mean in one place.

Pure Python, so that the role can check them on the control node.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from clickstream.settings import PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self


class ParameterError(ValueError):
    """A parameter is wrong; the message names it and the fix."""


@dataclass(frozen=True)
class Limits:
    """Numbers above 0, whole where their default is, each from the variable of the prefix and its name."""

    prefix: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                self._fail(field.name, f"{value!r} is not a {'whole ' if whole else ''}number", "write digits only")
            if whole and value < 1:
                self._fail(field.name, f"{value} is too small", "give it a whole number of 1 or more")
            if not math.isfinite(value) or value <= 0:
                self._fail(field.name, f"{value} is not above 0", "give it a number above 0")

    def _fraction(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value >= 1:
                self._fail(name, f"{value} is not below 1", "give it a number between 0 and 1")

    def _confidence(self, name: str) -> None:
        value = getattr(self, name)
        if not 0.5 < value < 1:
            self._fail(name, f"{value} is not between 0.5 and 1", "write 0.99 for one error in a hundred")

    @staticmethod
    def _fail(name: str, problem: str, fix: str) -> None:
        raise ParameterError(f"{name}: {problem}; {fix}")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """The defaults where a variable is not set; ParameterError names the variable."""
        env = os.environ if env is None else env
        values: dict[str, Any] = {}
        for field in fields(cls):
            name = cls.prefix + field.name.upper()
            raw = env.get(name)
            if raw is None:
                continue
            try:
                values[field.name] = int(raw) if isinstance(field.default, int) else float(raw)
            except ValueError:
                raise ParameterError(f"{name}: {raw!r} is not a number; write for example {field.default}") from None
        try:
            return cls(**values)
        except ParameterError as error:
            name, _, problem = str(error).partition(":")
            raise ParameterError(f"{cls.prefix}{name.upper()}:{problem}") from None


@dataclass(frozen=True)
class NotifyLimits(Limits):
    """What `clickstream notify` tells people."""

    prefix: ClassVar[str] = f"{PREFIX}NOTIFY_"

    # What happened longer ago is not told any more, hours.
    lookback_hours: int = 24
    # The own history of a category and of the revenue, days.
    history_days: int = 7
    # A category's hour is a drop when its conversion is below this fraction of its history's, ...
    conversion_fraction: float = 0.7
    # ... with both bounds at this one-sided confidence, ...
    confidence: float = 0.999
    # ... and so many sessions in that history.
    min_sessions: int = 200
    # Revenue has stalled when its history makes a silence as long less probable than this, ...
    stall_probability: float = 1e-6
    # ... and it is at least so long, minutes: a restart of the streams is no stall.
    stall_minutes: int = 10
    # How long the outbox keeps what was delivered, days.
    retention_days: int = 90

    def __post_init__(self) -> None:
        super().__post_init__()
        self._confidence("confidence")
        self._fraction("conversion_fraction", "stall_probability")
        if self.retention_days * 24 <= self.lookback_hours:
            self._fail(
                "retention_days",
                f"{self.retention_days} days are not more than lookback_hours, {self.lookback_hours}: what was told "
                "would be told again",
                "raise it, or lower lookback_hours",
            )


@dataclass(frozen=True)
class QualityLimits(Limits):
    """What `clickstream quality` takes for a failure."""

    prefix: ClassVar[str] = f"{PREFIX}QUALITY_"

    # How old the newest row of Bronze and Silver may be, and how far Gold may be behind Silver beside the watermark,
    # minutes. Half of it is a warning.
    freshness_minutes: int = 15
    # The time that is judged, minutes, and how many days before it are its history.
    window_minutes: int = 60
    history_days: int = 7
    # How far back Bronze's offsets are looked at for holes, and Silver's and Gold's rows for nulls, hours.
    recent_hours: int = 24
    # A rule's rate fails when it is more than so many times that of its history, ...
    reject_factor: float = 3.0
    # ... with both bounds at this one-sided confidence, ...
    confidence: float = 0.999
    # ... and above this part of all records; a smaller one is a warning.
    reject_rate: float = 0.01
    # Of fewer records than this no rate is judged.
    min_records: int = 100
    # The volume fails beyond so many standard deviations of the history's, ...
    volume_z: float = 6.0
    # ... when it is also more than so many times higher or lower; else it is a warning.
    volume_factor: float = 2.0
    # Fewer windows of history than this judge nothing.
    min_windows: int = 6
    # How long results are kept, days.
    retention_days: int = 90

    def __post_init__(self) -> None:
        super().__post_init__()
        self._confidence("confidence")
        self._fraction("reject_rate")
        for name in ("reject_factor", "volume_factor"):
            if getattr(self, name) < 1:
                self._fail(name, f"{getattr(self, name)} is below 1", "give it a number of 1 or more")
        if 24 * 60 % self.window_minutes:
            self._fail(
                "window_minutes",
                f"a day is no multiple of {self.window_minutes} minutes",
                "choose one such as 15, 30, 60 or 120, so that the windows of every day are the same",
            )
        if self.recent_hours > 24 * self.history_days:
            self._fail("recent_hours", f"{self.recent_hours} is more than history_days", "lower it or raise that")
