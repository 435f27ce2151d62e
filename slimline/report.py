"""The page a person looks at: the verdict, what each stage bought and what it broke, on one self-contained page.

No network and no plotting library: six points and a few bars are plain SVG, whose places are worked out here (a
plotting library would weigh 4 MB a page). Works from file://, and in a sandboxed frame such as the Kubeflow page's.
"""

# Long because the page and everything that is worked out for it belong together.
from __future__ import annotations

import math
from importlib import resources
from typing import Any

from slimline.artifact import Frozen, Stage
from slimline.gate import Check, Verdict


class Terms(Frozen):
    """What a page's numbers are called: labels are right or wrong, language models more or less surprised."""

    metric: str
    unit: str = ""
    factor: float = 1.0
    """From the number to what is shown: 100 for percent."""
    rising: bool = True
    """Whether more is better."""
    one: str
    """What a latency is the time of."""
    many: str
    """What a throughput counts."""
    timed: str
    """How times were taken, in a sentence."""
    others: str
    """The heading over further numbers of each model."""
    mistakes: str
    """What the shown mistakes are."""

    def shown(self, value: float) -> str:
        """A number of the metric as a person writes it."""
        return f"{self.factor * value:.{1 if self.unit else 2}f}{' ' if self.unit else ''}{self.unit}"

    def moved(self, before: float, after: float) -> str:
        """A change of the metric: points of percentages, else a fraction."""
        return f"{100 * (after - before):+.1f} points" if self.unit else f"{100 * (after / before - 1):+.1f} %"


class Row(Frozen):
    """One model that was measured."""

    name: str
    technique: str
    format: str
    runtime: str
    quality: float
    quality_low: float
    quality_high: float
    """The metric that is judged, with its interval."""
    p50_ms: float
    p50_low_ms: float
    p50_high_ms: float
    p99_ms: float
    throughput_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    weights_bytes: int
    size_bytes: int
    peak_memory_bytes: int
    is_baseline: bool
    is_candidate: bool
    others: dict[str, float]
    """Further numbers by name; those that are fractions of the metric's kind are shown as it is."""


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
    terms: Terms
    rows: tuple[Row, ...]
    flips: tuple[Flip, ...]
    lineage: tuple[Stage, ...]
    refs: dict[str, str]
    machine: dict[str, Any]
    data: str
    data_digest: str
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
    environment.filters |= {"shown": page.terms.shown, "other": lambda x: other(page.terms, x)}
    template = (resources.files("slimline") / "report.html.j2").read_text(encoding="utf-8")
    base = next((row for row in page.rows if row.is_baseline), page.rows[0])
    best = next((row for row in page.rows if row.is_candidate), page.rows[-1])
    return environment.from_string(template).render(
        page=page,
        base=base,
        best=best,
        plot=plot(page.rows, page.terms),
        checks=[(check, strip(check)) for check in page.verdict.checks],
        bars=bars(page.rows),
        others=sorted({name for row in page.rows for name in row.others}, key=_order),
        kept=page.terms.moved(base.quality, best.quality),
        seconds=sum(stage.seconds for stage in page.lineage),
        bought=bought(page.lineage, page.rows),
    )


def short(value: Any) -> str:
    """A number as a person writes it; anything else as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def other(terms: Terms, value: float) -> str:
    """A further number: in percent where the metric is."""
    return f"{100 * value:.1f}" if terms.unit else f"{value:.4g}"


def _order(name: str) -> tuple[int, int, str]:
    digits = [part for part in name.replace("_", " ").split() if part.isdigit()]
    return (int(name.startswith("accuracy")), int(digits[0]) if digits else 0, name)


def pareto(rows: tuple[Row, ...], rising: bool = True) -> list[Row]:
    """The rows that no other beats in both quality and latency, fastest first."""
    sign = 1 if rising else -1
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.p50_ms, -sign * r.quality)):
        if not front or sign * row.quality > sign * front[-1].quality:
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


def plot(rows: tuple[Row, ...], terms: Terms) -> dict[str, Any]:
    """Places of points, intervals, labels, ticks and the front on a WIDTH x HEIGHT drawing, latency on a log axis.

    Better is up, whichever way the metric goes.
    """
    fast, slow = min(r.p50_low_ms for r in rows) / 1.5, max(r.p50_high_ms for r in rows) * 1.5
    low, high = (terms.factor * f for f in (min(r.quality_low for r in rows), max(r.quality_high for r in rows)))
    edge = 0.5 if terms.unit else 0.04 * (high - low) or 0.1
    low, high = low - edge, high + edge

    def x(ms: float) -> float:
        share = math.log(ms / fast) / math.log(slow / fast)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(shown: float) -> float:
        share = (shown - low) / (high - low)
        share = share if terms.rising else 1 - share
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    points = [
        {
            "row": row, "x": x(row.p50_ms), "y": y(terms.factor * row.quality), "number": i + 1,
            "x1": x(row.p50_low_ms), "x2": x(row.p50_high_ms),
            "y1": y(terms.factor * row.quality_low), "y2": y(terms.factor * row.quality_high),
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    _spread(points)
    step = next(s for s in STEPS if (high - low) / s <= 7)
    first = math.ceil(low / step)
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "points": points,
        "front": " ".join(f"{x(r.p50_ms)},{y(terms.factor * r.quality)}" for r in pareto(rows, terms.rising)),
        "xticks": [(x(ms), f"{ms:g}") for ms in _ticks(fast, slow)],
        "yticks": [(y(i * step), f"{i * step:.3g}") for i in range(first, math.floor(high / step) + 1)],
    }  # fmt: skip


STEPS = tuple(m * 10.0**e for e in range(-2, 7) for m in (1, 2, 5))


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
