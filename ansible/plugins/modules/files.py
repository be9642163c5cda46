#!/usr/bin/python
"""Ansible module: a set of directories, small files and links in one call."""

# ruff: noqa: E402 - Ansible wants the documentation before the imports
from __future__ import annotations

DOCUMENTATION = r"""
---
module: files
short_description: A set of directories, small files and links
version_added: "0.1.0"
description:
  - Makes the listed paths what they are said to be, in the order of the list.
  - Does what a loop over M(ansible.builtin.file), M(ansible.builtin.copy) and M(ansible.builtin.template) does, in one
    connection instead of two or three for each path. A run that changes nothing is mostly such connections.
  - All entries are checked before the first is written. A file is replaced atomically.
options:
  files:
    description: The paths.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Absolute path.
        type: path
        required: true
      state:
        description: What the path is.
        type: str
        choices: [file, directory, link]
        default: file
      content:
        description: Text of a file. A newline is added at its end when it has none.
        type: str
      target:
        description: What a link points to; relative to the link's folder or absolute. It need not exist.
        type: str
      prune:
        description:
          - When a link changes, remove the releases beside its target, but for that and the one it had before.
          - Releases are folders whose names end with eight hexadecimal digits.
        type: bool
        default: false
      used_by:
        description:
          - What is made anew when a file is put to use, such as a bundle of certificates, or the link
            C(/run/systemd/units/invocation:NAME.service) that systemd makes when a service starts.
          - While it is missing or older than the file, the file counts as changed. A run that was interrupted between
            writing a file and using it is so made up for by the next.
        type: path
      owner:
        description: Owner of a file or directory.
        type: str
        default: root
      group:
        description: Group of a file or directory.
        type: str
        default: root
      mode:
        description: Mode, in octal and quoted. The default is 0644 for files and 0755 for directories.
        type: str
attributes:
  check_mode:
    support: full
    description: Says what would change.
  diff_mode:
    support: full
    description: Shows the text of files before and after. Set C(diff) to false on a task that writes secrets.
author:
  - The clickstream platform
"""

EXAMPLES = r"""
- name: Write the configuration
  files:
    files:
      - path: /etc/kafka
        state: directory
      - path: /etc/kafka/server.properties
        content: "{{ lookup('ansible.builtin.template', 'server.properties.j2') }}"
        group: kafka
        mode: "0640"
      - path: /opt/kafka/current
        state: link
        target: 3.9.2-0a1b2c3d
        prune: true
"""

RETURN = r"""
changed_paths:
  description: The paths that were changed, or would be, and those that were not put to use yet.
  returned: always
  type: list
  elements: str
  sample: [/etc/kafka/server.properties]
"""

import os
import re
import shutil
import stat
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

RELEASE = re.compile(r"(^|.*-)[0-9a-f]{8}$")
KINDS = {"file": stat.S_ISREG, "directory": stat.S_ISDIR, "link": stat.S_ISLNK}


def found(path: str) -> int | None:
    """The type and mode bits of a path itself, None where there is nothing."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return None


def check(module: AnsibleModule, entry: dict[str, Any]) -> None:
    """Refuse what cannot be meant, before anything is written."""
    path, state = entry["path"], entry["state"]
    if not os.path.isabs(path):
        module.fail_json(msg=f"{path}: give an absolute path")
    for name, only in (("used_by", "file"), ("prune", "link")):
        if entry[name] and state != only:
            module.fail_json(msg=f"{path}: a {state} takes no {name}")
    for name, needed in (("content", state == "file"), ("target", state == "link")):
        if (entry[name] is not None) != needed:
            verb = "needs" if needed else "takes no"
            module.fail_json(msg=f"{path}: a {state} {verb} {name}")
    mode = found(path)
    if mode is not None and not KINDS[state](mode) and not (state == "file" and stat.S_ISLNK(mode)):
        module.fail_json(msg=f"{path} exists and is no {state}; move it away first")


def write_file(module: AnsibleModule, path: str, content: str, attributes: dict[str, Any]) -> None:
    """Replace a file by a whole one, which is never open to more readers than it is meant for."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".ansible-")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(content)
        module.set_fs_attributes_if_different(attributes | {"path": temporary}, False)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def prune(path: str, *kept: str) -> None:
    """Remove the releases beside a link's targets."""
    folder = os.path.dirname(os.path.join(os.path.dirname(path), kept[0]))
    names = {os.path.basename(target) for target in kept}
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False) and RELEASE.match(entry.name) and entry.name not in names:
            shutil.rmtree(entry.path)


def ensure(module: AnsibleModule, entry: dict[str, Any], diffs: list[dict[str, str]]) -> bool:
    """Make one path what it is said to be; whether that was a change."""
    path, state = entry["path"], entry["state"]
    mode = found(path)
    if state == "link":
        before = os.readlink(path) if mode is not None else None
        if before == entry["target"]:
            return False
        diffs.append(
            {
                "before_header": path,
                "after_header": path,
                "before": f"-> {before}\n" if before else "",
                "after": f"-> {entry['target']}\n",
            }
        )
        if not module.check_mode:
            # Renamed over the old one, so that no reader ever misses it.
            temporary = f"{path}.{os.getpid()}.new"
            os.symlink(entry["target"], temporary)
            os.replace(temporary, path)
            if before and entry["prune"]:
                prune(path, entry["target"], before)
        return True

    wanted = {
        "path": path,
        "owner": entry["owner"],
        "group": entry["group"],
        "mode": entry["mode"] or ("0755" if state == "directory" else "0644"),
        "secontext": [None, None, None],
        "attributes": None,
    }
    changed = False
    if state == "directory" and mode is None:
        changed = True
        diffs.append({"before_header": path, "after_header": path, "before": "", "after": "directory\n"})
        if not module.check_mode:
            os.makedirs(path, mode=0o755)
    if state == "file":
        content = entry["content"] if entry["content"].endswith("\n") else entry["content"] + "\n"
        before = None
        if mode is not None and stat.S_ISREG(mode):
            with open(path, errors="surrogateescape") as stream:
                before = stream.read()
        if before != content:
            changed = True
            diffs.append({"before_header": path, "after_header": path, "before": before or "", "after": content})
            if not module.check_mode:
                write_file(module, path, content, wanted)
    if changed and module.check_mode:
        return True
    return bool(module.set_fs_attributes_if_different(wanted, changed))


def unused(entry: dict[str, Any]) -> bool:
    """Whether a file waits for being put to use. Copies of a machine keep this time, but not that of the inode."""
    if not entry["used_by"]:
        return False
    try:
        return os.lstat(entry["used_by"]).st_mtime < os.lstat(entry["path"]).st_mtime
    except FileNotFoundError:
        return True


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "state": {"type": "str", "choices": list(KINDS), "default": "file"},
                    "content": {"type": "str"},
                    "target": {"type": "str"},
                    "used_by": {"type": "path"},
                    "prune": {"type": "bool", "default": False},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    entries = module.params["files"]
    for entry in entries:
        check(module, entry)
    diffs: list[dict[str, str]] = []
    changed = []
    for entry in entries:
        try:
            if ensure(module, entry, diffs) or unused(entry):
                changed.append(entry["path"])
        except OSError as error:
            module.fail_json(
                msg=f"{entry['path']}: {error.strerror or error}", changed_paths=changed, changed=bool(changed)
            )
    module.exit_json(changed=bool(changed), changed_paths=changed, diff=diffs)


if __name__ == "__main__":
    main()
