"""The report of a day: what it says, that it says it again byte by byte, and that a reader never sees half of it."""

from __future__ import annotations

import csv
import json
import os
import resource
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from conftest import CASES

from clickstream import alerts, checks, cli, gold, report, sessions
from clickstream.errors import JobError
from clickstream.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from clickstream.marts import MartWriter

DAY = date(2025, 11, 29)
CASE = CASES / "report"


@pytest.fixture
def settings(dsn: str, tmp_path: Path) -> Settings:
    return Settings(lake_uri="file:///lake", marts_dsn=dsn, report_dir=str(tmp_path / "reports"))


TABLES = {
    "product_funnel_1h": gold.FUNNEL_1H.mart,
    "conversion_1h": gold.CONVERSION_1H.mart,
    "sessions": sessions.MART,
    "product_alerts": alerts.ALERTS_MART,
    "checks": checks.CHECKS,
    "ledger": checks.LEDGER,
}


@pytest.fixture
def filled(marts: MartWriter) -> None:
    """Every mart has the rows of the file of its name."""
    for name, mart in TABLES.items():
        marts.ensure(mart)
        with (CASE / f"{name}.csv").open() as lines:
            rows = [{column: value or None for column, value in row.items()} for row in csv.DictReader(lines)]

        def work(connection: psycopg.Connection[Any], rows: list[Any] = rows, mart: Any = mart) -> None:
            columns = ", ".join(rows[0])
            values = ", ".join(f"%({column})s" for column in rows[0])
            with connection.cursor() as cursor:
                cursor.executemany(f"INSERT INTO {mart.schema}.{mart.name} ({columns}) VALUES ({values})", rows)  # type: ignore[arg-type]

        marts.transact(work)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Page(HTMLParser):
    """The text of a page's cells by row, what it loads from outside, and its tags that were not closed in order."""

    VOID = frozenset({"meta", "line", "path", "rect", "circle", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag != "script"
        if tag == "a":
            self.links.append(given["href"] or "")
        self.loads += [value or "" for name, value in attrs if name in ("src", "xlink:href") or tag == "link"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


@pytest.mark.usefixtures("filled")
def test_golden(settings: Settings, tmp_path: Path) -> None:
    """Input: the rows of the marts. Expected: the CSV files, and the same figures on the page."""
    output = tmp_path / "reports"
    result = report.run(settings, DAY, output)
    assert {
        "views": 900,
        "carts": 69,
        "purchases": 23,
        "revenue": "1299.77",
        "is_final": False,
    }.items() <= result.items()
    found = contents(output / "2025-11-29")
    assert {name: found[name] for name in found if name.endswith(".csv")} == contents(CASE / "expected")
    page = Page(found["report.html"].decode())
    assert page.loads == []
    assert [link for link in page.links if not (output / "2025-11-29" / link).exists()] == []
    rows = page.rows
    assert ["Home", "160", "18", "359.82", "11.2 %", "20.0 %"] in rows
    assert ["mobile", "360", "10", "759.90", "2.8 %", "5.0 %"] in rows
    assert not any("tablet" in row for row in rows)
    assert ["prod_0042", "2025-11-29 00:30", "still open", "220", "9", "2", "6.5", "4.2 %", "12.5 %"] in rows
    assert ["prod_0007", "Books", "0", "1", "0", "0.00", "-"] in rows
    assert ["volume", "bronze.clickstream", "1", "1", "0", "warn", "18000 records & <many>"] in rows
    assert ["ecom_clickstream_raw", "0", "0 to 149", "150", "145", "2", "2", "1", "0"] in rows
    text = found["report.html"].decode()
    assert "3 of 24 hours have events, and not all of them are final yet" in text
    assert "50.0 % with a cart, 25.0 % bought" in text
    assert text.count("<svg") == 4


@pytest.mark.usefixtures("filled")
def test_a_second_run_writes_the_same_bytes(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "reports"
    report.run(settings, DAY, output)
    before = contents(output)
    inodes = {path: path.stat().st_ino for path in output.rglob("*.html")}

    class Tomorrow(date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2031, 1, 1)

    monkeypatch.setattr("pygal.svg.date", Tomorrow)
    report.run(settings, DAY, output)
    assert contents(output) == before
    # Each file was replaced, none was written over while somebody reads it.
    assert all(path.stat().st_ino != inode for path, inode in inodes.items())


@pytest.mark.usefixtures("filled")
def test_the_index_lists_every_day(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "reports"
    for day in (28, 30, 29):
        report.run(settings, DAY.replace(day=day), output)
    (output / "notes").mkdir()
    (output / "notes" / "report.html").touch()
    page = Page((output / "index.html").read_text())
    assert [row[0] for row in page.rows[1:]] == ["2025-11-30", "2025-11-29", "2025-11-28"]
    assert all((output / link).exists() for link in page.links)


@pytest.mark.usefixtures("filled")
def test_the_files_may_be_replaced_by_whoever_may_write_in_the_folder(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "reports"
    output.mkdir()
    output.chmod(0o2770)
    before = os.umask(0o077)
    try:
        report.run(settings, DAY, output)
    finally:
        os.umask(before)
    assert (output / "2025-11-29").stat().st_mode & 0o7777 == 0o2770
    assert {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()} == {0o660}


@pytest.mark.usefixtures("filled")
def test_a_full_disk_leaves_the_files_of_before(settings: Settings, tmp_path: Path) -> None:
    output = tmp_path / "reports"
    report.run(settings, DAY, output)
    before = contents(output)
    # A real refusal of the kernel: the page is larger than a file may be.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        with pytest.raises(JobError, match=r"cannot be written: File too large; .* make room on its disk"):
            report.run(settings, DAY, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert contents(output) == before


def test_a_day_without_events_is_told(settings: Settings, marts: MartWriter, filled: None, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nothing of 2025-12-24: they go from 2025-11-28 to 2025-11-30, choose one"):
        report.run(settings, date(2025, 12, 24), tmp_path)
    marts.transact(lambda connection: connection.execute("DROP SCHEMA gold CASCADE"))
    with pytest.raises(JobError, match=r"nothing of 2025-11-29: they are empty; does the stream gold_hourly run"):
        report.run(settings, DAY, tmp_path)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.usefixtures("filled")
def test_marts_of_the_batch_layer_may_be_absent(settings: Settings, dsn: str, tmp_path: Path) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "DROP SCHEMA quality CASCADE; DROP TABLE gold.sessions, gold.product_alerts, gold.conversion_1h"
        )
    report.run(settings, DAY, tmp_path)
    text = (tmp_path / "2025-11-29/report.html").read_text()
    for said in ("No check ran on this day", "No accounting run on this day", "No episode on this day"):
        assert said in text


@pytest.mark.usefixtures("filled")
def test_the_command(dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", "--lake-uri", "file:///lake", "--marts-dsn", dsn]
    chosen = [*command, "--date", "2025-11-29", "--output", str(tmp_path)]
    assert cli.main(chosen) == 0
    assert f"{tmp_path}/2025-11-29/report.html" in capsys.readouterr().out.splitlines()
    assert cli.main([*chosen, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["purchases"] == 23
    # Yesterday, by default.
    assert cli.main([*command, "--output", str(tmp_path)]) == 1
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    assert f"the marts have nothing of {yesterday}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--date 2025-02-30 --output /tmp", "'2025-02-30' is not a day; write for example 2025-11-29"),
        ("--date 2025-11-29", "give the folder of the reports: --output DIR, or CLICKSTREAM_REPORT_DIR"),
    ],
)
def test_wrong_words_are_told(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--lake-uri", "file:///lake", *words.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
