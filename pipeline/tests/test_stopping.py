"""A bounded job that is told to stop amid a query."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException

from clickstream import stopping

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


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
