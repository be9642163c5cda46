"""The Vagrantfile: that it reads an inventory as Ansible does, and is valid with each provider. No guest is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from repository import ROOT
from test_layout import INVENTORIES

pytestmark = pytest.mark.skipif(not shutil.which("vagrant"), reason="Vagrant is not installed: make prepare")

READER = """
require 'json'
require ARGV[0]
puts JSON.generate(Inventory.new(ARGV[1], '/').hosts.to_h { |host| [host.name, host.vars] })
"""


def as_vagrant(inventory: Path) -> dict[str, dict[str, Any]]:
    command = ["ruby", "-e", READER, str(ROOT / "ansible/scripts/inventory.rb"), str(inventory)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def as_ansible(inventory: Path) -> dict[str, dict[str, Any]]:
    command = [str(ROOT / ".venv/bin/ansible-inventory"), "-i", str(inventory), "--list"]
    environment = os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible/ansible.cfg")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    return dict(json.loads(done.stdout)["_meta"]["hostvars"])


# Those of the scenarios have nothing that these have not.
SOME = [path for path in INVENTORIES if not path.is_relative_to(ROOT / "molecule")]


@pytest.mark.parametrize("inventory", SOME, ids=lambda path: str(path.relative_to(ROOT)))
def test_inventories_read_the_same(inventory: Path) -> None:
    assert as_vagrant(inventory) == as_ansible(inventory)


def test_precedence_is_that_of_ansible(tmp_path: Path) -> None:
    groups = ["all", "zoo", "early", "inner"]
    sources = [f"{kind} {name}" for kind in ("inline", "group_vars") for name in groups] + [
        "inline node",
        "host_vars node",
    ]

    def variables(source: str) -> dict[str, str]:
        """One variable for each other source, which sets it too."""
        return {" or ".join(sorted((source, other))): source for other in sources}

    # Alphabet and depth disagree, and the host is named far from the groups that it is in by that.
    inventory = tmp_path / "mine"
    children = {
        "zoo": {"vars": variables("inline zoo"), "children": {"early": None}},
        "early": {"vars": variables("inline early"), "children": {"inner": {"hosts": {"node": None}}}},
        "inner": {"vars": variables("inline inner")},
        "empty": None,
    }
    hosts = {"node": variables("inline node"), "other": {"ansible_host": "192.0.2.2"}}
    files = {f"group_vars/{name}.yml": variables(f"group_vars {name}") for name in groups[1:]} | {
        "hosts.yml": {"all": {"vars": variables("inline all"), "hosts": hosts, "children": children}},
        "group_vars/all/some.yml": variables("group_vars all"),
        "group_vars/empty.yml": variables("group_vars all"),
        "host_vars/node.yml": variables("host_vars node"),
    }
    for name, content in files.items():
        (inventory / name).parent.mkdir(parents=True, exist_ok=True)
        (inventory / name).write_text(yaml.safe_dump(content))
    assert as_vagrant(inventory) == as_ansible(inventory)


def vagrant(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with its notes elsewhere, so that it knows of no guest."""
    clean = {name: value for name, value in os.environ.items() if name not in ("TOPOLOGY", "VAGRANT_DEFAULT_PROVIDER")}
    return subprocess.run(
        ["vagrant", *words],
        cwd=ROOT,
        env=clean | {"VAGRANT_DOTFILE_PATH": str(folder / ".vagrant")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("missing", ["ansible_host", "vm_memory"])
def test_a_missing_variable_is_named_with_its_host(tmp_path: Path, missing: str) -> None:
    host = {"ansible_host": "192.0.2.1", "vm_cpus": 1, "vm_memory": 512, "vm_release": "debian13"}
    del host[missing]
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"node": host}}}))
    done = vagrant(tmp_path, "validate", CLICKSTREAM_INVENTORY=str(tmp_path))
    assert done.returncode != 0
    assert f"{tmp_path}/hosts.yml: the host node has no {missing}" in done.stderr
    assert "KeyError" not in done.stdout + done.stderr


# VirtualBox counts as installed when its program tells a version. Vagrant-libvirt is not installed for this: a provider
# of its name makes Vagrant judge boxes, networks and forwarded ports, but not what only the plugin knows.
VBOXMANAGE = "#!/bin/sh\necho 7.0.20r163906\n"
LIBVIRT = """
class StandinProvider < Vagrant.plugin('2', :provider); end
class Standin < Vagrant.plugin('2')
  name 'libvirt'
  provider(:libvirt) { StandinProvider }
end
"""


@pytest.mark.parametrize(("provider", "options"), [("virtualbox", []), ("libvirt", ["--ignore-provider"])])
def test_valid_with_the_providers_that_no_guest_is_made_with(tmp_path: Path, provider: str, options: list[str]) -> None:
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    (programs / "VBoxManage").write_text(VBOXMANAGE)
    (programs / "VBoxManage").chmod(0o755)
    if provider == "libvirt":
        (home / "Vagrantfile").write_text(LIBVIRT)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "VAGRANT_HOME": str(home)}
    done = vagrant(tmp_path, "validate", *options, **environment, VAGRANT_DEFAULT_PROVIDER=provider)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Vagrantfile validated successfully" in done.stdout


def test_guests_keep_the_provider_that_made_them(tmp_path: Path) -> None:
    machine = tmp_path / "machines/node/lxc"
    environment = {"VAGRANT_DOTFILE_PATH": str(tmp_path), "VAGRANT_DEFAULT_PROVIDER": "virtualbox"}

    def provider() -> str:
        command = [ROOT / "ansible/scripts/provider"]
        return subprocess.check_output(command, env=os.environ | environment, text=True).strip()

    machine.mkdir(parents=True)
    assert provider() == "virtualbox"
    (machine / "id").write_text("clickstream-single-node")
    assert provider() == "lxc"
