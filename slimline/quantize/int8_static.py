"""Static int8: weights and what they are multiplied with are 8-bit integers, by scales fixed beforehand.

For TensorRT, which multiplies what stands between Q/DQ pairs in integers: symmetric, a scale for each column of a
matrix and one for each activation, chosen on calibration texts by the least squared error (Migacz, 8-bit Inference
with TensorRT, 2017, by entropy; Nagel et al., arXiv 2106.08295, by error, section 3.1). All else is half precision.
Takes the unfused graph. On a processor take int8_dynamic: static Q/DQ of this kind is slower than float32 there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slimline import calibrate, graph, parity, precision
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(parity.Guard):
    samples: int = Field(256, ge=1, description="calibration texts that activations are measured on")
    clip: Literal["error", "largest"] = Field(
        "error", description="what a scale covers: what gives the least squared error, or the largest number"
    )
    attention: bool = Field(False, description="multiply activations with each other in int8 as well")
    keep: tuple[str, ...] = Field((), description="matrices that stay: parts of their names, such as layer.0/output")
    floats: precision.Float = Field("fp16", description="type of all that is not quantized")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the Q/DQ graph and the source's other files. Raises ModelError where it strays too far."""
    model = precision.plain(source)
    weighed = precision.matrices(model, config.keep)
    mixed = precision.mixings(model, config.keep) if config.attention else {}
    seen = calibrate.magnitudes(model, precision.entering(weighed, mixed), source, Path(config.data), config.samples)
    largest = {name: found.clip(127) if config.clip == "error" else found.largest for name, found in seen.items()}
    precision.quantize_activations(model, [*weighed, *mixed], largest, "int8", config.floats)
    precision.quantize_weights(model, weighed, "int8", config.floats)
    precision.lower(model, config.floats)
    graph.copy_rest(source, out)
    graph.write(model, out / graph.FILE)
    hint = "Try attention=False, more samples, or name in `keep` the matrices that lose most."
    counts = {"num_quantized_matmul": float(len(weighed)), "num_quantized_mixings": float(len(mixed))}
    return {**counts, **parity.guarded(source, out, config, hint)}
