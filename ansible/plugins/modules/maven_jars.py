#!/usr/bin/python
"""Ansible module: a directory that holds exactly the jars of a lock."""

from __future__ import annotations

# ruff: noqa: E402 - Ansible wants the documentation before the imports

DOCUMENTATION = r"""
module: maven_jars
short_description: Make a directory hold exactly the jars of a lock
description:
  - Downloads the artifacts of a lock from a Maven repository, in parallel, and verifies the SHA-256 of each.
  - Jars already in the directory are verified on every run. A right one is kept, a wrong one is replaced, and a jar
    that the lock does not name is removed. Files that are not jars are left alone.
  - Nothing in the directory changes before every missing jar has arrived and been verified. A directory that does
    not exist yet appears complete or not at all.
  - Needs nothing but Python on the target. Proxies are taken from the environment (C(HTTPS_PROXY), C(NO_PROXY)),
    certificate authorities from the system and O(ca_bundle).
options:
  path:
    description: The directory, absolute. Its parents are created when missing.
    type: path
    required: true
  lock:
    description:
      - The text of the lock, usually C(lookup('ansible.builtin.file', 'jars.lock')).
      - One C(group:artifact[:classifier]:version sha256) a line; empty lines and lines that start with C(#) are
        skipped.
    type: str
    required: true
  repository_url:
    description:
      - The Maven repository, or a mirror of it. C(http), C(https) and C(file) are supported.
      - A user and password in the URL are sent as basic authentication and kept out of messages.
    type: str
    default: https://repo1.maven.org/maven2
  cache_dir:
    description:
      - A directory, laid out like a Maven repository, to take jars from and to leave them in.
      - Several targets may share it at the same time. What is read from it is verified like a download, and a wrong
        file is replaced. When it cannot be used there is a warning and no more.
    type: path
  threads:
    description: How many jars are fetched at a time.
    type: int
    default: 8
  owner:
    description: The owner of the directory and its jars. Left as it is when not given.
    type: str
  group:
    description: The group of the directory and its jars. Left as it is when not given.
    type: str
  mode:
    description: The permissions of the jars.
    type: str
    default: "0644"
  directory_mode:
    description: The permissions of the directory.
    type: str
    default: "0755"
  ca_bundle:
    description: A PEM file of certificate authorities to trust besides the system's.
    type: path
  timeout:
    description: How many seconds a connection may be silent.
    type: int
    default: 30
  retries:
    description: How often a jar is tried again after a failure that may pass (a time-out, an interrupted transfer,
      HTTP 408, 429 or 5xx). Wrong checksums and missing artifacts fail at once.
    type: int
    default: 4
attributes:
  check_mode:
    support: full
    description: Nothing is downloaded or changed.
  diff_mode:
    support: full
    description: The file names and checksums that come and go.
author:
  - Clickstream platform maintainers
"""

EXAMPLES = r"""
- name: Install Kafka's jars
  maven_jars:
    path: /opt/kafka/3.9.2-1f2e3d4c/libs
    lock: "{{ lookup('ansible.builtin.file', 'jars.lock') }}"

- name: Install them from the company's mirror, through a cache that several guests share
  maven_jars:
    path: /opt/kafka/3.9.2-1f2e3d4c/libs
    lock: "{{ lookup('ansible.builtin.file', 'jars.lock') }}"
    repository_url: https://nexus.example.com/repository/maven-central
    cache_dir: /var/cache/clickstream/maven
    owner: root
    group: root
"""

RETURN = r"""
path:
  description: The directory.
  returned: always
  type: str
  sample: /opt/kafka/3.9.2-1f2e3d4c/libs
jars:
  description: How many jars the lock names.
  returned: always
  type: int
  sample: 105
added:
  description: File names that were missing.
  returned: always
  type: list
  elements: str
replaced:
  description: File names whose content was not the lock's.
  returned: always
  type: list
  elements: str
removed:
  description: Jars that the lock does not name.
  returned: always
  type: list
  elements: str
from_cache:
  description: How many jars came from O(cache_dir).
  returned: always
  type: int
downloaded:
  description: How many jars came from O(repository_url).
  returned: always
  type: int
downloaded_bytes:
  description: The size of what was downloaded.
  returned: always
  type: int
"""

import base64
import contextlib
import functools
import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from ansible.module_utils.basic import AnsibleModule

PART = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
LINE = re.compile(
    rf"^(?P<group>{PART}):(?P<artifact>{PART}):(?:(?P<classifier>{PART}):)?(?P<version>{PART})"
    r"\s+(?P<sha256>[0-9a-f]{64})$"
)
CHUNK = 1 << 20
STAGING = ".maven_jars-"
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}


class JarError(Exception):
    """A failure that names its artifact and what to do about it."""


class LockError(Exception):
    """The lock cannot be read."""


@dataclass(frozen=True)
class Jar:
    coordinates: str
    relative: str  # its path in a Maven repository
    sha256: str

    @property
    def name(self) -> str:
        return self.relative.rpartition("/")[2]


def parse_lock(text: str) -> list[Jar]:
    jars: list[Jar] = []
    lines: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.match(line)
        if match is None or ".." in line:
            raise LockError(
                f"lock line {number} is malformed: {line!r}. "
                "Expected 'group:artifact[:classifier]:version sha256' with 64 lower-case hexadecimal digits."
            )
        group, artifact, classifier, version, sha256 = match.group(
            "group", "artifact", "classifier", "version", "sha256"
        )
        if version.endswith("-SNAPSHOT"):
            raise LockError(f"lock line {number}: {artifact} {version} is a snapshot, which cannot be locked.")
        name = f"{artifact}-{version}{'-' + classifier if classifier else ''}.jar"
        if name in lines:
            raise LockError(f"lock line {number}: {name} is on line {lines[name]} already.")
        lines[name] = number
        coordinates = ":".join(part for part in (group, artifact, classifier, version) if part)
        jars.append(Jar(coordinates, f"{group.replace('.', '/')}/{artifact}/{version}/{name}", sha256))
    if not jars:
        raise LockError("lock names no jar: give the content of a jars.lock, not its path.")
    return jars


def digest_of(path: str) -> str | None:
    """SHA-256 of a regular file, None for anything else."""
    if os.path.islink(path) or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_verified(source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    while block := source.read(CHUNK):
        digest.update(block)
        target.write(block)
        size += len(block)
    return digest.hexdigest(), size


def resolve_names_once() -> None:
    """Make this process ask for a host's addresses once.

    A hundred jars on eight threads are bursts of equal questions; a resolver that drops one of them costs its
    time-out of five seconds, again and again.
    """
    resolve = functools.cache(socket.getaddrinfo)
    lock = threading.Lock()

    def resolve_one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return resolve(*args, **kwargs)

    socket.getaddrinfo = resolve_one_at_a_time


class Repository:
    """Where jars are downloaded from."""

    def __init__(self, url: str, ca_bundle: str | None, timeout: int, retries: int) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https", "file") or (parts.scheme != "file" and not parts.hostname):
            raise JarError(f"repository_url {url!r} is not an http, https or file URL.")
        host = parts.netloc.rpartition("@")[2]
        self.base = urllib.parse.urlunsplit(parts._replace(netloc=host)).rstrip("/")
        self.headers = {"User-Agent": "ansible-maven-jars"}
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self.timeout = timeout
        self.retries = retries
        # One context for all threads: reading the system's authorities costs more than a small jar.
        context = ssl.create_default_context()
        if ca_bundle:
            try:
                context.load_verify_locations(cafile=ca_bundle)
            except (OSError, ssl.SSLError) as error:
                raise JarError(f"ca_bundle {ca_bundle} cannot be read as PEM certificates: {error}") from error
        self.opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
        self.stop = threading.Event()

    def fetch(self, jar: Jar, target: str) -> int:
        url = f"{self.base}/{urllib.parse.quote(jar.relative)}"
        attempt = 0
        while True:
            if self.stop.is_set():
                raise JarError(f"{jar.coordinates}: not fetched, because another jar failed")
            try:
                request = urllib.request.Request(url, headers=self.headers)
                with self.opener.open(request, timeout=self.timeout) as answer, open(target, "wb") as file:
                    sha256, size = copy_verified(answer, file)
                    expected = answer.headers.get("Content-Length")
                if expected is not None and size != int(expected):
                    raise http.client.IncompleteRead(b"", int(expected) - size)
                break
            except urllib.error.HTTPError as error:
                if error.code not in PASSING_STATUS or attempt >= self.retries:
                    raise JarError(f"{jar.coordinates}: HTTP {error.code} {error.reason} at {url}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, ssl.SSLCertVerificationError):
                    raise JarError(
                        f"{jar.coordinates}: the certificate of {url} is not trusted ({reason.verify_message}). "
                        "Install the site's authority on the target, or name it in ca_bundle."
                    ) from error
                if self.base.startswith("file:") or getattr(error, "filename", None) == target:
                    raise JarError(f"{jar.coordinates}: {url}: {reason}") from error
                if attempt >= self.retries:
                    raise JarError(
                        f"{jar.coordinates}: {url}: {reason!s} ({attempt + 1} attempts). "
                        "Check that the target reaches the repository, and HTTPS_PROXY."
                    ) from error
            attempt += 1
            self.stop.wait(min(0.5 * 2**attempt, 10))
        if sha256 != jar.sha256:
            raise JarError(f"{jar.coordinates}: {url} has SHA-256 {sha256}, the lock has {jar.sha256}")
        return size


class Cache:
    """A shared directory of jars. Every failure in it is a warning: it is never depended upon."""

    def __init__(self, root: str | None) -> None:
        self.root = root
        self.warning: str | None = None

    def _give_up(self, error: OSError) -> None:
        self.warning = f"cache_dir {self.root} is not used: {error}"
        self.root = None

    def take(self, jar: Jar, target: str) -> bool:
        if self.root is None:
            return False
        try:
            with open(os.path.join(self.root, jar.relative), "rb") as source, open(target, "wb") as file:
                return copy_verified(source, file)[0] == jar.sha256
        except FileNotFoundError:
            return False
        except OSError as error:
            self._give_up(error)
            return False

    def give(self, jar: Jar, source: str) -> None:
        if self.root is None:
            return
        final = os.path.join(self.root, jar.relative)
        staged: str | None = None
        try:
            os.makedirs(os.path.dirname(final), exist_ok=True)
            descriptor, staged = tempfile.mkstemp(prefix=".part-", dir=os.path.dirname(final))
            with open(source, "rb") as original, open(descriptor, "wb") as copy:
                shutil.copyfileobj(original, copy, CHUNK)
            os.chmod(staged, 0o644)
            os.replace(staged, final)
        except OSError as error:
            if staged is not None:
                with contextlib.suppress(OSError):
                    os.unlink(staged)
            self._give_up(error)


class Directory:
    """The target directory and the plan that makes it right."""

    def __init__(self, module: AnsibleModule, jars: list[Jar]) -> None:
        self.module = module
        self.path: str = module.params["path"]
        self.jars = {jar.name: jar for jar in jars}
        self.exists = os.path.isdir(self.path)
        present = sorted(name for name in os.listdir(self.path) if name.endswith(".jar")) if self.exists else []
        with ThreadPoolExecutor(module.params["threads"]) as pool:
            digests = pool.map(digest_of, [os.path.join(self.path, name) for name in present])
            self.present = dict(zip(present, digests, strict=True))
        for name in present:
            if os.path.isdir(os.path.join(self.path, name)) and not os.path.islink(os.path.join(self.path, name)):
                module.fail_json(msg=f"{self.path}/{name} is a directory; remove it, a jar has to be there.")
        self.added = sorted(self.jars.keys() - self.present.keys())
        self.removed = sorted(self.present.keys() - self.jars.keys())
        self.replaced = sorted(
            name for name in self.jars.keys() & self.present.keys() if self.present[name] != self.jars[name].sha256
        )

    @property
    def wanted(self) -> list[Jar]:
        return [self.jars[name] for name in self.added + self.replaced]

    @property
    def diff(self) -> dict[str, str]:
        def listing(content: dict[str, str | None]) -> str:
            return "".join(f"{name} {sha256 or '(not a file)'}\n" for name, sha256 in sorted(content.items()))

        header = {"before_header": self.path, "after_header": self.path}
        locked = {name: jar.sha256 for name, jar in self.jars.items()}
        return {**header, "before": listing(self.present), "after": listing({**locked})}

    def attributes(self, path: str, mode: str) -> bool:
        changed: bool = self.module.set_mode_if_different(path, mode, False)
        changed = self.module.set_owner_if_different(path, self.module.params["owner"], changed)
        return bool(self.module.set_group_if_different(path, self.module.params["group"], changed))

    def own(self, folder: str, names: list[str]) -> bool:
        changes = [self.attributes(os.path.join(folder, name), self.module.params["mode"]) for name in names]
        changes.append(self.attributes(folder, self.module.params["directory_mode"]))
        return any(changes)

    def stage(self) -> str:
        """A folder on the same filesystem: inside an existing directory, beside one that is still to come."""
        if self.exists:
            parent, prefix = self.path, STAGING
        else:
            parent, prefix = os.path.dirname(self.path), f"{STAGING}{os.path.basename(self.path)}-"
            os.makedirs(parent, exist_ok=True)
        for leftover in os.listdir(parent):  # of a run that was killed
            if leftover.startswith(prefix):
                shutil.rmtree(os.path.join(parent, leftover), ignore_errors=True)
        return tempfile.mkdtemp(prefix=prefix, dir=parent)

    def publish(self, staging: str) -> None:
        self.own(staging, self.added + self.replaced)
        if not self.exists:
            os.rename(staging, self.path)
            return
        for name in self.added + self.replaced:
            os.replace(os.path.join(staging, name), os.path.join(self.path, name))
        for name in self.removed:
            os.unlink(os.path.join(self.path, name))


def fetch_all(wanted: list[Jar], staging: str, cache: Cache, repository: Repository, threads: int) -> dict[str, int]:
    """Fetch into the staging folder; raise one error that tells of every failure."""

    def fetch(jar: Jar) -> int | None:
        target = os.path.join(staging, jar.name)
        if cache.take(jar, target):
            return None
        try:
            size = repository.fetch(jar, target)
        except JarError:
            repository.stop.set()
            raise
        cache.give(jar, target)
        return size

    sizes: list[int | None] = []
    failures: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(fetch, jar) for jar in wanted]
        for future in futures:
            try:
                sizes.append(future.result())
            except JarError as error:
                failures.append(str(error))
    if failures:
        causes = [failure for failure in failures if not failure.endswith("because another jar failed")]
        raise JarError(
            f"{'; '.join(causes)}. Nothing was changed. Either repository_url is not a faithful mirror of Maven "
            "Central, or the lock is wrong (renew it with `make lock`)."
        )
    downloads = [size for size in sizes if size is not None]
    return {
        "downloaded": len(downloads),
        "downloaded_bytes": sum(downloads),
        "from_cache": len(sizes) - len(downloads),
    }


def run(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    path = params["path"] = os.path.normpath(params["path"])
    if not os.path.isabs(path) or path == "/":
        raise JarError(f"path {params['path']!r} has to be an absolute directory other than /.")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise JarError(f"path {path} exists and is not a directory.")
    if not 1 <= params["threads"] <= 64:
        raise JarError(f"threads is {params['threads']}; it has to be from 1 to 64.")
    if params["retries"] < 0 or params["timeout"] < 1:
        raise JarError("retries has to be at least 0 and timeout at least 1.")
    jars = parse_lock(params["lock"])
    repository = Repository(params["repository_url"], params["ca_bundle"], params["timeout"], params["retries"])
    directory = Directory(module, jars)
    fetched = {"downloaded": 0, "downloaded_bytes": 0, "from_cache": 0}
    changed = bool(directory.added or directory.replaced or directory.removed)

    if changed and not module.check_mode:
        cache = Cache(params["cache_dir"])
        staging = directory.stage()
        try:
            fetched = fetch_all(directory.wanted, staging, cache, repository, params["threads"])
            directory.publish(staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if cache.warning:
            module.warn(cache.warning)
    if directory.exists:
        kept = sorted(name for name in directory.jars if os.path.exists(os.path.join(path, name)))
        changed = directory.own(path, kept) or changed

    return {
        "changed": changed,
        "path": path,
        "jars": len(jars),
        "added": directory.added,
        "replaced": directory.replaced,
        "removed": directory.removed,
        "diff": directory.diff,
        **fetched,
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "lock": {"type": "str", "required": True},
            "repository_url": {"type": "str", "default": "https://repo1.maven.org/maven2"},
            "cache_dir": {"type": "path"},
            "threads": {"type": "int", "default": 8},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "mode": {"type": "str", "default": "0644"},
            "directory_mode": {"type": "str", "default": "0755"},
            "ca_bundle": {"type": "path"},
            "timeout": {"type": "int", "default": 30},
            "retries": {"type": "int", "default": 4},
        },
        supports_check_mode=True,
    )
    resolve_names_once()
    try:
        result = run(module)
    except (JarError, LockError) as error:
        module.fail_json(msg=str(error))
    except OSError as error:
        module.fail_json(msg=f"{module.params['path']}: {error}")
    else:
        module.exit_json(**result)


if __name__ == "__main__":
    main()
