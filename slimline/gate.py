"""The gate: may this candidate take the baseline's place? Pure statistics; no files, no store.

Example by example, on the same frozen data, the candidate must be *proven* not worse by more than a margin: the
one-sided lower bound of the paired difference stays above -margin (non-inferiority). For right-or-wrong metrics the
bound is Tango's score interval for paired proportions (Tango, 1998, Statistics in Medicine 17, 891-908), for others a
BCa bootstrap over examples (Efron, 1987), which sees only flips that happened and is therefore never narrower than what
Tango's bound allows in the label where flips cost most. And it must win something, with an interval that excludes 1.
"Not significantly different" is never read as equal. All checks must pass, each at the full level: that is an
intersection-union test, which needs no correction.

    PASS           proven within every limit, and something is won
    FAIL           proven worse than a limit allows, or slower without leave, or nothing won
    INCONCLUSIVE   the data cannot tell; says how many examples could
    INVALID        the bytes do not run, or the evidence does not fit together
"""

# Long because the limits, the statistics and the sentences that say what came of them belong together.
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimline.errors import ConfigError

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
Win = Literal["size", "latency", "throughput", "memory"]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

POWER_Z = 0.8416212335729143
"""The normal quantile of 80 %: a truly equal candidate passes in four of five tries with the n that is named."""

MEMORY_NOISE = 0.05
"""Peak memory is measured once and has no interval: a gain within this fraction is not a win."""


class Limits(BaseModel):
    """What is asked of a candidate. Hashed before anything is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Literal["accuracy", "macro_f1"] = Field("accuracy", description="what must not get worse")
    margin: float = Field(0.02, gt=0, lt=1, description="how much of it can be spared, as a fraction")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of each one-sided bound")
    min_examples: int = Field(100, ge=10, description="fewer examples than this decide nothing")
    slices: dict[str, float] = Field({}, description="margins of slices, such as {'label:negative': 0.05}")
    slice_min_examples: int = Field(50, ge=1, description="a slice with fewer is reported, not judged")
    min_agreement: float = Field(0.0, ge=0, le=1, description="fraction of answers that must stay the same")
    must_win: tuple[Win, ...] = Field(
        ("size", "latency", "throughput", "memory"), description="at least one of these must be won"
    )
    min_speedup: float = Field(0.0, ge=0, description="proven speed-up of a single text over the baseline")
    max_p50_ms: float = Field(0.0, ge=0, description="median time of a single text at most; 0 for no limit")
    max_size_bytes: int = Field(0, ge=0, description="bytes of weights at most; 0 for no limit")
    size_alone: bool = Field(False, description="may be slower than the baseline if it is smaller")
    seed: int = Field(0, ge=0, description="of the bootstrap")

    def digest(self) -> str:
        """sha256 of the limits, to show that they were fixed before the run."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def limits_from(options: dict[str, Any]) -> Limits:
    """Limits from plain options. Raises ConfigError naming the first that cannot be."""
    try:
        return Limits(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Limits.model_fields)
        raise ConfigError(f"gate limit {where!r}: {first['msg']}. The limits are: {known}.") from None


@dataclass(frozen=True)
class Predictions:
    """One model's answers, with named groups of rows."""

    ids: Sequence[str]
    labels: Sequence[str]
    predicted: Sequence[str]
    slices: dict[str, Flags] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """The candidate against the baseline: (ratio, low, high), each above 1 where the candidate is better."""

    latency: tuple[float, float, float]
    throughput: tuple[float, float, float]
    size: float
    memory: float
    p50_ms: float
    weights_bytes: int


@dataclass(frozen=True)
class Blessing:
    """The mechanical blessing: whether the bytes run in a fresh process, and if not, why."""

    ok: bool
    problem: str = ""


class Check(BaseModel):
    """One limit: the number, its interval, the limit itself, and a sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID", "REPORTED"]
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    sentence: str


class Verdict(BaseModel):
    """What was decided, on what grounds, under which limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Status
    sentence: str
    limits: Limits
    limits_digest: str
    checks: tuple[Check, ...]
    examples: int = 0
    agreement: float = 0.0
    flips_lost: int = 0
    """Right in the baseline, wrong in the candidate."""
    flips_won: int = 0

    @property
    def allows_promotion(self) -> bool:
        return self.status == "PASS"


def decide(candidate: Predictions, baseline: Predictions, speed: Speed, blessing: Blessing, limits: Limits) -> Verdict:
    """The verdict on a candidate. Never raises for bad evidence: that is INVALID, with the reason."""
    problem = _unfit(candidate, baseline, speed, blessing, limits)
    if problem:
        check = Check(name="evidence", status="INVALID", sentence=problem)
        said, digest = f"INVALID: {problem}", limits.digest()
        return Verdict(status="INVALID", sentence=said, limits=limits, limits_digest=digest, checks=(check,))
    label, old, new = (np.asarray(x) for x in (baseline.labels, baseline.predicted, candidate.predicted))
    checks = [_quality(limits.metric, label, old, new, limits.metric, limits.margin, limits)]
    for name, margin in limits.slices.items():
        checks.append(_slice(name, margin, candidate.slices.get(name), label, old, new, limits))
    agreement = float((old == new).mean())
    if limits.min_agreement:
        sentence = f"{agreement:.1%} of the answers are the same; {limits.min_agreement:.1%} are asked for."
        checks.append(_hard("agreement", agreement, limits.min_agreement, agreement >= limits.min_agreement, sentence))
    checks += _efficiency(speed, limits)
    status = _worst(checks)
    was_right, is_right = old == label, new == label
    return Verdict(
        status=status,
        sentence=_sentence(status, checks, speed),
        limits=limits,
        limits_digest=limits.digest(),
        checks=tuple(checks),
        examples=len(label),
        agreement=agreement,
        flips_lost=int((was_right & ~is_right).sum()),
        flips_won=int((~was_right & is_right).sum()),
    )


def _unfit(candidate: Predictions, baseline: Predictions, speed: Speed, blessing: Blessing, limits: Limits) -> str:
    if not blessing.ok:
        return f"the model does not run: {blessing.problem}"
    broken = _broken("candidate", candidate) or _broken("baseline", baseline)
    if broken:
        return broken
    if list(candidate.ids) != list(baseline.ids) or list(candidate.labels) != list(baseline.labels):
        return "candidate and baseline were not measured on the same examples."
    if len(candidate.ids) < limits.min_examples:
        return f"{len(candidate.ids)} examples decide nothing; at least {limits.min_examples} are needed."
    numbers = (*speed.latency, *speed.throughput, speed.size, speed.memory, speed.p50_ms, speed.weights_bytes)
    if not all(math.isfinite(x) and x > 0 for x in numbers):
        return "the measured times or sizes are not finite and positive."
    if any(low > high for _, low, high in (speed.latency, speed.throughput)):
        return "an interval of the measured times has its low end above its high end."
    unknown = [name for name in limits.slices if name not in candidate.slices]
    if unknown:
        return f"there is no slice {unknown[0]!r}; there are: {', '.join(candidate.slices)}."
    return ""


def _broken(who: str, answers: Predictions) -> str:
    """What is wrong with one model's answers by themselves; empty if nothing is."""
    sizes = {len(answers.ids), len(answers.labels), len(answers.predicted), *map(len, answers.slices.values())}
    if len(sizes) > 1:
        return f"the columns of the {who} have different lengths: {', '.join(map(str, sorted(sizes)))}."
    if len(set(answers.ids)) < len(answers.ids):
        return f"the {who} has {len(answers.ids) - len(set(answers.ids))} examples more than once."
    if any(not isinstance(answer, str) for answer in answers.predicted):
        return f"the {who} left examples without an answer."
    return ""


# Quality


def _quality(name: str, label: Any, old: Any, new: Any, metric: str, margin: float, limits: Limits) -> Check:
    alpha = 2 * (1 - limits.confidence)
    lost, won = int(((old == label) & (new != label)).sum()), int(((old != label) & (new == label)).sum())
    if metric == "accuracy":
        value, (low, high) = (won - lost) / len(label), tango(won, lost, len(label), alpha)
    else:
        value = macro_f1(label, new) - macro_f1(label, old)
        low, high = bootstrap(label, old, new, alpha, limits.seed)
    said = f"{_points(value)} against the baseline, at worst {_points(low)} (allowed {_points(-margin)})"
    if low > -margin:
        return _ranged(name, "PASS", (value, low, high), -margin, f"{said}.")
    if high < -margin:
        worse = f"{said}: proven worse, at best {_points(high)}."
        return _ranged(name, "FAIL", (value, low, high), -margin, worse)
    if value > -margin:
        # 3: the rule of three; without a flip among n, up to 3/n of all answers are likely to flip
        flips, room = max(lost + won, 3) / len(label), value + margin
        needed = examples_needed(flips, room, limits.confidence)
        if metric != "accuracy":  # a flip does not weigh 1/n there; the interval says how far these examples reach
            needed = math.ceil(len(label) * ((value - low) / room) ** 2 * _more(limits.confidence))
        more = f"about {needed} examples would tell; there are {len(label)}"
    else:
        more = "more examples would hardly help: the difference itself is beyond the margin"
    return _ranged(name, "INCONCLUSIVE", (value, low, high), -margin, f"{said}: {more}.")


def _slice(name: str, margin: float, rows: Any, label: Any, old: Any, new: Any, limits: Limits) -> Check:
    count = int(rows.sum())
    if count < limits.slice_min_examples:
        sentence = f"{count} examples are too few to judge (fewer than {limits.slice_min_examples})."
        return Check(name=name, status="REPORTED", limit=-margin, sentence=sentence)
    return _quality(name, label[rows], old[rows], new[rows], "accuracy", margin, limits)


def tango(won: int, lost: int, n: int, alpha: float) -> tuple[float, float]:
    """Tango's score interval, of level 1 - alpha, for the difference (won - lost) / n of paired proportions."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = float(norm.ppf(1 - alpha / 2))
    value = (won - lost) / n
    edge = 1 - 1e-12
    low = -1.0 if score(won, lost, n, -edge) < z else brentq(lambda d: score(won, lost, n, d) - z, -edge, value)
    high = 1.0 if score(won, lost, n, edge) > -z else brentq(lambda d: score(won, lost, n, d) + z, value, edge)
    return float(low), float(high)


def score(won: int, lost: int, n: int, difference: float) -> float:
    """How many standard errors the data lie above a supposed difference; the nuisance is at its maximum likelihood."""
    b = -won - lost + (2 * n - won + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    distance = won - lost - n * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def examples_needed(flips: float, room: float, confidence: float = 0.95) -> int:
    """Examples with which a candidate is proven within its margin four times of five.

    (z_confidence + z_0.8)^2 x flips / room^2, where flips is the fraction of answers that turn between right and wrong
    and room the distance between the true difference and -margin: at 95 % and no difference, 6.18 x flips / margin^2.
    """
    from scipy.stats import norm

    return math.ceil((float(norm.ppf(confidence)) + POWER_Z) ** 2 * max(flips, 0.001) / room**2)


def _more(confidence: float) -> float:
    """How many times the examples whose bound just reaches the margin must grow to pass four times of five."""
    from scipy.stats import norm

    z = float(norm.ppf(confidence))
    return ((z + POWER_Z) / z) ** 2


def macro_f1(label: Any, predicted: Any) -> float:
    """Mean over the labels of 2 TP / (2 TP + FP + FN)."""
    scores = []
    for name in np.unique(label):
        hit = int(((label == name) & (predicted == name)).sum())
        total = int((label == name).sum() + (predicted == name).sum())
        scores.append(2 * hit / total if total else 0.0)
    return float(np.mean(scores))


def bootstrap(label: Any, old: Any, new: Any, alpha: float, seed: int) -> tuple[float, float]:
    """BCa interval of level 1 - alpha for the difference in macro F1, widened to what Tango's bound allows a label."""
    from scipy.stats import bootstrap as bca

    floor, ceiling = likely_loss(label, old, new, alpha), -likely_loss(label, new, old, alpha)
    if np.array_equal(old, new):
        return floor, ceiling
    _, codes = np.unique(np.concatenate([label, old, new]), return_inverse=True)
    label_N, old_N, new_N = np.split(codes, 3)

    def difference(rows: Any) -> float:
        return macro_f1(label_N[rows], new_N[rows]) - macro_f1(label_N[rows], old_N[rows])

    found = bca(
        (np.arange(len(label_N)),), difference, confidence_level=1 - alpha, n_resamples=2000, vectorized=False,
        method="BCa", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    # fmin, fmax: where every resample is the same, BCa is NaN and the label's bound stands alone
    return float(np.fmin(found.low, floor)), float(np.fmax(found.high, ceiling))


def likely_loss(label: Any, old: Any, new: Any, alpha: float) -> float:
    """The difference in macro F1 if one label lost as many more answers as Tango's bound allows it, at its worst.

    A bootstrap takes what never happened for impossible: with no flip among 100 examples it proves any margin.
    """
    names = np.unique(label)
    hit = np.array([int(((label == name) & (new == name)).sum()) for name in names])
    total = np.array([int((label == name).sum() + (new == name).sum()) for name in names])
    worst = scored = macro_f1(label, new)
    for k, name in enumerate(names):
        was, now = old[label == name] == name, new[label == name] == name
        lost, won, count = int((was & ~now).sum()), int((~was & now).sum()), len(was)
        more = min((won - lost) - count * tango(won, lost, count, alpha)[0], float(hit[k]))
        own = 2 * hit[k] / total[k] - 2 * (hit[k] - more) / max(total[k] - more, 1.0)
        others = [2 * hit[j] / total[j] - 2 * hit[j] / (total[j] + more) for j in range(len(names)) if j != k]
        worst = min(worst, scored - (own + max(others, default=0.0)) / len(names))
    return float(worst - macro_f1(label, old))


# Efficiency


def _efficiency(speed: Speed, limits: Limits) -> list[Check]:
    checks = []
    ratio, low, high = speed.latency
    if limits.min_speedup:
        sentence = f"{ratio:.2f}x as fast, at least {low:.2f}x ({limits.min_speedup:.2f}x is asked for)."
        passed: Status = (
            "PASS" if low >= limits.min_speedup else "FAIL" if high < limits.min_speedup else "INCONCLUSIVE"
        )
        checks.append(_ranged("speed-up", passed, speed.latency, limits.min_speedup, sentence))
    elif not limits.size_alone:
        slower = high < 1
        sentence = f"{ratio:.2f}x as fast on single texts ({low:.2f} to {high:.2f})."
        if slower:
            sentence = f"slower than the baseline: {sentence} Say size_alone if size is all that counts."
        checks.append(_ranged("latency", "FAIL" if slower else "PASS", speed.latency, 1.0, sentence))
    if limits.max_p50_ms:
        sentence = f"{speed.p50_ms:.2f} ms for a single text; {limits.max_p50_ms:.2f} ms are allowed."
        checks.append(_hard("p50", speed.p50_ms, limits.max_p50_ms, speed.p50_ms <= limits.max_p50_ms, sentence))
    if limits.max_size_bytes:
        sentence = f"{speed.weights_bytes / 1e6:.1f} MB of weights; {limits.max_size_bytes / 1e6:.1f} MB are allowed."
        fits = speed.weights_bytes <= limits.max_size_bytes
        checks.append(_hard("size", speed.weights_bytes, limits.max_size_bytes, fits, sentence))
    wins = {
        "size": (speed.size, speed.size),
        "latency": (ratio, low),
        "throughput": (speed.throughput[0], speed.throughput[1]),
        "memory": (speed.memory, speed.memory / (1 + MEMORY_NOISE)),
    }
    won = [f"{name} {wins[name][0]:.1f}x" for name in limits.must_win if wins[name][1] > 1]
    best = max((wins[name][0] for name in limits.must_win), default=1.0)
    if limits.must_win:
        sentence = f"won: {', '.join(won)}." if won else f"nothing is won in {', '.join(limits.must_win)}."
        checks.append(_hard("benefit", best, 1.0, bool(won), sentence))
    return checks


def _hard(name: str, value: float, limit: float, passed: bool, sentence: str) -> Check:
    return Check(name=name, status="PASS" if passed else "FAIL", value=value, limit=limit, sentence=sentence)


def _ranged(name: str, status: Status, found: tuple[float, float, float], limit: float, sentence: str) -> Check:
    value, low, high = found
    return Check(name=name, status=status, value=value, low=low, high=high, limit=limit, sentence=sentence)


def _worst(checks: list[Check]) -> Status:
    found = {check.status for check in checks}
    order: tuple[Status, ...] = ("INVALID", "FAIL", "INCONCLUSIVE")
    return next((status for status in order if status in found), "PASS")


def _sentence(status: Status, checks: list[Check], speed: Speed) -> str:
    reasons = [f"{check.name}: {check.sentence}" for check in checks if check.status not in ("PASS", "REPORTED")]
    if reasons:
        return f"{status}: {' '.join(reasons)}"
    quality = checks[0]
    ratio, low, high = speed.latency
    return (
        f"PASS: {quality.name} {quality.sentence.rstrip('.')}; {ratio:.1f}x as fast ({low:.1f} to {high:.1f}), "
        f"{speed.size:.1f}x smaller."
    )


def _points(value: float | None) -> str:
    """A difference of fractions in points: +0.4 points."""
    return f"{100 * (value or 0.0):+.1f} points"
