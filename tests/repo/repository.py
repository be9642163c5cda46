"""What the tests of the repository itself share; none of them needs a guest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Daemons' roles, and those that other roles include.
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "meta/main.yml").exists())


class Loader(yaml.SafeLoader):
    """YAML with Ansible's tags; a tagged text is a text."""


for tag in ("!unsafe", "!vault"):
    Loader.add_constructor(tag, lambda loader, node: str(node.value))


def load(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
