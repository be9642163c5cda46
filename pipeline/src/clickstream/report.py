"""The report of a day: funnel, products, alerts and data quality, as a page with plots and as CSV; from the marts.

A day's files say only what the marts say of it: the same marts give the same bytes. Each file is replaced in one step,
so a reader never sees half of one, and a second run takes the place of the first.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import pygal
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from psycopg.rows import dict_row
from pygal.style import Style

from clickstream.checks import CHECKS, LEDGER
from clickstream.errors import JobError
from clickstream.marts import MartWriter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import psycopg

    from clickstream.settings import Settings

Row = dict[str, Any]
# How many products the page shows; the CSV has all of them.
TOP = 15
INK, FAINT, BLUE, GREEN, RED = "#1f2933", "#8a94a0", "#2f6fb0", "#2e8b6f", "#c8462f"
LOOK = {
    "background": "transparent",
    "plot_background": "transparent",
    "foreground": INK,
    "foreground_strong": INK,
    "foreground_subtle": FAINT,
    "guide_stroke_color": "#d9dfe5",
    "major_guide_stroke_color": "#d9dfe5",
    "guide_stroke_dasharray": "none",
    "major_guide_stroke_dasharray": "none",
    "value_label_font_size": 12,
    "font_family": "system-ui, sans-serif",
    "title_font_size": 17,
    "label_font_size": 12,
    "major_label_font_size": 12,
    "value_font_size": 12,
    "legend_font_size": 13,
    "opacity": "0.9",
    "transition": "0s",
}

KNOWN = "SELECT min(window_start) AS first, max(window_start) AS last FROM gold.product_funnel_1h"
HOURS = """
    SELECT window_start, sum(views)::bigint AS views, sum(carts)::bigint AS carts, sum(purchases)::bigint AS purchases,
           sum(revenue) AS revenue, bool_and(is_final) AS is_final
    FROM gold.product_funnel_1h WHERE window_start >= %(start)s AND window_start < %(end)s
    GROUP BY window_start ORDER BY window_start
"""
PRODUCTS = """
    SELECT product_id, min(product_category) AS product_category, sum(views)::bigint AS views,
           sum(carts)::bigint AS carts, sum(purchases)::bigint AS purchases, sum(revenue) AS revenue
    FROM gold.product_funnel_1h WHERE window_start >= %(start)s AND window_start < %(end)s
    GROUP BY product_id ORDER BY revenue DESC, views DESC, product_id
"""
CONVERSION = """
    SELECT dimension, value, sum(views)::bigint AS views, sum(purchases)::bigint AS purchases, sum(revenue) AS revenue,
           sum(sessions_with_view)::bigint AS sessions, sum(sessions_converted)::bigint AS converted
    FROM gold.conversion_1h WHERE window_start >= %(start)s AND window_start < %(end)s
    GROUP BY dimension, value ORDER BY dimension, revenue DESC, value
"""
VISITS = """
    SELECT count(*) AS visits, count(*) FILTER (WHERE carts > 0 OR purchases > 0) AS with_cart,
           count(*) FILTER (WHERE purchases > 0) AS with_purchase
    FROM gold.sessions WHERE session_start >= %(start)s AND session_start < %(end)s
"""
EPISODES = """
    SELECT product_id, opened_at, closed_at, views, carts, purchases, interest_ratio, conversion_upper, catalogue_rate
    FROM gold.product_alerts WHERE opened_at < %(end)s AND coalesce(closed_at, 'infinity') > %(start)s
    ORDER BY opened_at, product_id
"""
QUALITY = """
    SELECT check_name, subject, count(*) AS runs, count(*) FILTER (WHERE status = 'warn') AS warned,
           count(*) FILTER (WHERE status = 'fail') AS failed, max(value) AS highest, max(threshold) AS threshold,
           (array_agg(status ORDER BY checked_at DESC))[1] AS last_status,
           (array_agg(detail ORDER BY status = 'fail' DESC, status = 'warn' DESC, checked_at DESC))[1] AS worst
    FROM quality.checks WHERE checked_at >= %(start)s AND checked_at < %(end)s
    GROUP BY check_name, subject ORDER BY failed DESC, warned DESC, check_name, subject
"""
ACCOUNTED = """
    SELECT topic, partition, min(start_offset) AS first_offset, max(end_offset) - 1 AS last_offset,
           sum(bronze)::bigint AS bronze, sum(events)::bigint AS events, sum(invalid)::bigint AS invalid,
           sum(duplicates)::bigint AS duplicates, sum(conflicting)::bigint AS conflicting,
           sum(unexplained)::bigint AS unexplained
    FROM quality.ledger WHERE accounted_at >= %(start)s AND accounted_at < %(end)s
    GROUP BY topic, partition ORDER BY topic, partition
"""


@dataclass(frozen=True)
class Day:
    """What the marts say of a day of UTC. Revenue is Decimal, times have their zone."""

    day: date
    hours: list[Row]
    products: list[Row]
    conversion: list[Row]
    visits: Row
    episodes: list[Row]
    quality: list[Row]
    ledger: list[Row]

    @property
    def totals(self) -> Row:
        total = {name: sum(hour[name] for hour in self.hours) for name in ("views", "carts", "purchases", "revenue")}
        return total | {"purchases_per_view": ratio(total["purchases"], total["views"])}

    @property
    def flagged(self) -> set[str]:
        return {episode["product_id"] for episode in self.episodes}

    @property
    def is_final(self) -> bool:
        return all(hour["is_final"] for hour in self.hours)


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def read(connection: psycopg.Connection[Any], day: date) -> Day:
    """JobError when the marts have nothing of that day. A mart that is not there yet is an empty one."""
    start = datetime.combine(day, time(), UTC)
    span = {"start": start, "end": start + timedelta(days=1)}

    def rows(table: str, query: str) -> list[Row]:
        with connection.cursor(row_factory=dict_row) as cursor:
            there = cursor.execute("SELECT to_regclass(%s) IS NOT NULL AS there", (table,)).fetchone()
            return cursor.execute(query, span).fetchall() if there and there["there"] else []

    hours = rows("gold.product_funnel_1h", HOURS)
    if not hours:
        known = rows("gold.product_funnel_1h", KNOWN)
        first, last = known[0].values() if known else (None, None)
        which = f"they go from {first:%Y-%m-%d} to {last:%Y-%m-%d}, choose one of these" if first else "they are empty"
        raise JobError(f"the marts have nothing of {day}: {which}; does the stream gold_hourly run (`make status`)?")
    return Day(
        day,
        hours,
        rows("gold.product_funnel_1h", PRODUCTS),
        rows("gold.conversion_1h", CONVERSION),
        next(iter(rows("gold.sessions", VISITS)), {"visits": 0, "with_cart": 0, "with_purchase": 0}),
        rows("gold.product_alerts", EPISODES),
        rows(f"{CHECKS.schema}.{CHECKS.name}", QUALITY),
        rows(f"{LEDGER.schema}.{LEDGER.name}", ACCOUNTED),
    )


def as_csv(header: Sequence[str], rows: Sequence[Row]) -> str:
    """With a header; times are ISO 8601 in UTC, an absent value is empty."""

    def text(value: Any) -> Any:
        if isinstance(value, datetime):
            return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        return f"{value:.6g}" if isinstance(value, float) else value

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([text(row[name]) for name in header] for row in rows)
    return out.getvalue()


def tables(day: Day) -> dict[str, str]:
    """The CSV files by name. Pure."""
    hours = [hour | {"purchases_per_view": ratio(hour["purchases"], hour["views"])} for hour in day.hours]
    products = [
        product
        | {
            "purchases_per_view": ratio(product["purchases"], product["views"]),
            "high_interest_low_conversion": str(product["product_id"] in day.flagged).lower(),
        }
        for product in day.products
    ]
    figures = ("views", "carts", "purchases", "revenue", "purchases_per_view")
    return {
        "funnel.csv": as_csv(("window_start", *figures), hours),
        "products.csv": as_csv(("product_id", "product_category", *figures, "high_interest_low_conversion"), products),
        "quality.csv": as_csv(
            ("check_name", "subject", "runs", "warned", "failed", "highest", "threshold", "last_status", "worst"),
            day.quality,
        ),
    }


def _plain(root: Any) -> Any:
    """The SVG without scripts, and without comments, which have the date in them."""
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag.rpartition("}")[2] == "script":
                parent.remove(child)
    return root


def _svg(name: str, chart: Any) -> str:
    chart.uuid = name
    chart.add_xml_filter(_plain)
    return str(chart.render(is_unicode=True))


def _chart(kind: Any, title: str, colours: Sequence[str], **options: Any) -> Any:
    return kind(
        title=title,
        style=Style(colors=tuple(colours), **LOOK),
        js=[],
        legend_at_bottom=True,
        truncate_legend=-1,
        disable_xml_declaration=True,
        width=560,
        height=300,
        margin=8,
        spacing=6,
        **options,
    )


def plots(day: Day) -> dict[str, str]:
    """Inline SVG by name. Pure."""
    by_hour = {hour["window_start"].astimezone(UTC).hour: hour for hour in day.hours}
    hours = {"x_labels": [f"{n:02d}" for n in range(24)], "x_labels_major_every": 3, "show_minor_x_labels": False}

    def bars(title: str, **colours: str) -> Any:
        chart = _chart(pygal.Bar, title, list(colours.values()), show_legend=len(colours) > 1, min_scale=3, **hours)
        for name in colours:
            chart.add(name, [float(by_hour[n][name]) if n in by_hour else None for n in range(24)])
        return chart

    found = {
        "views": bars("Views by hour (UTC)", views=BLUE),
        "sales": bars("Carts and purchases by hour", carts=BLUE, purchases=GREEN),
        "revenue": bars("Revenue by hour", revenue=GREEN),
    }
    seen = [product for product in day.products if product["views"]]
    interest = _chart(
        pygal.XY,
        "Purchases per view (%) and views of each product",
        (BLUE, RED),
        stroke=False,
        dots_size=4,
        print_labels=True,
        include_x_axis=True,
        xrange=(0, 1.25 * max((product["views"] for product in seen), default=1)),
        min_scale=3,
    )
    for label, flagged in (("other products", False), ("high interest, low conversion", True)):
        points = [
            {
                "value": (product["views"], 100 * product["purchases"] / product["views"]),
                # Names of all of them would cover each other.
                "label": product["product_id"] if flagged else "",
            }
            for product in seen
            if (product["product_id"] in day.flagged) == flagged
        ]
        interest.add(label, points)
    found["interest"] = interest
    return {name: _svg(name, chart) for name, chart in found.items()}


def page(day: Day) -> str:
    """The page, self-contained. Pure."""
    return _template("report.html.j2").render(day=day, plots=plots(day), top=TOP, files=list(tables(day)))


def _template(name: str) -> Template:
    def when(moment: datetime | None) -> str:
        return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}" if moment else "still open"

    def percent(part: float | None) -> str:
        return "-" if part is None else f"{100 * part:.1f} %"

    environment = Environment(
        loader=PackageLoader("clickstream", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "money": lambda amount: f"{amount:,.2f}",
        "percent": percent,
        "when": when,
        "ratio": ratio,
    }
    return environment.get_template(name)


def _write(path: Path, text: str) -> None:
    """In one step, with the permissions of the folder, so that whoever may write there can replace it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(day: Day, output: Path) -> list[Path]:
    """The day's files and the index of all days; JobError when the folder cannot be written."""
    folder = output / day.day.isoformat()
    files = {folder / name: text for name, text in {**tables(day), "report.html": page(day)}.items()}
    try:
        if not folder.is_dir():
            output.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            # A sandboxed service has the group's bit from the folder above, and may not set it itself.
            if folder.stat().st_mode != output.stat().st_mode:
                shutil.copymode(output, folder)
        for path, text in files.items():
            _write(path, text)
        days = sorted(
            (path.parent.name for path in output.glob("*/report.html") if re.fullmatch(r"[\d-]{10}", path.parent.name)),
            reverse=True,
        )
        index = output / "index.html"
        _write(index, _template("index.html.j2").render(days=days))
    except OSError as error:
        raise JobError(
            f"{error.filename or output} cannot be written: {error.strerror or error}; give a folder that this user "
            "may write with --output, or make room on its disk; the files of before are whole"
        ) from None
    return [*files, index]


def run(settings: Settings, day: date, output: Path) -> dict[str, Any]:
    """`{"date", "files", "is_final", totals}`. Raises SettingsError without marts, JobError as `read` and `write`."""
    settings.require_marts()
    marts = MartWriter(settings.marts_dsn, application_name="clickstream-report")
    try:
        found = marts.transact(lambda connection: read(connection, day))
    finally:
        marts.close()
    files = write(found, output)
    totals = found.totals | {"revenue": str(found.totals["revenue"])}
    return {"date": day.isoformat(), "files": [str(path) for path in files], "is_final": found.is_final} | totals
