"""maven_jars, run as Ansible runs it (a process of its own), against a Maven repository served from this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import stat
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

MODULE = Path(__file__).resolve().parents[2] / "ansible/plugins/modules/maven_jars.py"
sys.path.insert(0, str(MODULE.parent))

import maven_jars  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Repository:
    """A Maven repository on loopback: what it serves, what it was asked for, how it misbehaves."""

    root: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    authorization: list[str | None] = field(default_factory=list)
    fail_once: dict[str, int] = field(default_factory=dict)  # file name to status
    cut_once: set[str] = field(default_factory=set)  # file names whose first transfer is cut short

    def publish(self, coordinates: str, content: bytes | None = None) -> str:
        """Put a jar in the repository and return its line for a lock."""
        group, artifact, *middle, version = coordinates.split(":")
        name = "-".join([artifact, version, *middle]) + ".jar"
        path = self.root / group.replace(".", "/") / artifact / version / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            with zipfile.ZipFile(path, "w") as jar:
                jar.writestr("META-INF/MANIFEST.MF", f"Implementation-Title: {coordinates}\n")
        else:
            path.write_bytes(content)
        return f"{coordinates} {hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    served = Repository(tmp_path / "repository")
    served.root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(served.root))

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            served.asked.append(self.path)
            served.authorization.append(self.headers.get("Authorization"))
            if name in served.fail_once:
                self.send_error(served.fail_once.pop(name))
            elif name in served.cut_once:
                served.cut_once.discard(name)
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                self.wfile.write(b"only a part")
            else:
                super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield served
        server.shutdown()


@dataclass
class Runner:
    repository: Repository
    path: Path

    def __call__(self, lock: list[str] | str, check: bool = False, **params: Any) -> dict[str, Any]:
        arguments = {
            "path": str(self.path),
            "lock": lock if isinstance(lock, str) else "\n".join(lock),
            "repository_url": self.repository.url,
            "_ansible_check_mode": check,
            "_ansible_diff": True,
            **params,
        }
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        done = subprocess.run(
            [sys.executable, str(MODULE)],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.strip().startswith("{"), done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        result["rc"] = done.returncode
        return result

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())


@pytest.fixture
def jars(repository: Repository, tmp_path: Path) -> Runner:
    return Runner(repository, tmp_path / "opt" / "libs")


def test_installs_exactly_the_lock_and_then_changes_nothing(repository: Repository, jars: Runner) -> None:
    lock = ["# a comment", "", repository.publish("org.example.deep:one:1.0"), repository.publish("a:two:linux:2.0")]

    first = jars(lock)
    assert first["changed"] and first["downloaded"] == 2, first
    assert jars.names == ["one-1.0.jar", "two-2.0-linux.jar"]
    assert first["added"] == jars.names
    assert "+" not in first["diff"]["before"] and "one-1.0.jar" in first["diff"]["after"]
    assert stat.S_IMODE(jars.path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in jars.path.iterdir()} == {0o644}

    asked = len(repository.asked)
    inode = jars.path.joinpath("one-1.0.jar").stat().st_ino
    second = jars(lock)
    assert not second["changed"] and second["jars"] == 2
    assert second["diff"]["before"] == second["diff"]["after"]
    assert len(repository.asked) == asked
    assert jars.path.joinpath("one-1.0.jar").stat().st_ino == inode


def test_removes_what_the_lock_does_not_name_and_replaces_what_is_damaged(repository: Repository, jars: Runner) -> None:
    lock = [repository.publish("a:one:1"), repository.publish("a:two:1")]
    jars(lock)
    (jars.path / "old-0.9.jar").write_bytes(b"x")
    (jars.path / "README").write_text("not a jar\n")
    (jars.path / "one-1.jar").write_bytes(b"damaged")
    (jars.path / ".maven_jars-killed").mkdir()

    result = jars(lock)
    assert result["changed"]
    assert (result["added"], result["replaced"], result["removed"]) == ([], ["one-1.jar"], ["old-0.9.jar"])
    assert jars.names == ["README", "one-1.jar", "two-1.jar"]
    assert not jars(lock)["changed"]


def test_a_link_is_not_a_jar(repository: Repository, jars: Runner, tmp_path: Path) -> None:
    lock = [repository.publish("a:one:1")]
    jars(lock)
    elsewhere = tmp_path / "elsewhere.jar"
    jars.path.joinpath("one-1.jar").rename(elsewhere)
    jars.path.joinpath("one-1.jar").symlink_to(elsewhere)
    assert jars(lock)["replaced"] == ["one-1.jar"]
    assert not jars.path.joinpath("one-1.jar").is_symlink()
    assert elsewhere.exists()


def test_a_wrong_checksum_changes_nothing(repository: Repository, jars: Runner) -> None:
    good = repository.publish("a:one:1")
    jars([good])
    (jars.path / "extra-1.jar").write_bytes(b"x")
    bad = repository.publish("a:two:1").split()[0] + " " + "0" * 64

    result = jars([good, bad])
    assert result["rc"] == 1 and result["failed"]
    assert "a:two:1" in result["msg"] and f"{repository.url}/a/two/1/two-1.jar" in result["msg"]
    assert "the lock has 000" in result["msg"] and "make lock" in result["msg"]
    assert jars.names == ["extra-1.jar", "one-1.jar"]


@pytest.mark.parametrize("bad_checksum", [True, False])
def test_a_failed_first_install_leaves_no_directory(repository: Repository, jars: Runner, bad_checksum: bool) -> None:
    bad = repository.publish("a:two:1") if bad_checksum else "a:absent:1 " + "1" * 64
    result = jars([repository.publish("a:one:1"), bad.split()[0] + " " + "1" * 64])
    assert result["failed"]
    assert not jars.path.exists()
    assert list(jars.path.parent.iterdir()) == []


def test_a_missing_artifact_is_named_and_not_tried_again(repository: Repository, jars: Runner) -> None:
    result = jars(["org.nowhere:ghost:natives:3.1 " + "a" * 64])
    assert "org.nowhere:ghost:natives:3.1: HTTP 404" in result["msg"]
    assert "/org/nowhere/ghost/3.1/ghost-3.1-natives.jar" in result["msg"]
    assert "repository_url" in result["msg"]
    assert len(repository.asked) == 1


def test_failures_that_may_pass_are_tried_again(repository: Repository, jars: Runner) -> None:
    lock = [repository.publish("a:one:1"), repository.publish("a:two:1")]
    repository.fail_once["one-1.jar"] = 503
    repository.cut_once.add("two-1.jar")
    result = jars(lock)
    assert result["changed"] and jars.names == ["one-1.jar", "two-1.jar"], result
    assert len(repository.asked) == 4


def test_gives_up_on_a_repository_that_does_not_answer(repository: Repository, jars: Runner) -> None:
    result = jars([repository.publish("a:one:1")], repository_url="http://127.0.0.1:9", retries=0)
    assert "refused" in result["msg"] and "a:one:1" in result["msg"]
    assert not jars.path.exists()


def test_check_mode_tells_and_touches_nothing(repository: Repository, jars: Runner) -> None:
    lock = [repository.publish("a:one:1")]
    result = jars(lock, check=True)
    assert result["changed"] and result["added"] == ["one-1.jar"]
    assert not jars.path.parent.exists() and repository.asked == []

    jars(lock)
    assert not jars(lock, check=True)["changed"]
    (jars.path / "one-1.jar").chmod(0o600)
    assert jars(lock, check=True)["changed"]
    assert stat.S_IMODE((jars.path / "one-1.jar").stat().st_mode) == 0o600
    assert jars(lock)["changed"]
    assert stat.S_IMODE((jars.path / "one-1.jar").stat().st_mode) == 0o644


def test_a_shared_cache_saves_downloads(repository: Repository, jars: Runner, tmp_path: Path) -> None:
    lock = [repository.publish("a.b:one:1"), repository.publish("a.b:two:1")]
    cache = tmp_path / "cache"
    assert jars(lock, cache_dir=str(cache))["downloaded"] == 2
    cached = cache / "a/b/one/1/one-1.jar"
    assert cached.read_bytes() == (jars.path / "one-1.jar").read_bytes()

    asked = len(repository.asked)
    jars.path = tmp_path / "second"
    assert jars(lock, cache_dir=str(cache))["from_cache"] == 2
    assert len(repository.asked) == asked

    cached.write_bytes(b"damaged")
    jars.path = tmp_path / "third"
    result = jars(lock, cache_dir=str(cache))
    assert (result["from_cache"], result["downloaded"]) == (1, 1)
    assert cached.read_bytes() == (jars.path / "one-1.jar").read_bytes()
    assert not [path for path in cache.rglob("*") if path.name.startswith(".part-")]


def test_an_unusable_cache_is_a_warning(repository: Repository, jars: Runner, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    result = jars([repository.publish("a:one:1")], cache_dir=str(in_the_way))
    assert result["changed"] and jars.names == ["one-1.jar"]
    assert "cache_dir" in json.dumps(result["warnings"])


def test_credentials_in_the_url_are_used_and_not_shown(repository: Repository, jars: Runner) -> None:
    url = repository.url.replace("http://", "http://reader:s3cr%40t@")
    line = repository.publish("a:one:1")
    assert jars([line], repository_url=url)["changed"]
    assert repository.authorization == ["Basic cmVhZGVyOnMzY3JAdA=="]
    assert "s3cr" not in jars([line, "a:two:1 " + "0" * 64], repository_url=url)["msg"]


def test_a_folder_is_a_repository_too(repository: Repository, jars: Runner) -> None:
    lock = [repository.publish("a:one:1")]
    assert jars(lock, repository_url=repository.root.as_uri())["changed"]
    assert "a:two:1" in jars([*lock, "a:two:1 " + "0" * 64], repository_url=repository.root.as_uri())["msg"]


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("# header\na:b:1 123\n", "lock line 2 is malformed"),
        ("a:b:1\n", "lock line 1 is malformed"),
        ("a:b " + "0" * 64, "lock line 1 is malformed"),
        ("a:../../etc:1 " + "0" * 64, "lock line 1 is malformed"),
        ("a:b:c:d:e " + "0" * 64, "lock line 1 is malformed"),
        ("a:b:1-SNAPSHOT " + "0" * 64, "snapshot"),
        ("a:b:1 " + "0" * 64 + "\n\nc:b:1 " + "1" * 64, "lock line 3: b-1.jar is on line 1 already"),
        ("roles/kafka/files/jars.lock", "lock line 1 is malformed"),
        ("# nothing\n", "names no jar"),
    ],
)
def test_a_malformed_lock_is_refused_by_line(lock: str, message: str) -> None:
    with pytest.raises(maven_jars.LockError, match=re.escape(message)):
        maven_jars.parse_lock(lock)


def test_a_malformed_lock_fails_the_task(jars: Runner) -> None:
    result = jars("# header\na:b:1 123\n")
    assert result["failed"] and "lock line 2 is malformed" in result["msg"]
    assert not jars.path.parent.exists()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"path": "relative/dir"}, "absolute"),
        ({"path": "/"}, "other than /"),
        ({"threads": 0}, "threads is 0"),
        ({"repository_url": "ftp://host/x"}, "not an http, https or file URL"),
        ({"repository_url": "repo1.maven.org"}, "not an http, https or file URL"),
        ({"ca_bundle": "/nonexistent.pem"}, "ca_bundle /nonexistent.pem"),
    ],
)
def test_a_wrong_argument_is_refused(jars: Runner, params: dict[str, Any], message: str) -> None:
    result = jars("a:b:1 " + "0" * 64, **params)
    assert result["failed"] and message in result["msg"]


def test_a_file_in_the_way_is_named(repository: Repository, jars: Runner) -> None:
    jars.path.parent.mkdir()
    jars.path.write_text("")
    assert "is not a directory" in jars([repository.publish("a:one:1")])["msg"]
    jars.path.unlink()
    (jars.path / "one-1.jar").mkdir(parents=True)
    assert "one-1.jar is a directory" in jars([repository.publish("a:one:1")])["msg"]
