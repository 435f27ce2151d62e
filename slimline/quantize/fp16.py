"""Half precision: every float of the graph in 16 bits. Half the bytes, and the type that GPUs multiply fastest.

Works on plain and on fused graphs; inputs and outputs stay as they were. Layer norms add up in float32 whatever comes
in (the operator says so). Numbers above 65504 do not fit: a model whose activations grow so large needs bf16, or the
operators that make them in `keep`. A processor has no such arithmetic and answers slower than in float32.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slimline import graph, parity, precision
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(parity.Match):
    keep: tuple[str, ...] = Field((), description="kinds of operators that stay in float32, such as Softmax")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the graph in half precision and the source's other files. Raises ModelError where the logits differ."""
    model = graph.read(source / graph.FILE)
    graph.require_floats(model, source)
    precision.lower(model, "fp16", config.keep)
    graph.copy_rest(source, out)
    graph.write(model, out / graph.FILE)
    hint = "Try quantize.bf16, which holds larger numbers, or keep=['Softmax', 'LayerNormalization']"
    return parity.matched(source, out, config, hint)
