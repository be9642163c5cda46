"""The streams' health check, as the role writes it, against what queries say of themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from repository import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def ago(minutes: float) -> str:
    return (datetime.now(UTC) - timedelta(minutes=minutes)).isoformat(timespec="milliseconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the check looks, and where it is."""
    made = tmp_path_factory.mktemp("health")
    facts = {"pipeline_data_dir": str(made), "pipeline_stream_service": {"value": ["silver", "gold_hourly"]}}
    role = ROOT / "roles/pipeline"
    variables = ["-e", f"@{role}/defaults/main.yml", "-e", f"@{role}/vars/main.yml", "-e", json.dumps(facts)]
    template = f"src={role}/templates/health_stream.py.j2 dest={made}/check"
    subprocess.run(
        [str(ROOT / ".venv/bin/ansible"), "localhost", "-m", "template", "-a", template, *variables],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg")},
        check=True,
        capture_output=True,
    )
    (made / "status").mkdir()
    return made


@pytest.mark.parametrize(
    ("hourly", "problem"),
    [
        ({"seen_at": 0.5}, ""),
        # a minute until its next batch, ten at work, one of silence
        ({"seen_at": 11.5}, ""),
        ({"seen_at": 12.5}, "gold_hourly has been silent"),
        ({"seen_at": 20, "rests_until": 11.5}, ""),
        ({"seen_at": 20, "rests_until": 12.5}, "gold_hourly has been silent"),
        ({"seen_at": 1, "rests_until": -9}, ""),
    ],
)
def test_a_query_that_rests_is_healthy_and_one_that_hangs_is_not(
    folder: Path, hourly: dict[str, float], problem: str
) -> None:
    silver: dict[str, Any] = {"state": "running", "seen_at": ago(0.1)}
    (folder / "status/silver.json").write_text(json.dumps(silver))
    status = {"state": "running"} | {name: ago(minutes) for name, minutes in hourly.items()}
    (folder / "status/gold_hourly.json").write_text(json.dumps(status))
    done = subprocess.run([sys.executable, folder / "check"], capture_output=True, text=True, check=False)
    assert done.returncode == bool(problem), done.stdout + done.stderr
    assert problem in done.stderr
