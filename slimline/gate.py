"""The gate: may this candidate take the baseline's place? Pure statistics; no files, no store.

Example by example, on the same frozen data, the candidate must be *proven* not worse by more than a margin: the
one-sided bound of the paired difference stays within a margin (non-inferiority; bounds.py has the intervals). And it
must win something, with an interval that excludes 1. "Not significantly different" is never read as equal. All checks
must pass, each at the full level: that is an intersection-union test, which needs no correction.

A classifier is judged by its answers (Predictions), a language model by how surprised it is by documents (Losses) and,
where they were measured, by how far it strays from the baseline token by token (Strays) and by its answers to multiple
choice: a model can keep its perplexity, or its accuracy, and still have become another one.

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

from slimline import bounds
from slimline.errors import ConfigError

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
Win = Literal["size", "latency", "throughput", "memory"]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

MEMORY_NOISE = 0.05
"""Peak memory is measured once and has no interval: a gain within this fraction is not a win."""


class Limits(BaseModel):
    """What is asked of a candidate. Hashed before anything is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Literal["accuracy", "macro_f1", "perplexity"] = Field("accuracy", description="what must not get worse")
    margin: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="how much of it can be spared, as a fraction; of perplexity, by how much it may grow",
    )
    against_champion: bool = Field(True, description="the present champion must be measured, and held against as well")
    champion_margin: float = Field(
        0.0, ge=0, lt=1, description="how much of it can be spared against the champion; 0 for margin"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of each one-sided bound")
    min_examples: int = Field(100, ge=10, description="fewer examples than this decide nothing")
    slices: dict[str, float] = Field({}, description="margins of slices, such as {'label:negative': 0.05}")
    slice_min_examples: int = Field(50, ge=1, description="a slice with fewer is reported, not judged")
    min_agreement: float = Field(
        0.0, ge=0, le=1, description="fraction of answers, or of likeliest next tokens, that must stay the same"
    )
    max_kl: float = Field(0.0, ge=0, description="mean KL from the baseline's next tokens in nats at most; 0 for any")
    choices_margin: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="accuracy in multiple choice that can be spared, as a fraction, if it was measured",
    )
    must_win: tuple[Win, ...] = Field(
        ("size", "latency", "throughput", "memory"), description="at least one of these must be won"
    )
    min_speedup: float = Field(0.0, ge=0, description="proven speed-up of a single text over the baseline")
    max_p50_ms: float = Field(0.0, ge=0, description="median time of a single text at most; 0 for no limit")
    max_size_bytes: int = Field(0, ge=0, description="bytes of weights at most; 0 for no limit")
    max_memory_bytes: int = Field(0, ge=0, description="peak memory of a process that answers at most; 0 for no limit")
    size_alone: bool = Field(False, description="may be slower than the baseline if it is smaller")
    require_approval: bool = Field(False, description="a person must approve what has passed before it is promoted")
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
class Losses:
    """How surprised one language model is by each document."""

    ids: Sequence[str]
    tokens: Sequence[int]
    """How many of a document's tokens were scored."""
    nll: Sequence[float]
    """The negative log-likelihood of all of them, in nats."""
    text: str = ""
    """Digest of the tokens themselves: only the same tokens can be compared."""


@dataclass(frozen=True)
class Strays:
    """How far the candidate's next tokens are from the baseline's."""

    kl: float
    """Mean KL(baseline || candidate) over tokens, in nats."""
    agreement: float
    """Fraction of tokens after which both think the same one likeliest."""


@dataclass(frozen=True)
class Speed:
    """The candidate against the baseline: (ratio, low, high), each above 1 where the candidate is better."""

    latency: tuple[float, float, float]
    throughput: tuple[float, float, float]
    size: float
    memory: float
    p50_ms: float
    weights_bytes: int
    asked: str = "single texts"
    """What a time is the time of."""
    memory_bytes: int = 0
    """The most that a process held while it answered; 0 if that was not measured."""


@dataclass(frozen=True)
class Blessing:
    """The mechanical blessing: whether the bytes run in a fresh process, and if not, why."""

    ok: bool
    problem: str = ""
    answers: dict[str, float] = field(default_factory=dict)
    """What was answered, for a later process to compare with: see probe.py."""


@dataclass(frozen=True)
class Champion:
    """The version in whose place the candidate is to come, and its answers to the same examples, if they are known."""

    name: str
    measured: Predictions | Losses | None


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


def decide(
    candidate: Predictions | Losses,
    baseline: Predictions | Losses,
    speed: Speed,
    blessing: Blessing,
    limits: Limits,
    strays: Strays | None = None,
    choices: tuple[Predictions, Predictions] | None = None,
    champion: Champion | None = None,
) -> Verdict:
    """The verdict on a candidate. Never raises for bad evidence: that is INVALID, with the reason.

    `strays` and `choices` (the candidate's, the baseline's) are further evidence on a language model.
    """
    problem = _unfit(candidate, baseline, speed, blessing, limits, strays, choices)
    rival = champion if limits.against_champion else None
    problem = problem or _incomparable(candidate, rival)
    if problem:
        check = Check(name="evidence", status="INVALID", sentence=problem)
        said, digest = f"INVALID: {problem}", limits.digest()
        return Verdict(status="INVALID", sentence=said, limits=limits, limits_digest=digest, checks=(check,))
    answers = choices
    if isinstance(candidate, Losses) and isinstance(baseline, Losses):
        checks, examples = [_perplexity(candidate, baseline, limits.margin, limits)], len(candidate.ids)
        agreement = strays.agreement if strays else 0.0
        if choices:
            label, old, new = _columns(*choices)
            checks.append(_quality("multiple choice", label, old, new, "accuracy", limits.choices_margin, limits))
    else:
        assert isinstance(candidate, Predictions) and isinstance(baseline, Predictions)
        answers, examples = (candidate, baseline), len(candidate.ids)
        label, old, new = _columns(*answers)
        checks = [_quality(limits.metric, label, old, new, limits.metric, limits.margin, limits)]
        for name, margin in limits.slices.items():
            checks.append(_slice(name, margin, candidate.slices.get(name), label, old, new, limits))
        agreement = float((old == new).mean())
    if rival and rival.measured:
        checks.append(_against(candidate, rival, limits))
    checks += _fidelity(agreement, strays, limits) + _efficiency(speed, limits)
    lost, won = _flips(*answers) if answers else (0, 0)
    status = _worst(checks)
    return Verdict(
        status=status,
        sentence=_sentence(status, checks, speed),
        limits=limits,
        limits_digest=limits.digest(),
        checks=tuple(checks),
        examples=examples,
        agreement=agreement,
        flips_lost=lost,
        flips_won=won,
    )


def _columns(candidate: Predictions, baseline: Predictions) -> tuple[Any, Any, Any]:
    """What is right, what the baseline said, and what the candidate says."""
    return np.asarray(baseline.labels), np.asarray(baseline.predicted), np.asarray(candidate.predicted)


def _flips(candidate: Predictions, baseline: Predictions) -> tuple[int, int]:
    """Answers that were right and are wrong, and the other way round."""
    label, old, new = _columns(candidate, baseline)
    return int(((old == label) & (new != label)).sum()), int(((old != label) & (new == label)).sum())


def _unfit(
    candidate: Predictions | Losses,
    baseline: Predictions | Losses,
    speed: Speed,
    blessing: Blessing,
    limits: Limits,
    strays: Strays | None,
    choices: tuple[Predictions, Predictions] | None,
) -> str:
    if not blessing.ok:
        return f"the model does not run: {blessing.problem}"
    if (limits.metric == "perplexity") != isinstance(candidate, Losses) or type(candidate) is not type(baseline):
        return f"{limits.metric} is to be judged, but something else was measured."
    if problem := _mismatched(candidate, baseline) or (_mismatched(*choices) if choices else ""):
        return problem
    if len(candidate.ids) < limits.min_examples:
        return f"{len(candidate.ids)} examples decide nothing; at least {limits.min_examples} are needed."
    if problem := _implausible(speed):
        return problem
    if problem := _unasked(strays, limits, isinstance(candidate, Losses)):
        return problem
    if isinstance(candidate, Losses):
        return ""
    unknown = [name for name in limits.slices if name not in candidate.slices]
    if unknown:
        return f"there is no slice {unknown[0]!r}; there are: {', '.join(candidate.slices)}."
    return ""


def _unasked(strays: Strays | None, limits: Limits, generates: bool) -> str:
    """Why limits do not go with what was measured of divergence; empty if they do."""
    if strays and not (math.isfinite(strays.kl) and 0 <= strays.agreement <= 1):
        return f"the measured divergence (KL {strays.kl}, agreement {strays.agreement}) is no such thing."
    if limits.max_kl and not strays:
        return "max_kl is asked for, but the divergence was not measured."
    if generates and limits.min_agreement and not strays:
        return "min_agreement is asked for, but the divergence was not measured."
    return "slices are of answers, and a language model has none." if generates and limits.slices else ""


def _implausible(speed: Speed) -> str:
    """What is wrong with the measured times and sizes; empty if nothing is."""
    numbers = (*speed.latency, *speed.throughput, speed.size, speed.memory, speed.p50_ms, speed.weights_bytes)
    if not all(math.isfinite(x) and x > 0 for x in numbers):
        return "the measured times or sizes are not finite and positive."
    if any(low > high for _, low, high in (speed.latency, speed.throughput)):
        return "an interval of the measured times has its low end above its high end."
    return ""


def _mismatched(candidate: Predictions | Losses, baseline: Predictions | Losses) -> str:
    """Why two measurements are not of the same examples; empty if they are."""
    for who, measured in (("candidate", candidate), ("baseline", baseline)):
        if broken := _broken(who, measured) if isinstance(measured, Predictions) else _lossy(who, measured):
            return broken
    same = list(candidate.ids) == list(baseline.ids)
    if isinstance(candidate, Losses) and isinstance(baseline, Losses):
        same = same and list(candidate.tokens) == list(baseline.tokens) and candidate.text == baseline.text
    elif isinstance(candidate, Predictions) and isinstance(baseline, Predictions):
        same = same and list(candidate.labels) == list(baseline.labels)
    return "" if same else "candidate and baseline were not measured on the same examples."


def _lossy(who: str, losses: Losses) -> str:
    """What is wrong with one model's losses by themselves; empty if nothing is."""
    if len({len(losses.ids), len(losses.tokens), len(losses.nll)}) > 1:
        return f"the columns of the {who} have different lengths."
    if len(set(losses.ids)) < len(losses.ids):
        return f"the {who} has {len(losses.ids) - len(set(losses.ids))} documents more than once."
    if any(n < 1 for n in losses.tokens):
        return f"the {who} has a document of which no token was scored."
    if not all(math.isfinite(x) and x >= 0 for x in losses.nll):
        return f"the {who} has a document whose likelihood is not finite."
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


def _incomparable(candidate: Predictions | Losses, champion: Champion | None) -> str:
    """Why a candidate cannot be held against the champion; empty if it can, or if there is none."""
    if champion is None:
        return ""
    way_out = "Or say against_champion: false, if it shall be replaced unseen."
    if champion.measured is None:
        return f"the champion ({champion.name}) was not measured on the same examples. {way_out}"
    if type(champion.measured) is not type(candidate) or _mismatched(candidate, champion.measured):
        return f"the champion ({champion.name}) was not measured on the candidate's examples or tokens. {way_out}"
    return ""


def _against(candidate: Predictions | Losses, champion: Champion, limits: Limits) -> Check:
    """The candidate's quality against the champion's: held to the same standard as against the baseline."""
    margin, measured = limits.champion_margin or limits.margin, champion.measured
    if isinstance(candidate, Losses) and isinstance(measured, Losses):
        check = _perplexity(candidate, measured, margin, limits)
    else:
        assert isinstance(candidate, Predictions) and isinstance(measured, Predictions)
        check = _quality("", *_columns(candidate, measured), limits.metric, margin, limits)
    sentence = check.sentence.replace("the baseline", f"the champion ({champion.name})", 1)
    return check.model_copy(update={"name": "champion", "sentence": sentence})


def _quality(name: str, label: Any, old: Any, new: Any, metric: str, margin: float, limits: Limits) -> Check:
    alpha = 2 * (1 - limits.confidence)
    lost, won = int(((old == label) & (new != label)).sum()), int(((old != label) & (new == label)).sum())
    if metric == "accuracy":
        value, (low, high) = (won - lost) / len(label), bounds.tango(won, lost, len(label), alpha)
    else:
        value = bounds.macro_f1(label, new) - bounds.macro_f1(label, old)
        low, high = bounds.bootstrap(label, old, new, alpha, limits.seed)
    said = f"{_points(value)} against the baseline, at worst {_points(low)} (allowed {_points(-margin)})"
    if low > -margin:
        return _ranged(name, "PASS", (value, low, high), -margin, f"{said}.")
    if high < -margin:
        worse = f"{said}: proven worse, at best {_points(high)}."
        return _ranged(name, "FAIL", (value, low, high), -margin, worse)
    if value > -margin:
        # 3: the rule of three; without a flip among n, up to 3/n of all answers are likely to flip
        flips, room = max(lost + won, 3) / len(label), value + margin
        needed = bounds.examples_needed(flips, room, limits.confidence)
        if metric != "accuracy":  # a flip does not weigh 1/n there; the interval says how far these examples reach
            needed = math.ceil(len(label) * ((value - low) / room) ** 2 * bounds.more(limits.confidence))
        more = f"about {needed} examples would tell; there are {len(label)}"
    else:
        more = "more examples would hardly help: the difference itself is beyond the margin"
    return _ranged(name, "INCONCLUSIVE", (value, low, high), -margin, f"{said}: {more}.")


def _perplexity(candidate: Losses, baseline: Losses, margin: float, limits: Limits) -> Check:
    alpha = 2 * (1 - limits.confidence)
    found = bounds.log_ratio(baseline.nll, candidate.nll, candidate.tokens, alpha, limits.seed)
    value, low, high = (math.expm1(x) for x in found)
    name = "perplexity"
    said = f"{value:+.1%} against the baseline, at worst {high:+.1%} (allowed {margin:+.1%})"
    if high < margin:
        return _ranged(name, "PASS", (value, low, high), margin, f"{said}.")
    if low > margin:
        return _ranged(name, "FAIL", (value, low, high), margin, f"{said}: proven worse, at best {low:+.1%}.")
    more = "more documents would hardly help: the difference itself is beyond the margin"
    if (room := math.log1p(margin) - found[0]) > 0:
        needed = math.ceil(len(candidate.ids) * ((found[2] - found[0]) / room) ** 2 * bounds.more(limits.confidence))
        more = f"about {needed} documents would tell; there are {len(candidate.ids)}"
    return _ranged(name, "INCONCLUSIVE", (value, low, high), margin, f"{said}: {more}.")


def _fidelity(agreement: float, strays: Strays | None, limits: Limits) -> list[Check]:
    checks = []
    if limits.min_agreement:
        what = "likeliest next tokens" if strays else "answers"
        sentence = f"{agreement:.1%} of the {what} are the same; {limits.min_agreement:.1%} are asked for."
        checks.append(_hard("agreement", agreement, limits.min_agreement, agreement >= limits.min_agreement, sentence))
    if strays:
        sentence = f"{strays.kl:.3f} nats from the baseline's next tokens, which are the likeliest in {agreement:.1%}."
        if limits.max_kl:
            sentence = f"{sentence.removesuffix('.')}; {limits.max_kl:.3f} are allowed."
            checks.append(_hard("divergence", strays.kl, limits.max_kl, strays.kl <= limits.max_kl, sentence))
        else:
            checks.append(Check(name="divergence", status="REPORTED", value=strays.kl, sentence=sentence))
    return checks


def _slice(name: str, margin: float, rows: Any, label: Any, old: Any, new: Any, limits: Limits) -> Check:
    count = int(rows.sum())
    if count < limits.slice_min_examples:
        sentence = f"{count} examples are too few to judge (fewer than {limits.slice_min_examples})."
        return Check(name=name, status="REPORTED", limit=-margin, sentence=sentence)
    return _quality(name, label[rows], old[rows], new[rows], "accuracy", margin, limits)


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
        sentence = f"{ratio:.2f}x as fast on {speed.asked} ({low:.2f} to {high:.2f})."
        if slower:
            sentence = f"slower than the baseline: {sentence} Say size_alone if size is all that counts."
        checks.append(_ranged("latency", "FAIL" if slower else "PASS", speed.latency, 1.0, sentence))
    if limits.max_p50_ms:
        sentence = f"{speed.p50_ms:.2f} ms in the median of {speed.asked}; {limits.max_p50_ms:.2f} ms are allowed."
        checks.append(_hard("p50", speed.p50_ms, limits.max_p50_ms, speed.p50_ms <= limits.max_p50_ms, sentence))
    if limits.max_size_bytes:
        sentence = f"{speed.weights_bytes / 1e6:.1f} MB of weights; {limits.max_size_bytes / 1e6:.1f} MB are allowed."
        fits = speed.weights_bytes <= limits.max_size_bytes
        checks.append(_hard("size", speed.weights_bytes, limits.max_size_bytes, fits, sentence))
    if limits.max_memory_bytes:
        sentence = f"{speed.memory_bytes / 1e6:.1f} MB of memory; {limits.max_memory_bytes / 1e6:.1f} MB are allowed."
        fits = 0 < speed.memory_bytes <= limits.max_memory_bytes
        checks.append(_hard("memory", speed.memory_bytes, limits.max_memory_bytes, fits, sentence))
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
