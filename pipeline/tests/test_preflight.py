"""The settings as the role checks them, before a node is touched."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import clickstream
from clickstream.detector import Parameters, parameters
from clickstream.limits import NotifyLimits, ParameterError, QualityLimits
from clickstream.preflight import problems

GOOD = {"lake_uri": "file:///var/lib/lake", "retention_hours": 72, "alert_min_views": 50}


def test_good_settings_are_silent() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (
            {"retention_hour": 72},
            "CLICKSTREAM_RETENTION_HOUR is no setting of the package; did you mean CLICKSTREAM_RET",
        ),
        ({"alert_minviews": 5}, "did you mean CLICKSTREAM_ALERT_MIN_VIEWS?"),
        ({"colour": "red"}, "the names are CLICKSTREAM_LAKE_URI, "),
        ({"retention_hours": "long"}, "CLICKSTREAM_RETENTION_HOURS: 'long' is not a whole number; write digits only"),
        ({"quality_window_minutes": 50}, "CLICKSTREAM_QUALITY_WINDOW_MINUTES: a day is no multiple of 50 minutes"),
        ({"quality_recent_hours": 400}, "CLICKSTREAM_QUALITY_RECENT_HOURS: 400 is more than history_days; lower it"),
        ({"quality_volume_factor": 0.5}, "CLICKSTREAM_QUALITY_VOLUME_FACTOR: 0.5 is below 1; give it a number of 1 or"),
        ({"quality_reject_rate": 1}, "CLICKSTREAM_QUALITY_REJECT_RATE: 1.0 is not below 1; give it a number between 0"),
        ({"notify_retention_days": 1}, "CLICKSTREAM_NOTIFY_RETENTION_DAYS: 1 days are not more than lookback_hours"),
        ({"notify_stall_probability": 0}, "CLICKSTREAM_NOTIFY_STALL_PROBABILITY: 0.0 is not above 0; give it"),
        ({"notify_confidance": 0.9}, "did you mean CLICKSTREAM_NOTIFY_CONFIDENCE?"),
        ({"alert_confidence": 2}, "CLICKSTREAM_ALERT_CONFIDENCE: 2.0 is not between 0.5 and 1; write 0.99"),
    ],
)
def test_a_wrong_setting_is_named_with_its_fix(wrong: dict[str, Any], named: str) -> None:
    (problem,) = problems(GOOD | wrong)
    assert named in problem


def test_it_needs_neither_spark_nor_any_other_package() -> None:
    """The control node has none of them."""
    # Without site-packages: only Python itself is there.
    env = {"PYTHONPATH": str(Path(clickstream.__file__).parents[1])}
    command = [sys.executable, "-S", "-m", "clickstream.preflight", json.dumps(GOOD | {"topic": ""})]
    assert "CLICKSTREAM_TOPIC: it is empty" in subprocess.check_output(command, text=True, env=env)


def test_the_environment_sets_every_parameter() -> None:
    assert parameters({}) == Parameters()
    env = {"CLICKSTREAM_ALERT_MIN_VIEWS": "30", "CLICKSTREAM_ALERT_CONFIDENCE": "0.95", "CLICKSTREAM_MIN_VIEWS": "1"}
    assert parameters(env) == Parameters(min_views=30, confidence=0.95)
    assert NotifyLimits.from_env(env | {"CLICKSTREAM_NOTIFY_STALL_MINUTES": "3"}) == NotifyLimits(stall_minutes=3)
    assert QualityLimits.from_env({"CLICKSTREAM_QUALITY_VOLUME_Z": "4"}) == QualityLimits(volume_z=4.0)


@pytest.mark.parametrize(("name", "value"), [("MIN_VIEWS", "1.5"), ("CONFIDENCE", "high"), ("CLOSE_MINUTES", "0")])
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ParameterError, match=rf"^CLICKSTREAM_ALERT_{name}: .*{re.escape(value)}.*; (write|give)"):
        parameters({f"CLICKSTREAM_ALERT_{name}": value})
