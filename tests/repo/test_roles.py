"""Every role keeps the role contract: files, variables, secrets, documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pytest
import yaml

from repository import ROLES, ROOT, load

if TYPE_CHECKING:
    from collections.abc import Iterator

# Checks the site before any role runs: all of it is a preflight.
PREFLIGHT = "preflight"
# Included by other roles, which run their preflight and prove their health.
INTERNAL = {"preflight", "python_env", "service"}
SECRET = re.compile(r"password|secret|fernet_key")


def role(name: str) -> Path:
    return ROOT / "roles" / name


def options(name: str) -> dict[str, Any]:
    specification = load(role(name) / "meta/argument_specs.yml")["argument_specs"]["main"]
    assert specification["short_description"]
    return dict(specification["options"])


def tasks(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All tasks of a role, those in blocks too."""

    def walk(path: Path, found: list[dict[str, Any]]) -> Iterator[tuple[Path, dict[str, Any]]]:
        for task in found:
            yield path, task
            for part in ("block", "rescue", "always"):
                yield from walk(path, task.get(part, []))

    for path in sorted((role(name) / "tasks").glob("*.yml")):
        yield from walk(path, load(path))


def undescribed(found: dict[str, Any], prefix: str = "") -> list[str]:
    """Options without a type or a description, those inside others too."""
    names = []
    for name, option in found.items():
        if not option.get("type") or not str(option.get("description", "")).strip():
            names.append(prefix + name)
        names += undescribed(option.get("options", {}), f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("name", ROLES)
def test_files_of_the_contract(name: str) -> None:
    wanted = ["defaults/main.yml", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml", "README.md"]
    if name != PREFLIGHT:
        wanted.append("tasks/preflight.yml")
    assert [path for path in wanted if not (role(name) / path).is_file()] == []
    if name != PREFLIGHT:
        first = load(role(name) / "tasks/main.yml")[0]
        assert first["ansible.builtin.import_tasks"] == "preflight.yml", "variables are checked before anything else"


@pytest.mark.parametrize("name", ROLES)
def test_specification_says_what_the_defaults_are(name: str) -> None:
    # Variables of the site have no default: what a role does without them is in the role's own variable.
    specified = {
        key: option["default"]
        for key, option in options(name).items()
        if name != PREFLIGHT or key.startswith(f"{PREFLIGHT}_")
    }
    assert specified == load(role(name) / "defaults/main.yml")


@pytest.mark.parametrize("name", ROLES)
def test_variables_are_described_and_prefixed(name: str) -> None:
    assert undescribed(options(name)) == []
    names = set(load(role(name) / "defaults/main.yml"))
    if (role(name) / "vars/main.yml").exists():
        names |= set(load(role(name) / "vars/main.yml"))
    assert [variable for variable in sorted(names) if not variable.startswith(f"{name}_")] == []


@pytest.mark.parametrize("name", ROLES)
def test_secrets_are_not_logged_and_have_an_inventory_of_their_own(name: str) -> None:
    for key, option in options(name).items():
        secret = SECRET.search(key) or SECRET.search(str(option.get("default", "")))
        assert bool(option.get("no_log")) == bool(secret), key
        if secret:
            assert "inventory_dir ~ '/secrets/" in str(option["default"]), key


def secret_variables() -> set[str]:
    return {key for name in ROLES for key, option in options(name).items() if option.get("no_log")}


QUOTE = r"""\\?['"]"""
LOOKUP = re.compile(
    rf"""\b(?:lookup|query|q)\(\s*{QUOTE}(?:ansible\.builtin\.)?template{QUOTE}\s*,\s*{QUOTE}([^'"\\]+)"""
)


@dataclass(frozen=True)
class Written:
    """A file that a task writes, as far as the task's text says."""

    name: str  # the template's, or the file's own where its content is in the task
    content: str
    mode: str | None


def text_of(name: str, template: str) -> str:
    return (role(name) / "templates" / template).read_text(encoding="utf-8")


def templates_of(task: dict[str, Any]) -> list[str]:
    """The files that a task writes with the module template, when its source is a loop's item too."""
    source = str(task.get("ansible.builtin.template", {}).get("src", ""))
    if "{{" not in source:
        return [source] if source else []
    items = task["loop"]
    assert isinstance(items, list), task["name"]
    return [
        source.replace("{{ item }}", str(item)).replace(
            "{{ item.src }}", str(item.get("src")) if isinstance(item, dict) else ""
        )
        for item in items
    ]


def written_by(name: str, task: dict[str, Any]) -> list[Written]:
    """All that a task writes from templates or from its own text."""
    mode = task.get("ansible.builtin.template", {}).get("mode")
    found = [Written(template, text_of(name, template), mode) for template in templates_of(task)]
    entries = task.get("files", {}).get("files", [])
    for entry in entries if isinstance(entries, list) else []:
        content = str(entry.get("content", ""))
        templates = LOOKUP.findall(content) or [Path(entry["path"]).name]
        texts = [text_of(name, template) for template in LOOKUP.findall(content)]
        found.append(Written(templates[0], "\n".join([content, *texts]), entry.get("mode")))
    # What is looked up elsewhere, say in an expression that makes the list, has no mode that could be read here.
    own = {key: value for key, value in task.items() if key not in ("block", "rescue", "always")}
    seen = {template for entry in found for template in (entry.name, *LOOKUP.findall(entry.content))}
    elsewhere = [template for template in LOOKUP.findall(str(own)) if template not in seen]
    return found + [Written(template, text_of(name, template), None) for template in elsewhere]


def files_with_secrets(name: str) -> Iterator[tuple[str, dict[str, Any], Written]]:
    secrets = re.compile(r"\b(" + "|".join(sorted(secret_variables())) + r")\b")
    for path, task in tasks(name):
        for file in written_by(name, task):
            if secrets.search(file.content):
                yield f"{path.relative_to(ROOT)}: {task['name']}: {file.name}", task, file


@pytest.mark.parametrize("name", ROLES)
def test_files_with_secrets_show_no_diff_and_are_not_for_everyone(name: str) -> None:
    for where, task, file in files_with_secrets(name):
        assert task.get("diff") is False, f"{where} needs diff: false"
        # This module's arguments are the text; those of the module template are but its path.
        assert task.get("no_log") is True or "ansible.builtin.template" in task, f"{where} needs no_log: true"
        assert file.mode == "0640", where


def test_files_with_secrets_are_found() -> None:
    names = {file.name.removesuffix(".j2") for name in ROLES for _, _, file in files_with_secrets(name)}
    assert names >= {"airflow.env", "admin.json", "pg_service.conf"}


@pytest.mark.parametrize("name", ROLES)
def test_no_secret_on_a_command_line(name: str) -> None:
    secrets = re.compile(r"\b(" + "|".join(sorted(secret_variables())) + r")\b")
    for path, task in tasks(name):
        for module in ("ansible.builtin.command", "ansible.builtin.shell"):
            assert not secrets.search(str(task.get(module, ""))), f"{path.relative_to(ROOT)}: {task['name']}"
        for variable in ("service_exec_start", "service_exec_start_pre", "service_environment"):
            assert not secrets.search(str(task.get("vars", {}).get(variable, ""))), f"{path}: {variable}"


def holding_secrets() -> re.Pattern[str]:
    """Variables with secrets, those that are made of them too."""
    made = {
        key: str(value)
        for name in ROLES
        for file in ("defaults/main.yml", "vars/main.yml")
        if (role(name) / file).exists()
        for key, value in load(role(name) / file).items()
    }
    found = secret_variables()
    while True:
        pattern = re.compile(r"\b(" + "|".join(sorted(found)) + r")\b")
        more = {key for key, value in made.items() if pattern.search(value)} - found
        if not more:
            return pattern
        found |= more


def items_of(task: dict[str, Any]) -> str:
    """The expressions of which a task's loop makes its items, without those that give names, true or false only."""
    items = task.get("loop", [value for key, value in task.items() if key.startswith("with_")])
    if isinstance(items, list):
        items = [
            {key: value for key, value in item.items() if key != "that"} if isinstance(item, dict) else item
            for item in items
        ]
    expressions = " ".join(re.findall(r"{{.*?}}", str(items), re.DOTALL))
    return re.sub(r"\w+ \| map\(attribute=\\?'name\\?'\)|\w+\.keys\(\)", "", expressions)


@pytest.mark.parametrize("name", ROLES)
def test_no_loop_shows_a_secret(name: str) -> None:
    # A task that fails prints its item, whatever its label is.
    secrets = holding_secrets()
    for path, task in tasks(name):
        shown = secrets.search(items_of(task))
        assert not shown or task.get("no_log") is True, f"{path.relative_to(ROOT)}: {task['name']}: {shown}"


def test_loops_with_secrets_are_found() -> None:
    assert holding_secrets().search(items_of({"loop": "{{ postgres_users }}"}))
    assert holding_secrets().search(
        items_of({"loop": ["{{ airflow_own_connections | combine(airflow_connections) }}"]})
    )
    assert not holding_secrets().search(items_of({"loop": "{{ postgres_users | map(attribute='name') }}"}))


@pytest.mark.parametrize("name", ROLES)
def test_readme_has_an_example_that_parses(name: str) -> None:
    text = (role(name) / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    examples = [yaml.safe_load(found) for found in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    plays = [play for example in examples if isinstance(example, list) for play in example]
    used = {
        entry["role"] if isinstance(entry, dict) else entry for play in plays for entry in play.get("roles", [])
    } | {play.get("ansible.builtin.include_role", {}).get("name") for play in plays}
    assert name in used
    # What it names exists.
    variables = set(options(name)) | set(load(role(PREFLIGHT) / "vars/main.yml")["preflight_groups"])
    for variable in re.findall(rf"`({name}_\w+)`", text):
        assert variable in variables or name in INTERNAL, f"{variable} is not a variable of this role"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (role(name) / link).exists(), link


@pytest.mark.parametrize("name", ROLES)
def test_every_role_with_a_service_has_a_scenario(name: str) -> None:
    if name not in INTERNAL:
        assert (ROOT / "molecule" / name / "molecule.yml").is_file()


def test_the_sites_certificates_are_trusted_before_anything_is_downloaded() -> None:
    found = [task for path, task in tasks("common") if path.name == "install.yml"]
    names = [task["name"] for task in found]
    first = next(index for index, task in enumerate(found) if "ansible.builtin.apt" in task)
    assert names.index("Trust the site's CA certificates") < names.index("Rebuild the CA bundle") < first
    # Where nothing makes a bundle yet, apt is told of them by itself.
    (block,) = [task for task in found if "block" in task]
    assert block["environment"] == "{{ common_apt_environment }}"
    assert [task["name"] for task in found if "ansible.builtin.apt" in task] == [
        task["name"] for task in block["block"]
    ]


# --- Templates -------------------------------------------------------------------------------------------------


class Anything(jinja2.ChainableUndefined):
    """Stands for each variable: the test is about the text around it."""

    def __str__(self) -> str:
        return "value"

    def __float__(self) -> float:  # type: ignore[override]
        return 1.0


class Filters(dict[str, Any]):
    """Ansible's filters, none of which matters here."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Any:
        return lambda *arguments, **options: "value"

    def get(self, name: str, default: Any = None) -> Any:
        return self[name]


def rendered(path: Path) -> str:
    environment = jinja2.Environment(undefined=Anything, trim_blocks=True, keep_trailing_newline=True)
    environment.filters = Filters(environment.filters)
    # An undefined dictionary has one entry, so that the body of a loop is seen too.
    environment.filters["dictsort"] = lambda *_: [("key", "value")]
    return environment.from_string(path.read_text(encoding="utf-8")).render()


PROGRAMS = [
    path
    for path in sorted((ROOT / "roles").glob("*/templates/*.j2"))
    if path.read_text(encoding="utf-8").startswith("#!")
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parts[-3]}/{path.name}")
def test_programs_made_from_templates_parse(path: Path) -> None:
    text = rendered(path)
    if path.name.endswith(".py.j2") or "python" in text.partition("\n")[0]:
        compile(text, str(path), "exec")
        return
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--severity=warning", "--exclude=SC1090,SC1091", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
