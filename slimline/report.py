"""The page a person looks at: the verdict, what each stage bought and what it broke, on one self-contained page.

No network and no plotting library: six points and a few bars are plain SVG, whose places are worked out here (a
plotting library would weigh 4 MB a page). Works from file://, and in a sandboxed frame such as the Kubeflow page's.
"""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from slimline.artifact import Frozen, Stage
from slimline.gate import Check, Verdict


class Row(Frozen):
    """One model that was measured."""

    name: str
    technique: str
    format: str
    runtime: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    p50_ms: float
    p50_low_ms: float
    p50_high_ms: float
    p99_ms: float
    throughput_per_s: float
    batch_size: int
    speedup: float
    speedup_low: float
    speedup_high: float
    weights_bytes: int
    size_bytes: int
    peak_memory_bytes: int
    is_baseline: bool
    is_candidate: bool
    slices: dict[str, float]


class Flip(Frozen):
    """An example that the baseline had right and the candidate has wrong."""

    text: str
    label: str
    before: str
    before_score: float
    after: str
    after_score: float


class Page(Frozen):
    """All that the page shows."""

    name: str
    version: int
    outcome: str
    verdict: Verdict
    rows: tuple[Row, ...]
    flips: tuple[Flip, ...]
    lineage: tuple[Stage, ...]
    refs: dict[str, str]
    machine: dict[str, Any]
    data: str
    data_digest: str
    queries: int
    threads: int
    command: str
    slimline_version: str
    created: str


def render(page: Page) -> str:
    """The page as one HTML document. Everything that came from outside is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"mb": lambda n: f"{n / 1e6:.1f}", "percent": lambda x: f"{100 * x:.1f}", "short": short}
    template = (resources.files("slimline") / "report.html.j2").read_text(encoding="utf-8")
    base = next((row for row in page.rows if row.is_baseline), page.rows[0])
    best = next((row for row in page.rows if row.is_candidate), page.rows[-1])
    return environment.from_string(template).render(
        page=page,
        base=base,
        best=best,
        plot=plot(page.rows),
        checks=[(check, strip(check)) for check in page.verdict.checks],
        bars=bars(page.rows),
        slices=sorted({name for row in page.rows for name in row.slices}, key=_slice_order),
        seconds=sum(stage.seconds for stage in page.lineage),
        bought=bought(page.lineage, page.rows),
    )


def short(value: Any) -> str:
    """A number as a person writes it; anything else as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _slice_order(name: str) -> tuple[int, int]:
    digits = [part for part in name.replace("_", " ").split() if part.isdigit()]
    return (int(name.startswith("accuracy")), int(digits[0]) if digits else 0)


def pareto(rows: tuple[Row, ...]) -> list[Row]:
    """The rows that no other beats in both accuracy and latency, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.p50_ms, -r.accuracy)):
        if not front or row.accuracy > front[-1].accuracy:
            front.append(row)
    return front


def bought(lineage: tuple[Stage, ...], rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Every stage with its own measurement and the measured one before it, each None where nothing was measured.

    Matched from the end, since the rows end with the candidate, whose lineage this is; an export of the baseline
    comes earlier and is passed over.
    """
    longest, end = max((stage.seconds for stage in lineage), default=0.0) or 1.0, len(rows)
    steps: list[dict[str, Any]] = []
    for stage in reversed(lineage):
        at = next((i for i in reversed(range(end)) if rows[i].technique == stage.technique), None)
        end = end if at is None else at
        share = round(100 * stage.seconds / longest, 1)
        steps.append({"stage": stage, "row": None if at is None else rows[at], "before": None, "share": share})
    before = None
    for entry in reversed(steps):
        entry["before"] = before
        before = entry["row"] or before
    return steps[::-1]


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 62, 24, 20, 52


def plot(rows: tuple[Row, ...]) -> dict[str, Any]:
    """Places of points, intervals, labels, ticks and the front on a WIDTH x HEIGHT drawing, latency on a log axis."""
    fast, slow = min(r.p50_low_ms for r in rows) / 1.5, max(r.p50_high_ms for r in rows) * 1.5
    low, high = min(r.accuracy_low for r in rows) - 0.005, max(r.accuracy_high for r in rows) + 0.005

    def x(ms: float) -> float:
        share = math.log(ms / fast) / math.log(slow / fast)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(accuracy: float) -> float:
        share = (accuracy - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    points = [
        {
            "row": row, "x": x(row.p50_ms), "y": y(row.accuracy), "x1": x(row.p50_low_ms), "x2": x(row.p50_high_ms),
            "y1": y(row.accuracy_low), "y2": y(row.accuracy_high), "number": i + 1,
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    _spread(points)
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 1) if (high - low) / s <= 7)
    first = math.ceil(low / step)
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "points": points,
        "front": " ".join(f"{x(r.p50_ms)},{y(r.accuracy)}" for r in pareto(rows)),
        "xticks": [(x(ms), f"{ms:g}") for ms in _ticks(fast, slow)],
        "yticks": [(y(i * step), f"{100 * i * step:.3g}") for i in range(first, math.floor(high / step) + 1)],
    }  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [v for v in (m * 10.0**e for e in decades for m in (1, 2, 5)) if low <= v <= high]


def _spread(points: list[dict[str, Any]]) -> None:
    """Give every point a place for its number that is clear of the others."""
    taken: list[tuple[float, float]] = [(p["x"], p["y"]) for p in points]
    for point in points:
        around = [(0, -17), (17, 0), (0, 20), (-17, 0), (15, -15), (-15, -15), (15, 17), (-15, 17), (0, -34), (34, 0)]
        for dx, dy in around:
            place = (point["x"] + dx, point["y"] + dy)
            if all(math.dist(place, other) > 15 for other in taken):
                break
        point["tx"], point["ty"] = round(place[0], 1), round(place[1] + 4, 1)
        taken.append(place)


def bars(rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """Weights and peak memory of every row as fractions of the largest, in percent."""
    size, memory = max(r.weights_bytes for r in rows), max(r.peak_memory_bytes for r in rows)
    return [
        {
            "row": r,
            "size": round(100 * r.weights_bytes / size, 1),
            "memory": round(100 * r.peak_memory_bytes / memory, 1),
        }
        for r in rows
    ]


def strip(check: Check) -> dict[str, float] | None:
    """Places (0 to 100) of a check's interval, value and limit on a small strip; None if it has no interval."""
    low, high, value, limit = check.low, check.high, check.value, check.limit
    if low is None or high is None or value is None or limit is None:
        return None
    ends = sorted((low, high, value, limit))
    reach = (ends[-1] - ends[0]) or 1.0
    start, span = ends[0] - 0.15 * reach, 1.3 * reach
    return {
        key: round(100 * (number - start) / span, 1)
        for key, number in (("low", low), ("high", high), ("value", value), ("limit", limit))
    }
