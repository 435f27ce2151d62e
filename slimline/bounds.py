"""Intervals of paired differences: how much worse may a candidate be, given what was seen of it?

For right-or-wrong answers Tango's score interval for paired proportions (Tango, 1998, Statistics in Medicine 17,
891-908). For macro F1 a BCa bootstrap over examples (Efron, 1987), which sees only flips that happened and is therefore
never narrower than what Tango's bound allows in the label where flips cost most. For perplexity a BCa bootstrap over
documents, since tokens of one document share its subject. And how many examples would tell where these do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

POWER_Z = 0.8416212335729143
"""The normal quantile of 80 %: a truly equal candidate passes in four of five tries with the n that is named."""


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


def more(confidence: float) -> float:
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


def log_ratio(
    old: Sequence[float], new: Sequence[float], tokens: Sequence[int], alpha: float, seed: int
) -> tuple[float, float, float]:
    """(value, low, high) of the log of a ratio of perplexities, new to old, at level 1 - alpha.

    `old` and `new` are each document's negative log-likelihood in nats, over the same `tokens`. Documents, not tokens,
    are drawn with replacement. The interval is widened by as much as a bootstrap of few documents is too narrow
    (Hesterberg, 2015, The American Statistician 69, 371-386).
    """
    from scipy.stats import bootstrap as bca
    from scipy.stats import norm, t

    worse_N, tokens_N = np.asarray(new, float) - np.asarray(old, float), np.asarray(tokens, float)
    value = float(worse_N.sum() / tokens_N.sum())
    if len(worse_N) < 2 or np.ptp(worse_N / tokens_N) == 0:
        return value, value, value

    def ratio(worse: Any, counts: Any, axis: int = -1) -> Any:
        return worse.sum(axis=axis) / counts.sum(axis=axis)

    found = bca(
        (worse_N, tokens_N), ratio, paired=True, confidence_level=1 - alpha, n_resamples=2000, method="BCa",
        vectorized=True, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    count = len(worse_N)
    wider = float(t.ppf(1 - alpha / 2, count - 1) / norm.ppf(1 - alpha / 2)) * math.sqrt(count / (count - 1))
    return value, value - wider * (value - float(found.low)), value + wider * (float(found.high) - value)
