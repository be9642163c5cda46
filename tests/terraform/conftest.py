"""A copy of terraform/ to work in, and a server that stands in for AWS."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from standin import DEBIAN, PLUGINS, ROOT, SERVER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of terraform/, so that neither state nor plugins come into the clone."""
    copy = tmp_path_factory.mktemp("copy") / "terraform"
    shutil.copytree(ROOT / "terraform", copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "*.tfvars"))
    return copy


@pytest.fixture(scope="session")
def modules(files: Path) -> Path:
    """The copy, where there is Terraform to work in it."""
    if shutil.which("terraform") is None:
        pytest.fail("Terraform is not installed here")
    return files


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of Terraform's processes, without anybody's credentials."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "TF_"))}
    env |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
    # Modules share what is downloaded.
    cache = tmp_path_factory.mktemp("plugins")
    env["TF_PLUGIN_CACHE_DIR"] = str(cache)
    if PLUGINS.is_dir():
        config = cache / "terraform.rc"
        # With each command Terraform computes the checksum of 700 MB, for some seconds, unless it is told not to; then
        # `init` still does.
        here = {str(path.parents[1].relative_to(PLUGINS)): str(path) for path in sorted(PLUGINS.glob("*/*/*/*/*"))}
        trusted = "".join(f"    {json.dumps(name)} = {json.dumps(path)}\n" for name, path in here.items())
        config.write_text(
            f"provider_installation {{\n  dev_overrides {{\n{trusted}  }}\n"
            f'  filesystem_mirror {{ path = "{PLUGINS}" }}\n}}\n'
        )
        env["TF_CLI_CONFIG_FILE"] = str(config)
    return env


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory, plain: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of programs that take the stand-in for AWS."""
    folder = tmp_path_factory.mktemp("aws")
    image = {
        "ami_id": DEBIAN,
        "name": "debian-13-amd64-20250814-2205",
        "owner_id": "136693071363",
        "state": "available",
        "public": True,
        "image_location": "amazon/debian-13-amd64-20250814-2205",
        "image_type": "machine",
        "architecture": "x86_64",
        "platform": None,
        "virtualization_type": "hvm",
        "hypervisor": "xen",
        "root_device_type": "ebs",
        "root_device_name": "/dev/xvda",
        "description": "Debian 13",
    }
    others = [
        image
        | {"ami_id": "ami-0000000000000000a", "name": "debian-13-amd64-20250814-2205", "owner_id": "999999999999"},
        image | {"ami_id": "ami-0000000000000000b", "name": "debian-12-amd64-20250814-2205"},
        image | {"ami_id": "ami-0000000000000000c", "name": "debian-13-arm64-20250814-2205", "architecture": "arm64"},
    ]
    (folder / "images.json").write_text(json.dumps([*others, image]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(port)],
            env=plain | {"MOTO_AMIS_PATH": str(folder / "images.json")},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the stand-in for AWS did not start:\n{(folder / 'log').read_text()}")
                time.sleep(0.1)
        key = folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "admin", "-f", key], check=True)
        yield plain | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "TF_VAR_admin_cidrs": '["203.0.113.7/32"]',
            "TF_VAR_admin_public_key": key.with_suffix(".pub").read_text().strip(),
        }
    finally:
        server.terminate()
        server.wait()
