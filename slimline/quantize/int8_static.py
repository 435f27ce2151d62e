"""Static int8: weights and what they are multiplied with are 8-bit integers, by scales fixed beforehand.

For TensorRT, which multiplies what stands between Q/DQ pairs in integers: symmetric, a scale for each column of a
matrix and one for each activation, chosen on calibration texts by the least squared error (Migacz, 8-bit Inference
with TensorRT, 2017, by entropy; Nagel et al., arXiv 2106.08295, by error, section 3.1). All else is half precision.
Takes the unfused graph. On a processor take int8_dynamic: these pairs save room there, and no time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from slimline import calibrate
from slimline.technique import Metrics

NEEDS = GIVES = "onnx"


class Config(calibrate.Calibrated):
    clip: Literal["error", "largest"] = Field(
        "error", description="what a scale covers: what gives the least squared error, or the largest number"
    )


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the Q/DQ graph and the source's other files. Raises ModelError where it strays too far."""
    largest = config.clip == "largest"
    return calibrate.quantize(source, out, config, "int8", lambda seen: seen.largest if largest else seen.clip(127))
