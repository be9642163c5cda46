"""Checkov's policies: no finding, and each exception beside what it is about, with its reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING

from standin import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CHECKOV = ROOT / ".cache/scan-venv/bin/checkov"


def test_no_finding(files: Path) -> None:
    done = subprocess.run(
        [CHECKOV, "--directory", files, "--framework", "terraform", "--output", "json", "--quiet", "--skip-download"],
        env=os.environ | {"BC_SKIP_MAPPING": "TRUE", "LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    results, summary = report["results"], report["summary"]
    print(summary)
    assert [(found["check_id"], found["resource"], found["check_name"]) for found in results["failed_checks"]] == []
    assert summary["parsing_errors"] == 0
    assert summary["passed"] > 100


def test_each_exception_has_a_reason() -> None:
    lines = [line for path in (ROOT / "terraform").rglob("*.tf") for line in path.read_text().splitlines()]
    skips = [line for line in lines if "checkov:skip" in line]
    assert skips
    assert [line for line in skips if not re.search(r"#checkov:skip=CKV2?_AWS_\d+:.{20,}", line)] == []
