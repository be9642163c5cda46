"""What the guest scripts ask this machine about its processes and ports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def processes() -> Iterator[tuple[int, list[str]]]:
    """Process ids and command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            yield int(entry.name), words


def descendants(pids: list[int]) -> list[int]:
    """These processes and all that they started, as far as their parents live."""
    children: dict[int, list[int]] = {}
    for pid, _ in processes():
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    found = list(pids)
    for pid in found:
        found += [child for child in children.get(pid, []) if child not in found]
    return found


def redirections(address: str) -> dict[tuple[int, int], list[int]]:
    """The processes that lead a port of this machine to one of a guest: {(host port, guest port): ids}.

    redir's command line says all there is to know, so no state can be lost with a clone. It takes its
    arguments apart in place: a:1 b:2 becomes four words."""
    found: dict[tuple[int, int], list[int]] = {}
    for pid, words in processes():
        match " ".join(words).replace(":", " ").split():
            case [program, "-n", "127.0.0.1", host, target, guest] if target == address:
                if Path(program).name == "redir":
                    found.setdefault((int(host), int(guest)), []).append(pid)
    return found


def listeners(port: int) -> list[int]:
    """The processes that listen on a TCP port, as far as the caller may look into them."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) in sockets:
                found.append(int(link.parts[2]))
        except OSError:
            continue
    return found
