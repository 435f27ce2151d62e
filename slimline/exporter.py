"""What Prometheus learns: where champions stand, what gates said, and how steps end.

    serve          read the store once a minute; scrapes are answered with what was read last, and cost it nothing
    serve_folder   numbers that several processes keep in a folder, as MLflow's do with --expose-prometheus

Champions and verdicts are read anew each time, from the ledger and the tags of versions. Steps are counted as they end,
from when this process began: after a restart from 0, as Prometheus expects of a counter. Costs two searches for each
registered model and one for the runs that ended of late, whatever the size of the store.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from slimline import ledger, store
from slimline.errors import ConfigError, StoreError

VERDICT, TECHNIQUE = (store.PREFIX + key for key in ("verdict", "technique"))
PASS = "PASS"
# Runs are dated by the clocks of their machines: one that ends this much "earlier" than the last look is still counted.
OVERLAP_S = 900.0
SECONDS = (1, 10, 60, 300, 1800, 7200, 28800)

log = logging.getLogger(__name__)


class Standing(NamedTuple):
    """One registered model: its champion, when that moved last and how often it has, and verdicts, the newest first."""

    name: str
    champion: int | None
    moved_at_s: float | None
    moves: int
    verdicts: tuple[str, ...]

    @property
    def not_passed_in_a_row(self) -> int:
        """How many of the newest candidates were refused, one after the other."""
        return next((at for at, verdict in enumerate(self.verdicts) if verdict == PASS), len(self.verdicts))


def standings() -> list[Standing]:
    """All registered models that slimline has judged. Raises StoreError when the store is away."""
    found = []
    for name, aliases in store.registered():
        verdicts = tuple(tags[VERDICT] for tags in store.newest_version_tags(name) if VERDICT in tags)
        state = ledger.read(name)
        moves = sum(not entry.lost for entry in state.entries)
        if verdicts or moves:
            at = state.tip.at if state.tip else None
            found.append(Standing(name, aliases.get(ledger.CHAMPION), at, moves, verdicts))
    return found


class Champions(Collector):
    """The standings as metrics; none of them while the store is away, so that an old number is never shown as new."""

    def __init__(self) -> None:
        self.read: list[Standing] | None = None

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("slimline_store_up", "1 if the store answered when last asked")
        up.add_metric([], float(self.read is not None))
        yield up
        version = GaugeMetricFamily("slimline_champion_version", "Version that is the champion", labels=["model"])
        moved = GaugeMetricFamily("slimline_champion_moved_timestamp_seconds", "Its last move", labels=["model"])
        moves = CounterMetricFamily("slimline_champion_moves", "Moves of the champion, ever", labels=["model"])
        row = GaugeMetricFamily(
            "slimline_gate_not_passed_in_a_row", "Candidates since the last that passed", labels=["model"]
        )
        last = GaugeMetricFamily("slimline_gate_last_verdict", "1 for the newest verdict", labels=["model", "verdict"])
        for one in self.read or []:
            moves.add_metric([one.name], one.moves)
            row.add_metric([one.name], one.not_passed_in_a_row)
            if one.champion is not None:
                version.add_metric([one.name], one.champion)
            if one.moved_at_s is not None:
                moved.add_metric([one.name], one.moved_at_s)
            if one.verdicts:
                last.add_metric([one.name, one.verdicts[0]], 1.0)
        yield from (version, moved, moves, row, last)


class Steps:
    """Counts steps as they end, each once."""

    def __init__(self, registry: CollectorRegistry, since_s: float) -> None:
        self.since_s, self.begun = since_s, False
        self.seen: dict[str, float] = {}
        labels = ["technique"]
        self.ended = Counter("slimline_steps", "Steps that ended", ["technique", "status"], registry=registry)
        self.seconds = Histogram(
            "slimline_step_seconds", "Of finished steps", labels, buckets=SECONDS, registry=registry
        )
        self.memory = Gauge("slimline_step_peak_memory_bytes", "Of the last finished step", labels, registry=registry)

    def look(self) -> None:
        """Count what has ended since the last look; the first only learns what not to count. Raises StoreError."""
        for run_id, ended_s, status, tags, metrics in store.ended_runs(self.since_s - OVERLAP_S):
            technique = tags.get(TECHNIQUE)
            if run_id in self.seen or technique is None:
                continue
            self.seen[run_id] = ended_s
            if not self.begun:
                continue
            self.ended.labels(technique, status).inc()
            if "step_seconds" in metrics:
                self.seconds.labels(technique).observe(metrics["step_seconds"])
                self.memory.labels(technique).set(metrics.get("step_peak_memory_bytes", 0.0))
        self.begun = True
        self.since_s = max([self.since_s, *self.seen.values()])
        self.seen = {run_id: ended for run_id, ended in self.seen.items() if ended >= self.since_s - OVERLAP_S}


def serve(port: int, every_s: float, stop: threading.Event | None = None) -> None:
    """Answer scrapes until stopped, reading the store every so often. Raises ConfigError for a port in use."""
    registry, stop = CollectorRegistry(), stop or threading.Event()
    champions, steps = Champions(), Steps(registry, time.time())
    registry.register(champions)
    with _listening(port, registry):
        while True:
            try:
                champions.read = standings()
                steps.look()
            except StoreError as error:
                champions.read = None
                log.warning("%s", error)
            if stop.wait(every_s):
                return


def serve_folder(port: int, folder: Path, stop: threading.Event | None = None) -> None:
    """Answer scrapes with the sums of what several processes keep in a folder. Raises ConfigError without one."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder. Name the one that `mlflow server --expose-prometheus` was given.")
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    with _listening(port, registry):
        (stop or threading.Event()).wait()


@contextmanager
def _listening(port: int, registry: CollectorRegistry) -> Iterator[None]:
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise ConfigError(f"port {port} cannot be listened on ({error.strerror}). Give another with --port.") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
