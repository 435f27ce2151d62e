"""fp8: weights and what they are multiplied with are 8-bit floats (E4M3), by scales fixed beforehand.

For GPUs from Ada on (compute capability 8.9), through TensorRT: symmetric, one scale a matrix and one an activation,
which covers the largest number seen on calibration texts (Micikevicius et al., arXiv 2209.05433): a float keeps small
numbers fine by itself, so nothing is gained by cutting off large ones. All else is half precision. Takes the unfused
graph.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slimline import calibrate, graph, parity, precision
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(parity.Guard):
    samples: int = Field(256, ge=1, description="calibration texts that activations are measured on")
    attention: bool = Field(False, description="multiply activations with each other in fp8 as well")
    keep: tuple[str, ...] = Field((), description="matrices that stay: parts of their names, such as layer.0/output")
    floats: precision.Float = Field("fp16", description="type of all that is not quantized")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the Q/DQ graph and the source's other files. Raises ModelError where it strays too far."""
    model = precision.plain(source)
    weighed = precision.matrices(model, config.keep)
    mixed = precision.mixings(model, config.keep) if config.attention else {}
    seen = calibrate.magnitudes(model, precision.entering(weighed, mixed), source, Path(config.data), config.samples)
    largest = {name: found.largest for name, found in seen.items()}
    precision.quantize_activations(model, [*weighed, *mixed], largest, "fp8", config.floats)
    precision.quantize_weights(model, weighed, "fp8", config.floats)
    precision.lower(model, config.floats)
    graph.copy_rest(source, out)
    graph.write(model, out / graph.FILE)
    hint = "Try attention=False, more samples, or name in `keep` the matrices that lose most."
    counts = {"num_quantized_matmul": float(len(weighed)), "num_quantized_mixings": float(len(mixed))}
    return {**counts, **parity.guarded(source, out, config, hint)}
