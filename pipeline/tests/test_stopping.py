"""A bounded job that is told to stop amid a query."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from py4j.protocol import Py4JJavaError
from pyspark import SparkContext
from pyspark.errors import PySparkException

from clickstream import stopping

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def test_a_session_that_is_only_being_made_is_cancelled_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        asked = 0

        def cancelAllJobs(self) -> None:  # noqa: N802
            self.asked += 1
            if self.asked < 3:
                raise AttributeError("_jsc")
            cancelled.set()

    cancelled = threading.Event()
    monkeypatch.setattr(SparkContext, "_active_spark_context", Context())
    monkeypatch.setattr(stopping, "CANCELLED_EVERY_S", 0.01)
    with stopping.in_order():
        signal.raise_signal(signal.SIGTERM)
        assert cancelled.wait(30)


def test_the_running_query_ends_and_the_next_answers_are_its_own(spark: SparkSession) -> None:
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    with stopping.in_order():
        timer.start()
        with pytest.raises((PySparkException, Py4JJavaError), match="cancel"):
            spark.range(10**13).selectExpr("sum(id % 7)").collect()
        assert stopping.told() == signal.SIGTERM
        # What gives a lock back asks the JVM too.
        assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert time.monotonic() - began < 60
    assert stopping.told() is None
    assert signal.getsignal(signal.SIGTERM) == before
    assert spark.range(3).count() == 3
