"""Right or wrong, example by example, and what changed against a baseline.

Every example of a split is answered once; the answers go to predictions.parquet in the data's order, so that a
judge can compare two models example by example; without a baseline, what drift.py keeps of the whole data set lies
beside them, for whoever asks later what has changed since. Numbers: accuracy with Wilson's 95 % interval, macro F1,
recall of each label, accuracy by length in tokens. Against a baseline on the same examples: agreement, flips both
ways, and how far the probabilities moved, as mean KL(baseline || candidate) in nats.

Shapes: B = examples, L = labels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from slimline import data, drift, serve
from slimline.data import SplitName
from slimline.errors import DataError, ModelError
from slimline.technique import BaseConfig, Metrics, Stored, track

if TYPE_CHECKING:
    import pyarrow as pa

NEEDS = "any"
GIVES = "evaluation"

PREDICTIONS = "predictions.parquet"
CHUNK = 256
"""Examples between two reports of progress."""
EDGES = (16, 32, 64)
"""Where one slice of length ends and the next begins, in tokens."""

Array = np.ndarray[Any, np.dtype[Any]]


class Config(BaseConfig):
    """What the model is measured on, and what it is compared with."""

    data: Stored = Field(description="data set with texts and their true labels")
    split: SplitName = Field("test", description="part of it to answer")
    baseline: Stored = Field("", description="evaluation of another model on the same split, to compare with")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Answer every example of the split, write the answers down, and return the numbers."""
    predictor = serve.load(source)
    examples = data.read(Path(config.data), config.split, predictor.labels)
    chunks = [examples.texts[at : at + CHUNK] for at in range(0, len(examples.texts), CHUNK)]
    answers = [predictor.logits(chunk) for chunk in track(chunks, "answering examples")]
    logits_BL = np.concatenate(answers)
    true_B = np.asarray(examples.targets(predictor.labels))
    length_B = np.asarray(predictor.tokenizer.lengths(examples.texts))
    metrics = {
        **quality(true_B, logits_BL.argmax(axis=1), predictor.labels),
        **by_length(true_B == logits_BL.argmax(axis=1), length_B),
    }
    if config.baseline:
        before_BL = baseline_logits(Path(config.baseline), examples.ids, predictor.labels)
        metrics |= compare(true_B, before_BL, logits_BL)
    _write(out / PREDICTIONS, examples, predictor.labels, logits_BL, length_B)
    if not config.baseline:
        drift.write(drift.look(Path(config.data)), out)
    return metrics


def quality(true_B: Array, predicted_B: Array, labels: tuple[str, ...]) -> Metrics:
    """Accuracy with its interval, macro F1 over the labels that occur, recall of each label that is true."""
    from scipy.stats import binomtest

    right = int((true_B == predicted_B).sum())
    interval = binomtest(right, len(true_B)).proportion_ci(0.95, method="wilson")
    metrics = {
        "examples": float(len(true_B)),
        "accuracy": right / len(true_B),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
    }
    scores = []
    for index, label in enumerate(labels):
        true, predicted = true_B == index, predicted_B == index
        if true.any() or predicted.any():
            scores.append(2 * float((true & predicted).sum()) / float(true.sum() + predicted.sum()))
        if true.any():
            metrics[f"recall_{_word(label)}"] = float(predicted[true].mean())
    return {**metrics, "macro_f1": float(np.mean(scores))}


def by_length(right_B: Array, length_B: Array) -> Metrics:
    """Accuracy of each slice of length that has an example, such as accuracy_16_to_31_tokens."""
    slice_B = np.searchsorted(EDGES, length_B, side="right")
    names = [f"{low}_to_{high - 1}" for low, high in zip((0, *EDGES), EDGES)] + [f"from_{EDGES[-1]}"]
    return {f"accuracy_{names[i]}_tokens": float(right_B[slice_B == i].mean()) for i in np.unique(slice_B)}


def compare(true_B: Array, before_BL: Array, after_BL: Array) -> Metrics:
    """Agreement, flips both ways and mean KL(before || after) in nats."""
    before_B, after_B = before_BL.argmax(axis=1), after_BL.argmax(axis=1)
    was_right, is_right = before_B == true_B, after_B == true_B
    return {
        "agreement": float((before_B == after_B).mean()),
        "flips_lost": float((was_right & ~is_right).sum()),
        "flips_won": float((~was_right & is_right).sum()),
        "kl_mean": float(divergence(before_BL, after_BL).mean()),
    }


def divergence(before_BL: Array, after_BL: Array) -> Array:
    """KL(before || after) of each example, in nats; never below 0."""
    from scipy.special import log_softmax

    before, after = (log_softmax(x.astype(np.float64), axis=1) for x in (before_BL, after_BL))
    kl_B: Array = np.maximum((np.exp(before) * (before - after)).sum(axis=1), 0.0)
    return kl_B


def baseline_logits(folder: Path, ids: list[str], labels: tuple[str, ...]) -> Array:
    """The baseline's logits in this model's order of labels. Raises DataError unless it answered the same examples."""
    import pyarrow.parquet as pq

    file = folder / PREDICTIONS
    if not file.is_file():
        raise DataError(f"{folder} has no {PREDICTIONS}. Name an evaluation made by evaluate.classification.")
    table = pq.read_table(file)
    if table["id"].to_pylist() != ids:
        raise DataError(
            f"the baseline {folder} answered {len(table)} examples which are not the {len(ids)} asked here. "
            "Evaluate both on the same data and split."
        )
    known = json.loads((table.schema.metadata or {}).get(b"labels", b"[]"))
    if sorted(known) != sorted(labels):
        raise ModelError(f"the baseline {folder} has labels {known}, not {list(labels)}. Evaluate another model.")
    return np.stack([table[f"logit_{known.index(label)}"].to_numpy() for label in labels], axis=1)


def _write(file: Path, examples: data.Examples, labels: tuple[str, ...], logits_BL: Array, length_B: Array) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    probability_BL = serve.softmax(logits_BL)
    best_B = probability_BL.argmax(axis=1)
    columns: dict[str, pa.Array] = {
        "id": pa.array(examples.ids, pa.string()),
        "text": pa.array(examples.texts, pa.string()),
        "label": pa.array(examples.labels, pa.string()),
        "predicted": pa.array([labels[i] for i in best_B], pa.string()),
        "score": pa.array(probability_BL.max(axis=1)),
        **{f"logit_{i}": pa.array(logits_BL[:, i]) for i in range(len(labels))},
        "length_tokens": pa.array(length_B.astype(np.int64)),
    }
    table = pa.table(columns).replace_schema_metadata({"labels": json.dumps(labels)})
    pq.write_table(table, file)


def _word(label: str) -> str:
    """The label with what a name of a metric cannot hold replaced."""
    return re.sub(r"[^\w\-. ]", "_", label)
