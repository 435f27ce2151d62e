"""fp8: weights and what they are multiplied with are 8-bit floats (E4M3), by scales fixed beforehand.

For GPUs from Ada on (compute capability 8.9), through TensorRT: symmetric, one scale a matrix and one an activation,
which covers the largest number seen on calibration texts (Micikevicius et al., arXiv 2209.05433): a float keeps small
numbers fine by itself, so nothing is gained by cutting off large ones. All else is half precision. Takes the unfused
graph.
"""

from __future__ import annotations

from pathlib import Path

from slimline import calibrate
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(calibrate.Calibrated):
    pass


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the Q/DQ graph and the source's other files. Raises ModelError where it strays too far."""
    return calibrate.quantize(source, out, config, "fp8", lambda seen: seen.largest)
