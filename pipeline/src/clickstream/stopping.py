"""A bounded job that is told to stop: its Spark jobs are cancelled, and it ends in order, giving its locks back."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from pyspark import SparkContext

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("clickstream")

# While it ends, whatever job it begins is cancelled as well.
CANCELLED_EVERY_S = 0.5

_told: list[int] = []


def told() -> int | None:
    """The signal that told this job to stop; None so far."""
    return _told[0] if _told else None


def _cancel(over: threading.Event) -> None:
    while not over.is_set():
        context = SparkContext._active_spark_context
        if context is not None:
            # One that is being made has nothing to cancel yet, and one that was stopped has no more.
            with contextlib.suppress(Exception):
                context.cancelAllJobs()
        over.wait(CANCELLED_EVERY_S)


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP cancel Spark's jobs, so that the one that runs raises Spark's error in the main thread.

    From another thread, which has a connection of its own to the JVM: an exception of Python's amid a question would
    leave its answer behind, and the next question would take it for its own.
    """
    over = threading.Event()

    def stop(number: int, _: Any) -> None:
        if SparkContext._active_spark_context is None:
            sys.exit(128 + number)
        if not _told:
            log.warning("told to stop by %s", signal.Signals(number).name)
            threading.Thread(target=_cancel, args=(over,), name="stopping", daemon=True).start()
        _told.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        over.set()
        _told.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
