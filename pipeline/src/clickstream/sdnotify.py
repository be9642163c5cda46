"""systemd's notification protocol: one datagram to $NOTIFY_SOCKET; nothing at all outside systemd."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator


def notify(message: str) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(message.encode(), address)
    except OSError:
        return False
    return True


class Watchdog:
    """Tells systemd that the main loop goes round, at a quarter of the unit's WatchdogSec; a no-op where it has none.

    The other three quarters are for what cannot ping while it waits, such as a client that looks for its broker.
    """

    def __init__(self) -> None:
        usec = os.environ.get("WATCHDOG_USEC", "")
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._usec = int(usec) if usec.isdigit() and mine else 0
        self._interval = self._usec / 4e6
        self._next = math.inf

    def ready(self) -> None:
        """Says that the service has started. No ping before: the first one starts systemd's clock."""
        notify("READY=1")
        self._next = 0.0

    def ping(self) -> None:
        if self._interval and (now := time.monotonic()) >= self._next:
            self._next = now + self._interval
            notify("WATCHDOG=1")

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        """As `stop.wait`, with the pings that are due meanwhile."""
        end = time.monotonic() + seconds
        while True:
            self.ping()
            left = max(0.0, end - time.monotonic())
            part = min(left, self._interval or left)
            if stop.wait(part) or part == left:
                return stop.is_set()

    @contextlib.contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Around what may take that long without a ping; afterwards the unit's own time counts again."""
        if self._usec:
            notify(f"WATCHDOG_USEC={seconds * 1e6:.0f}")
        yield
        if self._usec:
            notify(f"WATCHDOG_USEC={self._usec}")
