"""systemd's notification protocol: one datagram to $NOTIFY_SOCKET; nothing at all outside systemd."""

from __future__ import annotations

import os
import socket
import time


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
    """Pings systemd at half of the unit's WatchdogSec; a no-op where the unit has none."""

    def __init__(self) -> None:
        usec = os.environ.get("WATCHDOG_USEC", "")
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval = int(usec) / 2e6 if usec.isdigit() and mine else 0.0
        self._next = 0.0

    def ping(self) -> None:
        if self._interval and (now := time.monotonic()) >= self._next:
            self._next = now + self._interval
            notify("WATCHDOG=1")
