"""int4 weights: matrices in 4 bits, restored as they are multiplied. For models that wait for their weights.

An eighth of the bytes of float32; no arithmetic is saved, so an encoder that answers batches gains nothing but room.
In each column, neighbouring rows share a scale, chosen by the least squared error of the weights; a matrix whose rows
blocks do not fill stays. All else is half precision, the embeddings too. Takes the unfused graph. Weighing a row's
error with the mean square of its input was tried and is worse (MiniLM-L6 on movie reviews, blocks of 32: mean KL
0.0083 instead of 0.0026): it cuts off too much of quiet rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slimline import graph, parity, precision
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(parity.Guard):
    block_size: Literal[16, 32, 64, 128] = Field(64, description="rows of a column that share a scale")
    keep: tuple[str, ...] = Field((), description="matrices that stay: parts of their names, such as layer.0/output")
    floats: precision.Float = Field("fp16", description="type of all that is not quantized")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the graph with packed weights and the source's other files. Raises ModelError where it strays too far."""
    model = precision.plain(source)
    weighed = precision.matrices(model, config.keep, config.block_size)
    left = len(precision.matrices(model, config.keep)) - len(weighed)
    precision.quantize_weights(model, weighed, "int4", config.floats, config.block_size)
    precision.lower(model, config.floats)
    graph.copy_rest(source, out)
    graph.write(model, out / graph.FILE)
    hint = "Try block_size=32, or name in `keep` the matrices that lose most."
    counts = {"num_quantized_matmul": float(len(weighed)), "num_unfilled_matmul": float(left)}
    return {**counts, **parity.guarded(source, out, config, hint)}
