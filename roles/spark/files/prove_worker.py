"""A job whose sum is computed by an executor; it prints the sum and the executor's host."""

import os

from pyspark.sql import SparkSession

with SparkSession.builder.appName("prove-worker").getOrCreate() as spark:
    assert not spark.sparkContext.master.startswith("local"), "this job must run on the cluster"
    total = spark.range(0, 100, 1, 1).rdd.map(lambda row: (row.id, os.uname().nodename)).collect()
    assert sum(value for value, _ in total) == 4950
    print(sum(value for value, _ in total), "on", {host for _, host in total})
