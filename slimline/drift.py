"""Drift: are the texts that come in now still like those that a model was fitted to and judged on?

Of a data set no text is kept, but a hash of each (so that a new one is known, and one that changed sides), its split,
label and length, and of a sample which words it has, hashed as well. Three questions are asked of two data sets:

    labels   the total variation distance between how often each label occurs, 0 to 1; chi-squared test
    length   the Kolmogorov-Smirnov distance between lengths in words, 0 to 1
    words    how well a classifier tells new from old by their words: the area under its ROC curve, 0.5 to 1, each text
             judged by one that has not seen it (a classifier two-sample test, Lopez-Paz and Oquab, 2017,
             arXiv 1610.06545; here the nearest mean, which needs no tuning); Mann-Whitney test

Whatever is both beyond chance and larger than `NOTABLE` has drifted. Nothing is decided by it: the gate judges models.

Shapes: N = texts, H = buckets that words are hashed to.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slimline import data
from slimline.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "inputs.parquet"
SAMPLE = 1000
"""Texts whose words are kept."""
BUCKETS = 512
FOLDS = 5
LEVEL = 0.01 / 3
"""Of each of the three tests: of all three together at most 0.01."""
NOTABLE = {"labels": 0.1, "length": 0.1, "words": 0.6}
"""Differences that a person should look at; with many texts much smaller ones are beyond chance."""

Array = np.ndarray[Any, np.dtype[Any]]
WORD = re.compile(r"\w+")


class Inputs(NamedTuple):
    """What is kept of a data set."""

    text_N: Array
    """uint64: hashes of the normalized texts."""
    split_N: Array
    label_N: Array
    length_N: Array
    """Words."""
    sample_S: Array
    """Which rows the words are of."""
    words_SH: Array
    """float32: which words a text has, in buckets, of length 1."""


class Difference(NamedTuple):
    """How far new texts are from old ones, and how likely chance alone would do that."""

    size: dict[str, float]
    p: dict[str, float]

    @property
    def drifted(self) -> list[str]:
        """What has, of labels, length and words."""
        return [name for name, size in self.size.items() if size >= NOTABLE[name] and self.p[name] < LEVEL]


def look(file: Path) -> Inputs:
    """What is kept of a data set; which texts are sampled depends on the texts alone."""
    rows = data.rows(file)
    text_N = np.array([_hash(row.text) for row in rows], dtype=np.uint64)
    sample_S = np.sort(np.argsort(text_N, kind="stable")[:SAMPLE])
    words = [WORD.findall(data.normalize(row.text)) for row in rows]
    return Inputs(
        text_N,
        np.array([row.split for row in rows]),
        np.array([row.label for row in rows]),
        np.array([len(found) for found in words], dtype=np.int64),
        sample_S,
        np.stack([_buckets(words[i]) for i in sample_S]),
    )


def write(inputs: Inputs, folder: Path) -> None:
    """Keep it as FILE in a folder."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    words: list[Any] = [None] * len(inputs.text_N)
    for row, words_H in zip(inputs.sample_S, inputs.words_SH):
        words[row] = words_H.astype(np.float16)
    table: pa.Table = pa.table(
        {
            "text": pa.array(inputs.text_N),
            "split": pa.array(inputs.split_N.tolist()).dictionary_encode(),
            "label": pa.array(inputs.label_N.tolist()).dictionary_encode(),
            "length": pa.array(inputs.length_N),
            "words": pa.array(words, type=pa.list_(pa.float16())),
        }
    )
    parquet.write_table(table, folder / FILE)


def read(folder: Path) -> Inputs | None:
    """What was kept in a folder, or None if nothing was."""
    import pyarrow.parquet as parquet

    if not (folder / FILE).is_file():
        return None
    table = parquet.read_table(folder / FILE)
    words = table["words"].to_pylist()
    sample_S = np.array([row for row, found in enumerate(words) if found is not None], dtype=np.int64)
    return Inputs(
        table["text"].to_numpy(),
        np.array(table["split"].to_pylist()),
        np.array(table["label"].to_pylist()),
        table["length"].to_numpy(),
        sample_S,
        np.array([words[row] for row in sample_S], dtype=np.float32),
    )


def fresh(old: Inputs, new: Inputs) -> Array:
    """Which texts of the new data set are not in the old one, as bool [N]."""
    fresh_N: Array = ~np.isin(new.text_N, old.text_N)
    return fresh_N


def refuse_leaks(old: Inputs, new: Inputs, where: str) -> None:
    """Raise DataError for texts that are to judge now, of which a model has seen some in its training before."""
    seen = old.text_N[old.split_N != "test"]
    leaked = int(np.isin(new.text_N[new.split_N == "test"], seen).sum())
    if leaked:
        raise DataError(
            f"{where} has {leaked} texts in split test which the champion was trained or tuned on. "
            "Keep each text in the split that it was in, or leave out the split column."
        )


def compare(old: Inputs, new: Inputs) -> Difference:
    """How far all texts of one are from all of another; see the top of this file."""
    from scipy.stats import ks_2samp

    labels, labels_p = _labels(old.label_N, new.label_N)
    length = ks_2samp(old.length_N, new.length_N)
    words, words_p = _told_apart(old.words_SH, new.words_SH)
    return Difference(
        {"labels": labels, "length": float(length.statistic), "words": words},
        {"labels": labels_p, "length": float(length.pvalue), "words": words_p},
    )


def only(inputs: Inputs, keep_N: Array) -> Inputs:
    """Some of the rows."""
    place_N = np.cumsum(keep_N) - 1
    kept_S = keep_N[inputs.sample_S]
    text_N, split_N, label_N, length_N = (column[keep_N] for column in inputs[:4])
    return Inputs(text_N, split_N, label_N, length_N, place_N[inputs.sample_S[kept_S]], inputs.words_SH[kept_S])


def _labels(old_N: Array, new_N: Array) -> tuple[float, float]:
    from scipy.stats import chi2_contingency

    names = sorted({*old_N.tolist(), *new_N.tolist()})
    counts = np.array([[Counter(side.tolist())[name] for name in names] for side in (old_N, new_N)])
    share = counts / counts.sum(axis=1, keepdims=True)
    p = float(chi2_contingency(counts).pvalue) if len(names) > 1 else 1.0
    return float(np.abs(share[0] - share[1]).sum() / 2), p


def _told_apart(old_SH: Array, new_SH: Array) -> tuple[float, float]:
    """The area under the curve of a nearest-mean classifier on texts that it has not seen, and its p value."""
    from scipy.stats import mannwhitneyu

    if min(len(old_SH), len(new_SH)) < FOLDS:
        return 0.5, 1.0
    scores = []
    for side_SH in (old_SH, new_SH):
        scores.append(np.empty(len(side_SH)))
    for fold in range(FOLDS):
        held = [np.arange(len(side)) % FOLDS == fold for side in (old_SH, new_SH)]
        toward_H = new_SH[~held[1]].mean(axis=0) - old_SH[~held[0]].mean(axis=0)
        for side_SH, score_S, held_S in zip((old_SH, new_SH), scores, held):
            score_S[held_S] = side_SH[held_S] @ toward_H
    test = mannwhitneyu(scores[1], scores[0], alternative="greater")
    area = float(test.statistic) / (len(old_SH) * len(new_SH))
    return max(area, 0.5), float(test.pvalue)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(data.normalize(text).encode()).digest()[:8], "big")


def _buckets(words: list[str]) -> Array:
    words_H = np.zeros(BUCKETS, dtype=np.float32)
    for word in set(words):
        # not hash(), which differs from process to process
        words_H[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest()) % BUCKETS] += 1
    norm = float(np.linalg.norm(words_H))
    return words_H / norm if norm else words_H
