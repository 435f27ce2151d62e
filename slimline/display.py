"""What the Kubeflow page shows of an evaluation, beside its numbers: small, for display only.

    confusion   how often each label was taken for each
    roc         for two labels: true against false positives as the threshold falls

Rates are counted from the answers to all examples and then thinned: a page draws a hundred points as well as a million.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from slimline import artifact, evidence, store

POINTS = 100

Array = np.ndarray[Any, np.dtype[Any]]


class Curve(NamedTuple):
    """False and true positive rate at each threshold, which falls; at the first, nothing is taken for positive."""

    false: list[float]
    true: list[float]
    threshold: list[float]


def answers(ref: str, classes: Any) -> None:
    """Draw the confusion matrix of a quality evaluation into a dsl.ClassificationMetrics, and with two labels its ROC.

    An evaluation that holds no answers to examples with labels is left undrawn.
    """
    if not ref:
        return  # nothing was measured: there was no champion
    folder = store.fetch(ref)
    labels = artifact.read(folder).labels
    if not labels or not (folder / "predictions.parquet").is_file():
        return
    table = evidence.table(folder)
    classes.log_confusion_matrix(list(labels), confusion(table, labels))
    if len(labels) == 2:
        classes.log_roc_curve(*roc(*_positive(table, labels)))


def confusion(table: dict[str, list[Any]], labels: tuple[str, ...]) -> list[list[int]]:
    """Examples by their true label (rows) and by what was answered (columns)."""
    at = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for true, said in zip(table["label"], table["predicted"], strict=True):
        counts[at[true], at[said]] += 1
    return [[int(count) for count in row] for row in counts]


def roc(scores: Array, positive: Array, points: int = POINTS) -> Curve:
    """The curve of scores between 0 and 1 against which examples are positive."""
    order = np.argsort(-scores, kind="stable")
    hits, sorted_scores = np.cumsum(positive[order]), scores[order]
    last = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))  # equal scores are one step
    kept = last[np.unique(np.linspace(0, len(last) - 1, min(points, len(last))).astype(int))]
    true = hits[kept] / max(int(positive.sum()), 1)
    false = (kept + 1 - hits[kept]) / max(int((~positive).sum()), 1)
    return Curve([0.0, *false.tolist()], [0.0, *true.tolist()], [1.0, *sorted_scores[kept].tolist()])


def _positive(table: dict[str, list[Any]], labels: tuple[str, ...]) -> tuple[Array, Array]:
    """The probability of the second label for every example, and which examples have it."""
    first, second = (np.asarray(table[f"logit_{i}"], dtype=float) for i in (0, 1))
    return 1 / (1 + np.exp(first - second)), np.asarray(table["label"]) == labels[1]
