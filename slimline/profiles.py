"""Which shapes an engine is tuned for: optimization profiles from the lengths that texts really have.

TensorRT chooses kernels for one shape of a profile, its opt, and runs every other shape of it with those. So a good opt
is near the lengths that come: with one profile it is their median, with k profiles the lengths are cut into k
runs whose medians have the least total distance to all texts (the k-medians of a line, found exactly by dynamic
programming). Each profile costs build time, bytes and memory, so a further one must pay: see PAYS.

Shapes: B = texts, S = tokens, H = heads, D = width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from slimline.artifact import Frozen
from slimline.errors import ConfigError, ModelError

PAYS = 0.1
"""A further profile pays if it brings texts nearer to their opt by this fraction of all tokens."""
MOST = 4
"""Profiles that are made unasked at most."""
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
PAST = "past_key_values."


class Shapes(Frozen):
    """What one input may be in one profile, axis by axis."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether an input of this shape may come."""
        return len(shape) == len(self.min) and all(a <= n <= b for a, n, b in zip(self.min, shape, self.max))


Profile = dict[str, Shapes]
"""Shapes by the name of the input."""


class Span(NamedTuple):
    """Least, usual and greatest number along an axis."""

    min: int
    opt: int
    max: int


def spans(lengths: Sequence[int], longest: int, number: int = 0) -> list[Span]:
    """Cut 1..longest into `number` spans (0: as many as pay) that are tuned for these lengths.

    Nothing between 1 and `longest` is left out. Raises ConfigError for a text above `longest`, or more spans than
    there are lengths.
    """
    too_long = [n for n in lengths if n > longest]
    if too_long:
        raise ConfigError(
            f"the profiles end at {longest} tokens but {len(too_long)} of {len(lengths)} texts are longer, "
            f"up to {max(too_long)}. Raise max_length to {max(too_long)}."
        )
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    if number > len(values):
        raise ConfigError(f"{number} profiles were asked for but the texts have {len(values)} lengths. Ask for fewer.")
    distance, cuts = k_medians(values, counts, number or min(MOST, len(values)))
    if not number:
        number = 1
        while number < len(distance) and distance[number - 1] - distance[number] >= PAYS * float(values @ counts):
            number += 1
    runs = cuts[number - 1]
    ends = [int(values[last - 1]) for last in runs[1:-1]] + [longest]
    starts = [1] + [end + 1 for end in ends[:-1]]
    medians = [median(values[a:b], counts[a:b]) for a, b in pairwise(runs)]
    return [Span(*span) for span in zip(starts, medians, ends, strict=True)]


def k_medians(
    values: np.ndarray[tuple[int], np.dtype[np.int64]], counts: np.ndarray[tuple[int], np.dtype[np.int64]], most: int
) -> tuple[list[float], list[list[int]]]:
    """For 1..most runs of the sorted values: the least total distance to their medians, and where the runs begin.

    Run i of a cut holds values[cut[i]:cut[i + 1]].
    """
    size = len(values)
    cost = np.full((size + 1, size + 1), np.inf)
    for a in range(size):
        for b in range(a + 1, size + 1):
            cost[a, b] = np.abs(values[a:b] - median(values[a:b], counts[a:b])) @ counts[a:b]
    best, cuts = [cost[0]], [[[0, b] for b in range(size + 1)]]
    for _ in range(1, most):
        through = best[-1][:, None] + cost  # [where the last run begins, where it ends]
        begins = through.argmin(axis=0)
        cuts.append([[*cuts[-1][int(begins[b])], b] for b in range(size + 1)])
        best.append(through.min(axis=0))
    return [float(row[size]) for row in best], [row[size] for row in cuts]


def median(
    values: np.ndarray[tuple[int], np.dtype[np.int64]], counts: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> int:
    """The lower median of values that come counts times."""
    return int(values[np.searchsorted(counts.cumsum(), counts.sum() / 2)])


def of(inputs: Mapping[str, Sequence[int]], batches: Sequence[Span], lengths: Sequence[Span]) -> list[Profile]:
    """The profiles of a graph with these inputs, -1 where a shape is open.

    For each span of `batches` an encoder gets one for each span of lengths, and a decoder (it has inputs
    past_key_values.*, [B, H, S, D]) two: the whole prompt at once with nothing before it, and one token after
    1..longest-1 others.
    """
    if any(name.startswith(PAST) for name in inputs):
        (_, usual, longest) = lengths[-1]
        steps = [
            (Span(1, usual, longest), Span(0, 0, 0)),
            (Span(1, 1, 1), Span(1, min(usual, longest - 1), longest - 1)),
        ]
    else:
        steps = [(span, Span(0, 0, 0)) for span in lengths]
    return [
        {name: _shapes(name, shape, batch, *step) for name, shape in inputs.items()}
        for batch in batches
        for step in steps
    ]


def fitting(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The first profile that holds these inputs. Raises ModelError if none does."""
    for index, profile in enumerate(profiles):
        if all(name in shapes and profile[name].holds(shapes[name]) for name in profile):
            return index
    given = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    raise ModelError(f"no profile of this engine holds {given}. Build it again: export.tensorrt with a larger one.")


def _shapes(name: str, shape: Sequence[int], batch: Span, new: Span, past: Span) -> Shapes:
    total = Span(*(n + p for n, p in zip(new, past)))
    if name.startswith(PAST) and len(shape) == 4:
        axes = [batch, None, past, None]
    elif name in TOKENS and len(shape) == 2:
        axes = [batch, total if name == "attention_mask" else new]
    else:
        axes = [None] * len(shape)
    for size, axis in zip(shape, axes):
        if (size == -1) == (axis is None):
            what = "is open where no text says how long" if size == -1 else "is fixed where texts differ"
            raise ModelError(
                f"the input {name} {tuple(shape)} {what}. Export it with an open batch and length: export.onnx."
            )
    ends = zip(*(axis or (size, size, size) for size, axis in zip(shape, axes)))
    least, usual, most = (tuple(int(n) for n in end) for end in ends)
    return Shapes(min=least, opt=usual, max=most)
