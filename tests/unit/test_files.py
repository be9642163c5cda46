"""files, run as Ansible runs it: a process of its own with its arguments on standard input."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODULE = Path(__file__).resolve().parents[2] / "ansible/plugins/modules/files.py"
ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


def run(files: list[dict[str, Any]], check_mode: bool = False) -> dict[str, Any]:
    """The module's answer."""
    entries = [entry if entry.get("state") == "link" else ME | entry for entry in files]
    arguments = {"ANSIBLE_MODULE_ARGS": {"files": entries, "_ansible_check_mode": check_mode, "_ansible_diff": True}}
    done = subprocess.run(
        [sys.executable, MODULE], input=json.dumps(arguments), capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def wanted(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        {"path": str(tmp_path / "a/b"), "state": "directory", "mode": "0750"},
        {"path": str(tmp_path / "a/b/c.conf"), "content": "one\ntwo", "mode": "0640"},
        {"path": str(tmp_path / "current"), "state": "link", "target": "a/b"},
    ]


def test_makes_everything_and_then_nothing(tmp_path: Path, wanted: list[dict[str, Any]]) -> None:
    first = run(wanted)
    assert first["changed"] and first["changed_paths"] == [entry["path"] for entry in wanted]
    assert (tmp_path / "current/c.conf").read_text() == "one\ntwo\n"
    assert stat.S_IMODE((tmp_path / "a/b/c.conf").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o750
    assert os.readlink(tmp_path / "current") == "a/b"
    before = os.lstat(tmp_path / "a/b/c.conf").st_ctime_ns
    second = run(wanted)
    assert not second["changed"] and second["changed_paths"] == [] and second["diff"] == []
    assert os.lstat(tmp_path / "a/b/c.conf").st_ctime_ns == before, "an unchanged file was touched"


def test_a_file_that_was_not_put_to_use_counts_as_changed(tmp_path: Path) -> None:
    file = {"path": str(tmp_path / "ca.crt"), "content": "certificate", "used_by": str(tmp_path / "bundle")}
    assert run([file])["changed_paths"] == [file["path"]]
    assert run([file])["changed_paths"] == [file["path"]], "interrupted before it was used"
    (tmp_path / "bundle").touch()
    assert not run([file])["changed"]
    os.utime(tmp_path / "bundle", (0, 0))
    assert run([file])["changed"] and run([file], check_mode=True)["changed"]
    link = {"path": str(tmp_path / "link"), "state": "link", "target": "bundle", "used_by": str(tmp_path / "bundle")}
    assert "takes no used_by" in run([link])["msg"]


def test_a_link_that_moves_leaves_the_release_before_and_what_is_no_release(tmp_path: Path) -> None:
    for name in ("1-00000001", "1-00000002", "2-00000003", "tools"):
        (tmp_path / "releases" / name).mkdir(parents=True)
    link = {"path": str(tmp_path / "current"), "state": "link", "prune": True}
    # The first one does not know what is in use.
    run([link | {"target": "releases/1-00000001"}])
    assert len(list((tmp_path / "releases").iterdir())) == 4
    run([link | {"target": "releases/1-00000002"}], check_mode=True)
    assert len(list((tmp_path / "releases").iterdir())) == 4
    run([link | {"target": "releases/1-00000002"}])
    assert {path.name for path in (tmp_path / "releases").iterdir()} == {"1-00000001", "1-00000002", "tools"}
    assert not run([link | {"target": "releases/1-00000002"}])["changed"]


def test_mends_content_mode_and_target(tmp_path: Path, wanted: list[dict[str, Any]]) -> None:
    run(wanted)
    (tmp_path / "a/b/c.conf").chmod(0o666)
    wanted[2]["target"] = "elsewhere"
    answer = run(wanted)
    assert answer["changed_paths"] == [wanted[1]["path"], wanted[2]["path"]]
    assert stat.S_IMODE((tmp_path / "a/b/c.conf").stat().st_mode) == 0o640
    wanted[1]["content"] = "three"
    answer = run(wanted)
    assert answer["changed_paths"] == [wanted[1]["path"]]
    assert answer["diff"][0]["before"] == "one\ntwo\n" and answer["diff"][0]["after"] == "three\n"


def test_check_mode_writes_nothing(tmp_path: Path, wanted: list[dict[str, Any]]) -> None:
    answer = run(wanted, check_mode=True)
    assert answer["changed"] and len(answer["changed_paths"]) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "relative", "content": ""}, "absolute"),
        ({"path": "/x", "state": "link"}, "needs target"),
        ({"path": "/x"}, "needs content"),
        ({"path": "/x", "state": "directory", "content": "y"}, "takes no content"),
        ({"path": "/etc", "content": "y"}, "is no file"),
    ],
)
def test_refuses_what_cannot_be_meant_before_writing(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    answer = run([{"path": str(tmp_path / "first"), "content": "x"}, entry])
    assert answer.get("failed") and said in answer["msg"]
    assert not (tmp_path / "first").exists()


def test_a_file_takes_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other\n")
    (tmp_path / "x").symlink_to("other")
    run([{"path": str(tmp_path / "x"), "content": "mine"}])
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "other").read_text() == "other\n"
