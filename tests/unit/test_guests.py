"""What `guests` does with a container that is in the way: the real script, with LXC's commands replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ansible/scripts/guests"
NAME = "clickstream-unittest-node"
# TCP has no broadcast: a connection fails at once on every machine, as if nobody had the address.
ADDRESS = "255.255.255.255"

# A container is a folder with a file `state`.
COMMANDS = {
    "lxc-config": 'echo "$LXC"',
    "lxc-ls": 'ls "$LXC"',
    "lxc-info": 'cat "$LXC/$3/state"',
    "lxc-stop": 'echo STOPPED >"$LXC/$3/state"',
    "lxc-destroy": 'rm -r "$LXC/$2"',
    "sudo": 'exec "$@"',
}


class Machine:
    """A machine with a container, perhaps another at the same address, two clones and the script's records."""

    def __init__(self, folder: Path) -> None:
        self.lxc, self.records, self.log = folder / "lxc", folder / "records", folder / "log"
        self.container, self.programs = self.lxc / NAME, folder / "bin"
        self.ours, self.other = self.state_id(folder / "ours"), self.state_id(folder / "other")
        for made in (self.lxc, self.records, self.programs):
            made.mkdir()
        self.log.touch()
        for name, text in COMMANDS.items():
            program = self.programs / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >>"$LOG"\n{text}\n')
            program.chmod(0o755)

    @staticmethod
    def state_id(clone: Path) -> Path:
        return clone / ".vagrant/machines/node/lxc/id"

    def make(self, state: str, *, name: str = NAME, whole: bool = True) -> Path:
        container = self.lxc / name
        (container / "rootfs/sbin").mkdir(parents=True)
        (container / "rootfs/sbin/init").touch()
        (container / "state").write_text(f"{state}\n")
        (container / "config").write_text(f"lxc.net.0.ipv4.address = {ADDRESS}/24\n")
        if not whole:
            (container / "partial").touch()
        return container

    def record(self, state_id: Path, *, owned: bool) -> None:
        record = {"clone": str(state_id.parents[4]), "state_id": str(state_id), "test": False}
        (self.records / f"{NAME}.json").write_text(json.dumps(record))
        if owned:
            state_id.parent.mkdir(parents=True)
            state_id.write_text(NAME)

    def guests(self, verb: str) -> subprocess.CompletedProcess[str]:
        identity = {"container": NAME, "address": ADDRESS, "clone": self.ours.parents[4], "state-id": self.ours}
        environment = os.environ | {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "CLICKSTREAM_RECORDS": str(self.records),
            "LXC": str(self.lxc),
            "LOG": str(self.log),
        }
        environment.pop("CLICKSTREAM_TAKEOVER", None)
        return subprocess.run(
            [sys.executable, SCRIPT, verb, *(f"--{name}={value}" for name, value in identity.items())],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def untouched(self) -> bool:
        """Whether the container is there and nobody tried to stop or remove it."""
        log = self.log.read_text()
        return self.container.exists() and "lxc-stop" not in log and "lxc-destroy" not in log


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def recorded(machine: Machine) -> str:
    return str(json.loads((machine.records / f"{NAME}.json").read_text())["state_id"])


def test_a_left_over_without_owner_is_removed(machine: Machine) -> None:
    machine.make("RUNNING")
    machine.record(machine.other, owned=False)
    done = machine.guests("claim")
    assert done.returncode == 0, done.stderr
    assert f"{NAME} was left by {machine.other.parents[4]}, which has forgotten it: removing it" in done.stdout
    assert not machine.container.exists()
    assert recorded(machine) == str(machine.ours)


def test_a_running_guest_of_another_clone_is_refused(machine: Machine) -> None:
    machine.make("RUNNING")
    machine.record(machine.other, owned=True)
    done = machine.guests("claim")
    assert done.returncode != 0
    assert f"{NAME} is running and belongs to another clone: {machine.other.parents[4]}" in done.stderr
    assert machine.untouched and machine.other.read_text() == NAME
    assert recorded(machine) == str(machine.other)


def test_a_container_without_a_record_is_never_touched(machine: Machine) -> None:
    machine.make("RUNNING")
    done = machine.guests("claim")
    assert done.returncode != 0 and "no record of" in done.stderr
    for verb in ("kill", "release"):
        assert machine.guests(verb).returncode == 0
    assert machine.untouched and not list(machine.records.iterdir())


def test_a_whole_guest_outlives_vagrants_state(machine: Machine) -> None:
    machine.make("STOPPED")
    machine.record(machine.ours, owned=False)
    done = machine.guests("claim")
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is whole but Vagrant has lost its state: taking it up again, with its data" in done.stdout
    assert machine.untouched
    # Nothing says that it is provisioned.
    assert [path.name for path in machine.ours.parent.iterdir()] == ["id"]
    assert machine.ours.read_text() == NAME
    # From now on it is a guest like any other.
    again = machine.guests("claim")
    assert (again.returncode, again.stdout) == (0, "") and machine.untouched


@pytest.mark.parametrize("known", [True, False], ids=["known to Vagrant", "unknown to Vagrant"])
def test_a_half_made_guest_is_removed(machine: Machine, known: bool) -> None:
    machine.make("STOPPED", whole=False)
    machine.record(machine.ours, owned=known)
    done = machine.guests("claim")
    assert done.returncode == 0, done.stderr
    assert f"{NAME} was left half made by an interrupted run: removing it" in done.stdout
    assert not machine.container.exists() and not machine.ours.exists()


@pytest.mark.parametrize("state", ["STOPPED", "RUNNING"])
def test_a_guest_starts_only_where_nobody_has_its_address(machine: Machine, state: str) -> None:
    machine.make(state)
    machine.record(machine.ours, owned=True)
    other = machine.make("RUNNING", name="clickstream-mine-node")
    done = machine.guests("claim")
    # One that runs has it already.
    assert (done.returncode == 0) == (state == "RUNNING")
    if state == "STOPPED":
        assert f"the address {ADDRESS} of {NAME} is taken by the container clickstream-mine-node" in done.stderr
    assert machine.untouched and other.exists()


def test_a_guest_of_our_clone_under_another_name_is_no_left_over(machine: Machine) -> None:
    other = machine.make("RUNNING", name="clickstream-mine-node")
    record = {"clone": str(machine.ours.parents[4]), "state_id": str(machine.ours), "test": False}
    (machine.records / f"{other.name}.json").write_text(json.dumps(record))
    machine.ours.parent.mkdir(parents=True)
    machine.ours.write_text(other.name)
    done = machine.guests("claim")
    assert done.returncode != 0 and f"is taken by the container {other.name}" in done.stderr
    assert other.exists() and machine.ours.read_text() == other.name


def test_a_guest_that_was_not_destroyed_after_all_stays(machine: Machine) -> None:
    machine.make("RUNNING")
    machine.record(machine.ours, owned=True)
    assert machine.guests("release").returncode == 0
    assert machine.untouched and recorded(machine) == str(machine.ours)


def test_what_vagrant_has_forgotten_is_released(machine: Machine) -> None:
    machine.make("RUNNING")
    machine.record(machine.ours, owned=False)
    done = machine.guests("release")
    assert done.returncode == 0, done.stderr
    assert f"{NAME} is unknown to Vagrant: removing it" in done.stdout
    assert not machine.container.exists() and not list(machine.records.iterdir())
