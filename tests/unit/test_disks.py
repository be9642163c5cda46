"""The role `common` on a disk: made once, mounted by a name that stays, data never hidden or formatted away.

On a loop device, in mounts of its own, since a container has no disks.
"""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOK = f"""
- hosts: all
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: {ROOT}/roles/common
        tasks_from: disk
"""


class Disk:
    """An empty disk, and the place where it is to be mounted."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, folder / "by-id"
        self.device.symlink_to(device)
        self.place = folder / "data"
        self.fstab = folder / "fstab"
        self.fstab.touch()
        (folder / "playbook.yml").write_text(PLAYBOOK)

    def mount(self, *then: str, runs: int = 1) -> subprocess.CompletedProcess[str]:
        """Runs the role in mounts of their own, then commands."""
        variables = {
            "common_disk": {"device": str(self.device), "path": str(self.place), "fstype": "ext4"},
            "common_disk_wait": 5,
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        playbook = Path(sys.executable).with_name("ansible-playbook")
        run = f"{playbook} -i localhost, {self.folder}/playbook.yml -e '{json.dumps(variables)}'"
        script = f"set -e; mount --bind {self.fstab} /etc/fstab; {'; '.join([run] * runs + list(then))}"
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            cwd=ROOT,
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("needs root and loop devices")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    made = subprocess.run(["losetup", "--show", "-f", image], capture_output=True, text=True, check=True)
    device = made.stdout.strip()
    try:
        yield Disk(tmp_path, device)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_an_empty_disk_is_made_and_mounted_once(disk: Disk) -> None:
    done = disk.mount(f"findmnt -no FSTYPE {disk.place}", f"touch {disk.place}/written", runs=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ext4"
    first, second = [line for line in done.stdout.splitlines() if "failed=0" in line]
    assert "changed=2" in first, done.stdout
    assert "changed=0" in second, done.stdout
    assert str(disk.device) in disk.fstab.read_text()
    # The machine starts without it, too.
    assert ",nofail,x-systemd.device-timeout=5s" in disk.fstab.read_text()

    # A new machine gets the old disk: what is on it is still there.
    disk.fstab.write_text("")
    again = disk.mount(f"ls {disk.place}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "written" in again.stdout.splitlines()


def test_data_is_not_hidden(disk: Disk) -> None:
    disk.place.mkdir()
    (disk.place / "topic").touch()
    done = disk.mount()
    assert done.returncode != 0
    assert f"{disk.place} of localhost is not empty" in " ".join(done.stdout.split())


def test_a_missing_disk_is_named(disk: Disk) -> None:
    disk.device.unlink()
    done = disk.mount()
    assert done.returncode != 0
    assert f"localhost has no {disk.device}; attach the disk" in " ".join(done.stdout.split())


def test_a_service_does_not_start_without_its_disk(tmp_path: Path) -> None:
    """By the unit of every service: where it writes has to be mounted, if it is to be."""
    role = ROOT / "roles/service"
    service = {
        "service_name": "shop",
        "service_user": "shop",
        "service_exec_start": "/bin/true",
        "service_read_write_paths": ["/var/lib/shop", "-/var/lib/spark/events"],
    }
    subprocess.run(
        [
            *(Path(sys.executable).with_name("ansible"), "localhost", "-m", "template"),
            *("-a", f"src={role}/templates/unit.service.j2 dest={tmp_path}/shop.service"),
            *("-e", f"@{role}/defaults/main.yml", "-e", json.dumps(service)),
        ],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg")},
        check=True,
        capture_output=True,
    )
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    unit.read(tmp_path / "shop.service")
    assert unit["Unit"]["RequiresMountsFor"] == "/var/lib/shop /var/lib/spark/events"
