"""Refuse inventory variables that no role knows or whose type is wrong, and misspelt groups.

The allowed names and their types are the roles' own argument specifications
(<roles_dir>/*/meta/argument_specs.yml), so there is no second list to keep. Runs on the control node and opens
no connection. Only variables that are set somewhere (inventory, group_vars, -e) are looked at; defaults are the
roles' business.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase

# Variables that Ansible itself defines and that do not begin with ansible_.
MAGIC = {
    "environment",
    "group_names",
    "groups",
    "hostvars",
    "inventory_dir",
    "inventory_file",
    "inventory_hostname",
    "inventory_hostname_short",
    "omit",
    "play_hosts",
    "playbook_dir",
    "role_name",
    "role_names",
    "role_path",
    "vars",
}


def without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The specification with names and types only: defaults are templates, and required is for the role to say."""
    kept: dict[str, Any] = {}
    for name, option in options.items():
        kept[name] = {key: option[key] for key in ("type", "elements", "choices") if key in option}
        if "options" in option:
            kept[name]["options"] = {
                inner: {key: spec[key] for key in ("type", "elements", "choices", "required") if key in spec}
                for inner, spec in option["options"].items()
            }
    return kept


class ActionModule(ActionBase):  # type: ignore[misc]
    """check_inventory: roles_dir=<folder of the roles> groups=<the groups that playbooks use>."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _VALID_ARGS = frozenset(("roles_dir", "groups"))

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check this host's variables; fail with one line per finding."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        assert task_vars is not None
        options: dict[str, Any] = {}
        for path in sorted(Path(self._task.args["roles_dir"]).glob("*/meta/argument_specs.yml")):
            specification = self._loader.load_from_file(str(path))
            options |= without_defaults(specification["argument_specs"]["main"]["options"])
        mine = task_vars["hostvars"][task_vars["inventory_hostname"]]
        known = set(self._task.args.get("groups", []))
        findings = []
        for group in sorted(set(task_vars["groups"]) - known - {"all", "ungrouped"}):
            # A site may have groups of its own; one that is almost ours is a mistake that would leave hosts out.
            if close := difflib.get_close_matches(group, known, n=1, cutoff=0.8):
                findings.append(f"the group {group} is not used by any role: did you mean {close[0]}?")
        for name in sorted(mine):
            if name.startswith(("ansible_", "molecule_")) or name in MAGIC:
                continue
            if name not in options:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f"did you mean {close[0]}?" if close else "remove it; roles/*/README.md list what there is."
                findings.append(f"{name} is not a variable of any role: {hint}")
                continue
            checked = ArgumentSpecValidator({name: options[name]}).validate({name: mine[name]})
            findings += [f"{name}: {message}" for message in checked.error_messages]
        if findings:
            raise AnsibleActionFail(f"{task_vars['inventory_hostname']}: " + "; ".join(findings))
        result["changed"] = False
        return result
