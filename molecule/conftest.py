"""Shared by the tests of all scenarios: what a failed test shows, and how tests wait."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from testinfra.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

# What a reader of a failure asks first. A service that is active but unhealthy is not among the failed
# units, so nodectl's opinion decides as well.
STATE_OF_THE_GUEST = r"""
nodectl status 2>&1
units=$(systemctl list-units --failed --plain --no-legend | cut -d' ' -f1)
for name in $(ls /etc/nodectl/services.d 2>/dev/null); do
  name=${name%.json}
  nodectl health "$name" >/dev/null 2>&1 ||
    units="$units $(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["unit"])' \
      "/etc/nodectl/services.d/$name.json")"
done
for unit in $(printf '%s\n' $units @others@ | sort -u); do
  printf '\n--- journal of %s\n' "$unit"
  journalctl --unit "$unit" --boot --no-pager --lines 60 --output short-iso
done
"""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the guest's state and the journals of its broken services to the report of a failed test."""
    outcome: Any = yield
    report = outcome.get_result()
    host = getattr(item, "funcargs", {}).get("host")
    if report.when == "call" and report.failed and host is not None:
        # A test module may name journals that are worth reading though their services are healthy.
        others = " ".join(getattr(getattr(item, "module", None), "JOURNALS", ()))
        state = host.run("sh -c %s", STATE_OF_THE_GUEST.replace("@others@", others))
        report.sections.append(("state of the guest", state.stdout + state.stderr))


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], T], float], T]:
    """Wait until a condition holds and return its (true) value; the condition may fail until then."""

    def wait(condition: Callable[[], T], timeout: float = 60) -> T:
        deadline = time.monotonic() + timeout
        while True:
            try:
                value = condition()
                if value:
                    return value
                problem: object = value
            except AssertionError as error:
                problem = error
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout:.0f} s: {problem}")
            time.sleep(0.5)

    return wait


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def deploy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Bring the scenario's guests to another value of some variables of a role."""
    playbook = tmp_path_factory.mktemp("deploy") / "playbook.yml"

    def run(role: str, **edit: Any) -> None:
        playbook.write_text(json.dumps([{"hosts": "all", "become": True, "roles": [role]}]))
        inventory = request.path.parents[1] / "inventory"
        done = subprocess.run(
            ["ansible-playbook", "-i", inventory, playbook, "-e", json.dumps(edit)],
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def processes(host: Host) -> Callable[[], dict[str, str]]:
    """The main process of each of the node's services."""

    def ask() -> dict[str, str]:
        names = host.check_output("nodectl list").split()
        return {name: host.check_output("systemctl show --property MainPID --value %s", name) for name in names}

    return ask


@pytest.fixture(scope="module")
def address(host: Host) -> str:
    """The guest's address, as the inventory has it."""
    return str(host.ansible.get_variables()["ansible_host"])
