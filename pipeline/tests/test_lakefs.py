"""The lake's commit: of two that make the same version, exactly one wins."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from py4j.protocol import Py4JJavaError

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession


def context(spark: SparkSession, path: Path) -> object:
    jvm = spark._jvm
    assert jvm is not None
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    return jvm.org.apache.hadoop.fs.FileContext.getFileContext(jvm.java.net.URI(f"file://{path}"), conf)


def rename(spark: SparkSession, source: Path, target: Path, mode: str = "NONE") -> None:
    jvm = spark._jvm
    assert jvm is not None
    options = spark.sparkContext._gateway.new_array(jvm.org.apache.hadoop.fs.Options.Rename, 1)
    options[0] = jvm.org.apache.hadoop.fs.Options.Rename.valueOf(mode)
    path = jvm.org.apache.hadoop.fs.Path
    context(spark, target).rename(path(f"file://{source}"), path(f"file://{target}"), options)


def test_of_concurrent_commits_exactly_one_wins(spark: SparkSession, tmp_path: Path) -> None:
    def race(version: int) -> None:
        target = tmp_path / f"{version:020d}.json"
        sources = [tmp_path / f"tmp-{version}-{n}" for n in range(4)]
        for source in sources:
            source.write_text(source.name)
        won: list[str] = []
        lost: list[str] = []
        together = threading.Barrier(len(sources))

        def commit(source: Path) -> None:
            together.wait()
            try:
                rename(spark, source, target)
                won.append(source.name)
            except Py4JJavaError as error:
                lost.append(error.java_exception.getClass().getSimpleName())

        threads = [threading.Thread(target=commit, args=(source,)) for source in sources]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [target.read_text()]
        assert lost == ["FileAlreadyExistsException"] * 3

    for version in range(50):
        race(version)


def test_overwriting_and_directories_still_work(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    rename(spark, tmp_path / "a", tmp_path / "b", "OVERWRITE")
    assert (tmp_path / "b").read_text() == "new"
    (tmp_path / "dir").mkdir()
    rename(spark, tmp_path / "dir", tmp_path / "moved")
    assert (tmp_path / "moved").is_dir()
    with pytest.raises(Py4JJavaError, match="FileNotFoundException"):
        rename(spark, tmp_path / "missing", tmp_path / "c")


def test_files_belong_to_the_group_and_keep_the_directorys(spark: SparkSession, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2770)
    spark.range(10).coalesce(1).write.format("delta").save(f"file://{shared}/table")
    for path in (shared / "table").rglob("*"):
        mode = path.stat().st_mode
        assert mode & 0o007 == 0, path
        assert mode & 0o060 == 0o060, path
        if path.is_dir():
            assert mode & 0o2000, path


def test_sparks_state_store_can_upload_its_snapshots(spark: SparkSession, tmp_path: Path) -> None:
    """It copies from FileSystem.getLocal, which must be Hadoop's LocalFileSystem or a kind of it."""
    jvm = spark._jvm
    assert jvm is not None
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    local = jvm.org.apache.hadoop.fs.FileSystem.getLocal(conf)
    source = tmp_path / "snapshot"
    source.write_text("state")
    path = jvm.org.apache.hadoop.fs.Path
    local.copyFromLocalFile(path(f"file://{source}"), path(f"file://{tmp_path}/uploaded"))
    assert (tmp_path / "uploaded").read_text() == "state"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["snapshot", "uploaded"], "no checksum files"


def test_the_log_lists_what_deltas_own_log_store_lists(spark: SparkSession, tmp_path: Path) -> None:
    """From a version on, in the order of names, with the sizes; and it is the one that tables use."""
    jvm = spark._jvm
    assert jvm is not None
    table = f"file://{tmp_path}/table"
    for _ in range(12):
        spark.range(1).write.format("delta").mode("append").save(table)
    conf = spark.sparkContext._jsc.hadoopConfiguration()

    def listed(store: Any, version: int) -> list[tuple[str, int]]:
        found = store.listFrom(jvm.org.apache.hadoop.fs.Path(f"{table}/_delta_log/{version:020d}.json"), conf)
        return [(status.getPath().toString(), status.getLen()) for status in iter(lambda: next_of(found), None)]

    def next_of(found: Any) -> Any:
        return found.next() if found.hasNext() else None

    ours, deltas = jvm.clickstream.LakeFs.Log(conf), jvm.io.delta.storage.HDFSLogStore(conf)
    for version in (0, 7, 12):
        assert listed(ours, version) == listed(deltas, version) != []
    missing = jvm.org.apache.hadoop.fs.Path(f"file://{tmp_path}/missing/_delta_log/0.json")
    with pytest.raises(Py4JJavaError, match="FileNotFoundException"):
        ours.listFrom(missing, conf)
    used = jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, table).store()
    adaptor = used.getDelegate(jvm.org.apache.hadoop.fs.Path(table))
    assert adaptor.logStoreImpl().getClass().getName() == "clickstream.LakeFs$Log"
