"""FP8 language models: weights and activations in E4M3, which GPUs from Ada and Hopper on multiply at twice the speed.

Weights get a scale for each output. Activations get one for each token, found while running (dynamic: no text is
needed), or one for each map, calibrated on text (static: faster, and what lies beyond the calibrated range is cut).
A float of 8 bits keeps three binary digits whatever the size, so outliers cost little and nothing has to be learned
(Micikevicius et al., 2022, arXiv 2209.05433). The result is a folder for vLLM (float-quantized); models that are ONNX
graphs have a technique of their own, quantize.fp8. Needs one layer of memory, and with text its inputs.

Shapes: O = outputs, I = inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from slimline import activations, grid, layerwise, packed, passages
from slimline.errors import ConfigError
from slimline.packed import Scheme
from slimline.passages import Passages
from slimline.technique import Metrics, Stored

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True


class Config(Passages):
    """How activations are scaled, and on which text that is measured."""

    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="a scale for each token while running, or one for each map, calibrated on data"
    )
    data: Stored = Field("", description="documents to calibrate on, for static alone: their split calibration")
    windows: int = Field(32, ge=1, le=65_536, description="of that text, drawn by seed")
    length: int = Field(512, ge=1, le=131_072, description="tokens of one window")
    seed: int = Field(0, ge=0, description="of the windows")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with every layer's maps in E4M3. Embedding and head stay as they are."""
    kind, static = grid.check(source, 0), config.activations == "static"
    scheme = Scheme(8, None, kind="float", activations=config.activations)
    tokens_NT = None
    if static:
        if not config.data:
            raise ConfigError("quantize.fp8_w8a8 with activations='static' needs data to calibrate on. Name a file.")
        tokens_NT = passages.draw(source, config)
    error = size = 0.0
    for layer in layerwise.walk(source, out, tokens_NT, "rounding layers"):
        largest = layer.measure(kind.maps, lambda inputs: inputs.abs().amax(), _larger) if static else {}
        packing = {}
        for name in kind.maps:
            weight_OI = layer.weight(name)
            parts, gone = pack(weight_OI)
            error, size = error + gone, size + float(weight_OI.double().square().sum())
            if static:
                parts[packed.INPUT_SCALE] = activations.scale(largest[name], "float").reshape(1)
            packing[name] = parts
        layer.store(packing)
    grid.finish(source, out, scheme)
    return {"bits": 8.0, "relative_error": (error / size) ** 0.5 if size else 0.0}


def pack(weight_OI: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """A matrix in E4M3 with a scale for each output, and the sum of squares of what that loses."""
    import torch

    scale_O1 = activations.scale(weight_OI.float().abs().amax(1, keepdim=True), "float")
    near_OI = (weight_OI.float() / scale_O1).clamp(-448, 448).to(torch.float8_e4m3fn)
    gone = float((near_OI.float() * scale_O1 - weight_OI).double().square().sum())
    return {".weight": near_OI.contiguous(), packed.SCALE: scale_O1}, gone


def _larger(first: Any, second: Any) -> Any:
    return first.maximum(second)
