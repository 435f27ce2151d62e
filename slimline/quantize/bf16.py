"""bfloat16: every float of the graph in 16 bits, with float32's range. For models that outgrow half precision.

Takes the unfused graph. Nothing overflows, but 8 bits of each number are left where half precision keeps 11. No
processor runs it (ONNX Runtime multiplies bfloat16 on GPUs alone), so the guard asks a twin: the same graph in
float32, in which every number is rounded as this one keeps it.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slimline import graph, parity, precision
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(parity.Match):
    tolerance: float = Field(0.1, gt=0, le=0.5, description="allowed, as a fraction of the largest logit")
    keep: tuple[str, ...] = Field((), description="kinds of operators that stay in float32, such as Softmax")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the graph in bfloat16 and the source's other files. Raises ModelError where the logits differ."""
    model = graph.read(source / graph.FILE)
    graph.require_floats(model, source)
    graph.require_plain(model, source)
    precision.lower(model, "bf16", config.keep)
    graph.copy_rest(source, out)
    graph.write(model, out / graph.FILE)
    twin = precision.rounding_twin(graph.read(out / graph.FILE), "bf16")
    return parity.matched(source, out, config, "Try keep=['Softmax', 'LayerNormalization']", twin)
