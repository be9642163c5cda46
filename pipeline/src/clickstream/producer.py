"""A simulated shop that sends clickstream events to Kafka.

Bounded (the default: 5 events a second for 60 seconds) or endless (`--duration 0`, as the service runs it).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import math
import os
import signal
import sys
import threading
import time
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from clickstream import catalogue, clients, faults, replay, sdnotify
from clickstream.arrival import KINDS, Pacer, arrivals
from clickstream.clients import ClientError
from clickstream.event import iso_millis
from clickstream.faults import Record, Truth, TruthFile
from clickstream.replay import Replay, ReplayError
from clickstream.shop import Shop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from clickstream.event import Event

log = logging.getLogger("ecom-producer")

# A bounded run gives up when this long passes without the broker accepting anything.
GIVE_UP_SECONDS = 60.0
PROGRESS_SECONDS = 5.0
TOLD_WAIT_SECONDS = 60.0
# A cause of failures that was not met for so long is a new one. What expires in the client comes each two minutes.
QUIET_SECONDS = 300.0
# The shortest wait for the next event.
SHORTEST_WAIT_SECONDS = 0.002


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    client: str
    bootstrap_servers: list[str]
    topic: str
    quiet: bool
    dry_run: bool
    truth: Path | None
    progress: bool
    faults: dict[str, float] | None = None

    @property
    def bounded(self) -> bool:
        return True

    @property
    def total(self) -> int | None:
        """How many events the run has; None when it has no end, or nobody knows."""
        return None

    @property
    def max_unacknowledged(self) -> int:
        """Bounds the memory while the broker is away, and what a crash can lose."""
        return 50_000

    @abstractmethod
    def arrivals(self, at: Callable[[float], float]) -> Iterator[float]:
        """Seconds from the start at which the records are due; `at` says which Unix time that is."""

    @abstractmethod
    def records(self, clock: Callable[[], float] = time.time) -> Iterator[Record]:
        """The record that is due."""

    def settled(self, record: Record) -> None:
        """Told of every record that Kafka has or will never take; in the client's thread."""
        return

    def close(self) -> None:
        """After the last record, when all are acknowledged or have failed; ReplayError when that cannot be kept."""
        return


@dataclass(frozen=True, kw_only=True)
class ShopOptions(Options):
    rate: float
    duration: float
    users: int
    products: int
    arrival: str
    seed: int | None
    first_id: int | None
    late_by: float

    @property
    def bounded(self) -> bool:
        return self.duration > 0

    @property
    def total(self) -> int | None:
        return round(self.rate * self.duration) if self.bounded and self.arrival == "even" else None

    @property
    def max_unacknowledged(self) -> int:
        return max(100, min(50_000, math.ceil(self.rate * 5)))

    def arrivals(self, at: Callable[[float], float]) -> Iterator[float]:
        return arrivals(self.arrival, self.rate, self.duration, seed=self.seed, at=at)

    def records(self, clock: Callable[[], float] = time.time) -> Iterator[Record]:
        shop = Shop(users=self.users, products=self.products, seed=self.seed, first_id=self.first_id, clock=clock)
        if self.faults is None:
            return faults.plain(shop)
        return faults.Faults(shop, self.faults, seed=self.seed, late_by=self.late_by)


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(Options):
    replay: Replay

    def arrivals(self, at: Callable[[float], float]) -> Iterator[float]:
        return self.replay.arrivals(at)

    def records(self, clock: Callable[[], float] = time.time) -> Iterator[Record]:
        return faults.plain(self.replay.current for _ in itertools.repeat(None))

    def settled(self, record: Record) -> None:
        self.replay.settled(record.event)

    def close(self) -> None:
        for line in self.replay.report():
            log.warning(line)
        self.replay.save()


def sent_line(event: Event, partition: int, offset: int) -> str:
    return (
        f"Sent: {event['event_type']!s:<15} | User: {event['user_id']!s:<11} "
        f"| Product: {event['product_id']!s:<11} | Partition: {partition} | Offset: {offset}"
    )


def fault_note(truth: Truth) -> str:
    """What the console line of a record that is wrong on purpose ends with."""
    if truth.kind == "event":
        return ""
    return f" | Fault: {truth.kind}" + (f" ({truth.code})" if truth.code else "")


class Console:
    """Standard output, in whole lines from any thread, until nobody reads it: a run does not end with its reader."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = True

    def say(self, text: str) -> None:
        with self._lock:
            if not self._open:
                return
            try:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()
            except OSError as error:
                self._open = False
                mute()
                if not isinstance(error, BrokenPipeError):
                    log.warning("no more lines on standard output: %s", error)


def mute() -> None:
    """Gives up standard output, whose reader has left. What is still buffered must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Sender:
    """Sends records and keeps account of what the broker acknowledged and what it did not."""

    def __init__(self, options: Options, stop: threading.Event, console: Console) -> None:
        self._options = options
        self._stop = stop
        self._console = console
        self._changed = threading.Condition()
        self._pending = 0
        self._causes: dict[str, float] = {}  # when each was met last
        self._client: clients.Client | None = None
        self.watchdog = sdnotify.Watchdog()
        self.truth: TruthFile | None = None
        self.sent = 0
        self.failed = 0

    def _complain(self, error: ClientError) -> None:
        """Logs each cause once, and anew when it was away for a while; once and for all when it is a record's own."""
        now = time.monotonic()
        last, self._causes[error.cause] = self._causes.get(error.cause), now
        if last is None or (now - last > QUIET_SECONDS and not error.refused):
            log.warning("%s: %s", error.cause, error)

    def connect(self) -> bool:
        """Connects; endless runs wait for the broker, bounded ones give up. False when there is no broker."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while not self._stop.is_set():
            try:
                self._client = clients.connect(
                    self._options.client, self._options.bootstrap_servers, self._options.topic, self._complain
                )
                return True
            except ClientError as error:
                self._complain(error)
                if self._options.bounded and time.monotonic() > deadline:
                    return False
                self.watchdog.wait(self._stop, 2.0)
        return False

    def _done(self, record: Record, error: ClientError | None, partition: int, offset: int) -> None:
        with self._changed:
            self._pending -= 1
            if error:
                self.failed += 1
                self._complain(error)
            else:
                self.sent += 1
                first = self.sent == 1
            if not error or error.refused:
                self._options.settled(record)
            if not error and self.truth:
                self.truth.write(self._options.topic, partition, offset, record.truth)
            self._changed.notify_all()
        if error:
            return
        if first:
            self.watchdog.ready()
        if not self._options.quiet:
            self._console.say(sent_line(record.event, partition, offset) + fault_note(record.truth))

    def wait_for_room(self) -> None:
        """Blocks while too much is unacknowledged: a broker that is away slows the shop, not fills memory."""
        started, told = time.monotonic(), False
        with self._changed:
            while self._pending >= self._options.max_unacknowledged and not self._stop.is_set():
                self._changed.wait(0.5)
                self.watchdog.ping()
                if not told and time.monotonic() - started > 2:
                    told = True
                    log.warning("waiting for the broker: %d events are not acknowledged yet", self._pending)

    def send(self, records: Iterator[Record]) -> bool:
        """Hands one record to the client; False when a bounded run should end because no broker takes it.

        An endless run tries for as long as a client would, then the record has failed.
        """
        if self._stop.is_set():
            return True
        record = next(records)
        bound = GIVE_UP_SECONDS if self._options.bounded else clients.DELIVERY_TIMEOUT_MS / 1000
        deadline = time.monotonic() + bound
        with self._changed:
            self._pending += 1  # until it has an answer; the end of the run is one, too
        while True:
            client = self._client
            assert client is not None
            try:
                client.send(record.key, record.value, partial(self._done, record))
                return True
            except ClientError as error:
                late = time.monotonic() > deadline
                if error.refused or (late and not self._options.bounded):
                    self._done(record, error, -1, -1)
                    return True
                self._complain(error)
                if late:
                    return False
                if error.fatal:
                    client.close(timeout=5)
                    if not self.connect():
                        return self._stop.is_set()
            if self.watchdog.wait(self._stop, 1.0):
                return True

    def close(self, timeout: float = 30.0) -> None:
        """Waits for what is in flight, so that every event ends as acknowledged or as failed."""
        if self._client is None:
            return
        self._client.close(timeout)
        with self._changed:
            # What never got an answer counts as failed: better one too many than a loss unseen.
            self.failed += self._pending
            self._pending = 0
            if self.truth:
                self.truth.close()
                self.truth = None


def tell_progress(
    sender: Sender, total: int | None, ended: threading.Event, clock: Callable[[], float] = time.monotonic
) -> None:
    """A line on stderr every few seconds; in a thread of its own, so also while the run waits for the broker."""
    before, then = sender.sent, clock()
    while not ended.wait(PROGRESS_SECONDS):
        sent, failed, now = sender.sent, sender.failed, clock()
        line = f"{sent}{'' if total is None else f'/{total}'} acknowledged, {(sent - before) / (now - then):.1f}/s"
        print(line + (f", {failed} failed" if failed else ""), file=sys.stderr, flush=True)
        before, then = sent, now


def produce(options: Options, sender: Sender, stop: threading.Event) -> bool:
    """Sends each record when it is due; False when a bounded run should end because no broker takes it."""
    records = options.records()
    pacer = Pacer()
    next_status = 0.0
    for due in options.arrivals(pacer.at):
        delay = pacer.delay(due)
        if delay > TOLD_WAIT_SECONDS:
            log.warning("the next event is due in %.0f s, at %s", delay, iso_millis(pacer.at(due)))
        # Shorter waits than this cost more than they are worth: what is due meanwhile follows at once.
        if (delay and sender.watchdog.wait(stop, max(delay, SHORTEST_WAIT_SECONDS))) or stop.is_set():
            break
        sender.wait_for_room()
        if not sender.send(records):
            return False
        sender.watchdog.ping()
        if time.monotonic() >= next_status:
            next_status = time.monotonic() + 5
            sdnotify.notify(f"STATUS={sender.sent} events acknowledged, {sender.failed} failed")
    return True


def finish(options: Options) -> bool:
    """Closes the source of the records; False when it could not keep what was done."""
    try:
        options.close()
    except ReplayError as error:
        log.error("%s", error)
        return False
    return True


def run(options: Options, stop: threading.Event) -> int:
    console = Console()
    sender = Sender(options, stop, console)
    if not sender.connect():
        if stop.is_set():
            return 0
        log.error(
            "no broker answered at %s; is Kafka running, and is --bootstrap-servers right?",
            ",".join(options.bootstrap_servers),
        )
        return 1
    truth = None
    if options.truth:
        try:
            truth = sender.truth = TruthFile(options.truth)
        except OSError as error:
            log.error("--truth: %s", error)
            sender.close()
            return 1
    console.say(f"Kafka Producer connected to {options.bootstrap_servers}")
    console.say("\nStarting event production...")
    console.say("=" * 60)

    ended = threading.Event()
    if options.progress:
        threading.Thread(target=tell_progress, args=(sender, options.total, ended), daemon=True).start()
    complete = broken = False
    try:
        complete = produce(options, sender, stop)
    except ReplayError as error:
        broken = True
        log.error("%s", error)
    finally:
        sdnotify.notify("STOPPING=1")
        sender.close()
        ended.set()
        broken = not finish(options) or broken
    console.say(f"Producer closed. Total events sent: {sender.sent}")
    if sender.failed or not (complete or broken):
        log.error("%d events were not acknowledged", sender.failed)
    if truth and truth.error:
        log.error("--truth is not complete: %s", truth.error)
        return 1
    return 0 if complete and not broken and not sender.failed else 1


def dry_run(options: Options, stop: threading.Event) -> int:
    """Prints the events as JSON lines. A bounded run does not wait, but has the times of one that does."""
    pacer = Pacer()
    due = 0.0
    records = options.records((lambda: pacer.at(due)) if options.bounded else time.time)
    out = sys.stdout.buffer
    try:
        for due in options.arrivals(pacer.at):
            if stop.wait(0 if options.bounded else pacer.delay(due)):
                break
            record = next(records)
            # With faults a value need not be JSON, nor one line.
            line = record.value if options.faults is None else orjson.dumps(faults.readable(record))
            out.write((line or b"") + b"\n")
            if not options.bounded:
                out.flush()
        out.flush()
    except BrokenPipeError:
        mute()  # the reader has what it wanted
    except ReplayError as error:
        out.flush()
        log.error("%s", error)
        finish(options)
        return 1
    return 0 if finish(options) else 1


def _positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


def _duration(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, or 0 for endless")
    return value


def _common(parser: argparse.ArgumentParser) -> None:
    # The service's environment names them, as it does for the streams.
    servers = os.environ.get("CLICKSTREAM_BOOTSTRAP_SERVERS", "localhost:9092")
    topic = os.environ.get("CLICKSTREAM_TOPIC", "ecom_clickstream_raw")
    parser.add_argument(
        "--client", choices=clients.NAMES, default=clients.NAMES[0], help="confluent is the faster one; both send alike"
    )
    parser.add_argument("--bootstrap-servers", default=servers, help="host:port, comma-separated")
    parser.add_argument("--topic", default=topic, help="an existing topic")
    parser.add_argument("--quiet", action="store_true", help="no line per event")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the events as JSON lines instead of sending them; without waiting, unless the run is endless",
    )
    parser.add_argument(
        "--truth", type=Path, metavar="FILE", help="a new file; a JSON line for each acknowledged record: what it is"
    )
    parser.add_argument(
        "--progress", action="store_true", help=f"every {PROGRESS_SECONDS:g} s, a line on stderr: what is acknowledged"
    )


def _check_common(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.bootstrap_servers = [s.strip() for s in args.bootstrap_servers.split(",") if s.strip()]
    if not args.bootstrap_servers:
        parser.error("--bootstrap-servers is empty")
    if args.dry_run and (args.truth or args.progress):
        name = "--truth" if args.truth else "--progress"
        parser.error(f"{name} is of acknowledged records; leave out --dry-run")
    if args.truth and args.truth.exists():
        parser.error(f"--truth: {args.truth} exists; name another file, or move it away")


def parse_replay(argv: Sequence[str]) -> ReplayOptions:
    parser = argparse.ArgumentParser(
        prog="ecom-producer replay",
        description="Sends the events of a file to Kafka: ours as JSON lines, or a public data set's CSV.",
        epilog="The file's order is kept; a row before the latest one does not wait, and gets that one's time. Rows "
        "that cannot be mapped, or that are alone a week ahead of the latest, are counted and the first ones named. "
        "Silver refuses events older than a week.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="may be compressed: .gz")
    parser.add_argument("--format", choices=replay.FORMATS, default="events")
    parser.add_argument("--speed", type=_duration, default=1.0, help="divides the gaps; 0 is as fast as possible")
    parser.add_argument(
        "--keep-timestamps",
        action="store_true",
        help="leave the times as they are; else the first event is of now, and each other one of when it is due",
    )
    parser.add_argument(
        "--first-id",
        type=_positive(int),
        help="number of the first row's event_id, for the data sets; else by the file's name",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="STATE",
        help="a file that keeps the start and what is acknowledged, to go on from there: what is sent again has the "
        "same bytes, and what is overdue is sent at once; with --speed 0 every event is of the start",
    )
    _common(parser)
    args = parser.parse_args(argv)
    _check_common(parser, args)
    if not args.file.is_file():
        parser.error(f"{args.file} is not a file")
    values = vars(args)
    try:
        source = Replay(
            values.pop("file"),
            values.pop("format"),
            first_id=values.pop("first_id"),
            speed=values.pop("speed"),
            keep_timestamps=values.pop("keep_timestamps"),
            state=values.pop("resume"),
            dry_run=args.dry_run,
        )
        source.check()
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, ReplayError) as error:
        parser.error(str(error))
    return ReplayOptions(replay=source, **values)


def parse_args(argv: Sequence[str] | None = None) -> ShopOptions:
    parser = argparse.ArgumentParser(
        prog="ecom-producer",
        description="Simulates a shop: sends view, add_to_cart and purchase events to Kafka.",
        epilog="`ecom-producer replay --help`: the events of a file instead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _common(parser)
    parser.add_argument("--rate", type=_positive(float), default=5.0, help="events a second")
    parser.add_argument("--duration", type=_duration, default=60.0, help="seconds; 0 runs until stopped")
    parser.add_argument(
        "--arrival",
        choices=KINDS,
        default="even",
        help="evenly; at random with that mean rate; or so with the hours of the day (UTC), most at 16 and least at 4",
    )
    parser.add_argument("--users", type=_positive(int), default=500)
    parser.add_argument("--products", type=_positive(int), default=100)
    parser.add_argument("--seed", type=int, help="repeat the same shop; ids then start at evt_00000001")
    parser.add_argument("--first-id", type=_positive(int), help="number of the first event_id")
    parser.add_argument(
        "--faults",
        type=faults.parse_rates,
        metavar="NAME=RATE,...",
        help=f"make these shares of the records wrong: {', '.join(faults.KINDS)}; all=RATE is spread over all of them",
    )
    parser.add_argument(
        "--late-by", type=float, default=faults.LATE_BY_SECONDS, metavar="SECONDS", help="age of the late events"
    )
    args = parser.parse_args(argv)
    star = int(catalogue.HIGH_INTEREST_PRODUCT.removeprefix("prod_"))
    if args.products <= star:
        parser.error(f"--products must be above {star}: {catalogue.HIGH_INTEREST_PRODUCT} is always on sale")
    _check_common(parser, args)
    if args.faults is not None:
        try:
            faults.check_late_by(args.late_by)
            faults.limit("max_clock_skew")
        except ValueError as error:
            parser.error(f"--late-by: {error}")
    return ShopOptions(**vars(args))


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # The client reports every reconnection attempt; causes are logged once, here.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    argv = sys.argv[1:] if argv is None else argv
    options: Options = parse_replay(argv[1:]) if argv[:1] == ["replay"] else parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return dry_run(options, stop) if options.dry_run else run(options, stop)


if __name__ == "__main__":
    sys.exit(main())
