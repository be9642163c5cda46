"""Inventories, locks, the user's verbs, DAGs, and what must not be in any file."""

from __future__ import annotations

import ast
import ipaddress
import re
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from repository import ROLES, ROOT, load

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = set(load(ROOT / "roles/preflight/vars/main.yml")["preflight_groups"])
INVENTORIES = sorted(
    path.parent
    for pattern in ("ansible/inventories/*/hosts.yml", "molecule/*/inventory/hosts.yml", "tests/*/inventory/hosts.yml")
    for path in ROOT.glob(pattern)
)
LOCKS = sorted(
    path
    for pattern in (
        "ansible/requirements*.txt",
        "pipeline/requirements.txt",
        "terraform/requirements.txt",
        "roles/*/files/*requirements.txt",
    )
    for path in ROOT.glob(pattern)
) + sorted(ROOT.glob("roles/*/files/jars.lock"))
# Verbs that a user is promised.
VERBS = {
    *("help", "up", "status", "urls", "produce", "topics", "lag", "logs", "ssh", "restart", "down", "destroy"),
    *("test", "lint", "unit", "molecule", "e2e", "lock"),
}


def tracked() -> list[Path]:
    """Files that a clone has, or will have once committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


# --- Inventories -----------------------------------------------------------------------------------------------


def known_variables() -> set[str]:
    return {
        name
        for role in ROLES
        for name in load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    }


def hosts(inventory: Path) -> dict[str, dict[str, Any]]:
    return {name: variables or {} for name, variables in load(inventory / "hosts.yml")["all"]["hosts"].items()}


def groups_of(inventory: Path) -> dict[str, set[str]]:
    children = load(inventory / "hosts.yml")["all"].get("children") or {}
    return {name: set((group or {}).get("hosts") or {}) for name, group in children.items()}


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_inventory_keeps_the_schema(inventory: Path) -> None:
    machines = hosts(inventory)
    assert machines
    for name, variables in machines.items():
        assert ipaddress.ip_address(variables["ansible_host"]), name
    for group, members in groups_of(inventory).items():
        assert group in GROUPS
        assert members <= machines.keys(), f"{group} has hosts that are not listed under all"
    files = [path for path in sorted(inventory.glob("group_vars/**/*.yml")) if path.is_file()]
    assert files, "an inventory says how its machines are reached"
    names = {name for path in files for name in load(path) or {}}
    names |= {name for variables in machines.values() for name in variables}
    assert {name for name in names if not name.startswith("ansible_")} <= known_variables()


def test_topologies_name_every_group() -> None:
    for inventory in ROOT.glob("ansible/inventories/*/hosts.yml"):
        assert groups_of(inventory.parent).keys() == GROUPS, inventory


def test_guests_of_different_inventories_can_run_at_once() -> None:
    addresses = Counter(str(host["ansible_host"]) for inventory in INVENTORIES for host in hosts(inventory).values())
    assert [address for address, count in addresses.items() if count > 1] == []
    # A guest's full name begins with its inventory's, which is that of the folder of the topology or scenario.
    names = [path.parent.name if path.name == "inventory" else path.name for path in INVENTORIES]
    assert len(names) == len(set(names))


# --- Artifacts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_locks_name_no_server(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE), "no options: the mirror is a variable"


def test_registries_are_named_in_defaults_only() -> None:
    registry = re.compile(
        r"repo1\.maven\.org|repo\.maven\.apache\.org|pypi\.org|files\.pythonhosted\.org|deb\.debian\.org"
    )
    allowed = re.compile(
        # Defaults of roles, of a module's option and of the image builder; what documents or tests them.
        r"^roles/[^/]+/(defaults/main|meta/argument_specs)\.yml$|^ansible/plugins/modules/|^ansible/scripts/build-box$"
        r"|\.md$|^tests/"
    )
    found = []
    for path in tracked():
        name = str(path.relative_to(ROOT))
        if allowed.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match[0]}" for match in registry.finditer(text)]
    assert found == []


# --- The user's verbs ------------------------------------------------------------------------------------------


def listed_verbs() -> dict[str, str]:
    """What `make help` lists: verb to help text."""
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(re.findall(r"^  make (\S+) +(\S.*)$", done.stdout, re.MULTILINE))


def test_make_help_lists_every_verb() -> None:
    verbs = listed_verbs()
    assert verbs.keys() >= VERBS
    assert all(text.strip() for text in verbs.values())
    rules = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert rules == verbs.keys(), "every rule has a help text"
    phony = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert phony == rules


def test_readme_explains_every_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"make ([a-z][a-z0-9-]*)", text))
    verbs = listed_verbs().keys()
    assert sorted(verbs - named) == [], "not in the README"
    # `make` followed by a verb in code, not in a sentence.
    in_code = set(re.findall(r"`make ([a-z][a-z0-9-]*)|^(?:\$ )?make ([a-z][a-z0-9-]*)", text, re.MULTILINE))
    assert sorted({first or second for first, second in in_code} - verbs) == [], "in the README but not in the Makefile"


def test_readme_has_no_placeholder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if "@@" in line] == []


# --- DAGs ------------------------------------------------------------------------------------------------------

# Every process that parses DAGs imports what they import at their top level, every half minute.
LIGHT = {"airflow", "pendulum"} | set(sys.stdlib_module_names)
# What the DAGs share, and Airflow does not read as DAGs.
SHARED = {"delivery", "orchestration"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("dags/**/*.py")), ids=lambda path: path.name)
def test_dags_import_nothing_heavy(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= LIGHT | SHARED
    assert ast.get_docstring(tree)
    ignored = (ROOT / "dags/.airflowignore").read_text(encoding="utf-8")
    assert (path.stem in SHARED) == (rf"^{path.stem}\.py$" in ignored)
    # Thin: the logic is in the package, where it is tested.
    heavy = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.For | ast.While | ast.Try)]
    assert path.stem in SHARED or not heavy


# --- Pools -----------------------------------------------------------------------------------------------------


def test_pools_say_all_that_spark_would_warn_about() -> None:
    text = (ROOT / "pipeline/src/clickstream/pools.xml").read_text(encoding="utf-8")
    pools = re.findall(r"<pool .*?</pool>", text, re.DOTALL)
    assert len(pools) == text.count("<pool ")
    for pool in pools:
        assert set(re.findall(r"<(\w+)>", pool)) == {"schedulingMode", "weight", "minShare"}, pool
