"""Scales fixed beforehand: how large activations get on texts, and a graph whose products are rounded by that.

Texts go through the graph one by one, so that nothing is padded and no padding is counted. Magnitudes are counted in a
histogram that doubles its range when a larger one comes, so once through is enough, and memory is one text's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from slimline import data, graph, hf, parity, precision
from slimline.errors import ModelError
from slimline.technique import Metrics, track

if TYPE_CHECKING:
    import onnx

BINS = 2048
CANDIDATES = np.arange(BINS // 16, BINS + 1, 8)
"""Where a range may be cut off, in bins."""

Array = np.ndarray[Any, np.dtype[Any]]


class Calibrated(parity.Guard):
    """Options of all that round activations by scales fixed beforehand."""

    samples: int = Field(256, ge=1, description="calibration texts that activations are measured on")
    attention: bool = Field(False, description="round what attention multiplies with each other as well")
    keep: tuple[str, ...] = Field((), description="products that stay: parts of their names, such as layer.0/output")
    floats: precision.Float = Field("fp16", description="type of all that is not quantized")


class Histogram:
    """Counts of magnitudes in BINS equal bins from 0 to `edge`."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.edge = 0.0
        self.largest = 0.0

    def add(self, values: Array) -> None:
        """Count these numbers, whatever their sign."""
        sizes = np.abs(values).ravel()
        top = float(sizes.max(initial=0.0))
        self.largest = max(self.largest, top)
        self.edge = self.edge or top
        while top > self.edge:  # two bins become one
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, dtype=np.int64)])
            self.edge *= 2
        self.counts += np.histogram(sizes, bins=BINS, range=(0.0, self.edge or 1.0))[0]

    def clip(self, levels: int) -> float:
        """Where to cut off so that rounding to 0, 1, ... `levels` equal steps has the least squared error."""
        if not self.largest:
            return 0.0
        middles = (np.arange(BINS) + 0.5) * (self.edge / BINS)
        used = self.counts > 0
        x, weight = middles[used], self.counts[used]
        ends = CANDIDATES * (self.edge / BINS)
        step = ends[:, None] / levels
        rounded = np.minimum(np.rint(x[None, :] / step), levels) * step
        error = np.square(rounded - x[None, :]) @ weight
        return min(float(ends[error.argmin()]), self.largest)


def quantize(source: Path, out: Path, config: Calibrated, kind: str, cover: Callable[[Histogram], float]) -> Metrics:
    """Write the Q/DQ graph of this kind and the source's other files. Raises ModelError where it strays too far.

    `cover` says which magnitude a scale has to reach.
    """
    model = precision.plain(source)
    weighed = precision.matrices(model, config.keep)
    mixed = precision.mixings(model, config.keep) if config.attention else {}
    seen = magnitudes(model, precision.entering(weighed, mixed), source, Path(config.data), config.samples)
    largest = {name: cover(found) for name, found in seen.items()}
    precision.quantize_activations(model, [*weighed, *mixed], largest, kind, config.floats)
    precision.quantize_weights(model, weighed, kind, config.floats)
    precision.lower(model, config.floats)
    graph.copy_rest(source, out)
    graph.write(model, out / graph.FILE)
    hint = "Try attention=False, more samples, or name in `keep` the matrices that lose most."
    counts = {"num_quantized_matmul": float(len(weighed)), "num_quantized_mixings": float(len(mixed))}
    return {**counts, **parity.guarded(source, out, config, hint)}


def magnitudes(
    model: onnx.ModelProto, names: Collection[str], source: Path, texts: Path, samples: int
) -> dict[str, Histogram]:
    """A histogram of every named tensor over that many calibration texts of a data set, cut up by `source`'s tokenizer.

    Raises ModelError where a tensor is not finite.
    """
    found = {name: Histogram() for name in names}
    for name, values in answers(model, list(found), source, texts, samples):
        found[name].add(values)
    return found


def answers(
    model: onnx.ModelProto, names: list[str], source: Path, texts: Path, samples: int
) -> Iterator[tuple[str, Array]]:
    """What each named tensor is, text by text."""
    import onnx
    import onnxruntime

    watched = graph.copied(model)
    ends = {value.name for value in watched.graph.output}
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in ends
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # every text has another length
    session = graph.session(watched, options)
    tokenizer = hf.tokenizer(source, hf.max_length(source))
    for text in track(data.documents(texts, "calibration").texts[:samples], "calibrating"):
        inputs = parity.feed(session, tokenizer.encode([text]))
        for name, values in zip(names, session.run(names, inputs)):
            if not np.isfinite(values).all():
                raise ModelError(f"{name} is not finite on {text[:80]!r}. Repeat the step that made the graph.")
            yield name, values
