"""The locks that are committed: complete, well-formed and free of what belongs to one site."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ansible/plugins/modules"))

import maven_jars  # noqa: E402

JAR_LOCKS = sorted(ROOT.glob("roles/*/files/jars.lock"))
SOURCES = sorted(
    path
    for pattern in (
        "ansible/requirements*.in",
        "roles/*/files/*requirements.in",
        "pipeline/requirements.in",
        "terraform/requirements.in",
    )
    for path in ROOT.glob(pattern)
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("lock", JAR_LOCKS, ids=name)
def test_a_jar_lock_can_be_installed_and_belongs_to_its_pom(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    jars = maven_jars.parse_lock(text)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    coordinates = {":".join(jar.coordinates.split(":")[:2]) for jar in jars}
    pom = lock.with_name("pom.xml").read_text(encoding="utf-8")
    dependencies = re.sub(r"<(exclusions|dependencyManagement)>.*?</\1>|<!--.*?-->", "", pom, flags=re.S)
    asked = re.findall(r"<dependency>\s*<groupId>([^<]+)</groupId>\s*<artifactId>([^<]+)</artifactId>", dependencies)
    assert asked and {":".join(pair) for pair in asked} <= coordinates


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_a_python_lock_is_hashed_and_answers_its_source(source: Path) -> None:
    text = source.with_suffix(".txt").read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    assert entries and all("==" in entry and "--hash=sha256:" in entry for entry in entries)
    pinned = {normal(re.split(r"[=\[ ]", entry)[0]) for entry in entries}
    wanted = [line for line in source.read_text(encoding="utf-8").splitlines() if re.match(r"[A-Za-z0-9]", line)]
    assert {normal(re.split(r"[\[=~<>! ]", line)[0]) for line in wanted} <= pinned


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_spark_jars_are_not_among_pysparks_own() -> None:
    """Those of the pyspark in the environment of the package's tests; the control environment has none."""
    artifacts = r"^(?P<artifact>.+?)-(?P<version>\d[^/]*)\.jar$"
    shipped = {
        match["artifact"]
        for path in (ROOT / ".cache/test-venv/lib").glob("python*/site-packages/pyspark/jars/*.jar")
        if (match := re.match(artifacts, path.name))
    }
    locked = {
        jar.coordinates.split(":")[1]
        for jar in maven_jars.parse_lock((ROOT / "roles/spark/files/jars.lock").read_text(encoding="utf-8"))
    }
    assert len(shipped) > 100, ".cache/test-venv has no pyspark: run 'make unit', which makes it"
    assert not locked & shipped
