"""SmoothQuant: weights and activations in 8-bit whole numbers, once outliers have moved from activations to weights.

Some channels of a language model's activations are a hundred times as large as the others, and whole numbers that must
hold them hold nothing else well. Divide such a channel in the norm before it and multiply the columns that read it, and
the answer is the same while both are easy to round: s = max|x|^strength / max|w|^(1 - strength) for each channel (Xiao
et al., 2022, arXiv 2211.10438). Besides norms, factors go into values (one for all queries that share them) and into
the ungated half of a gated feed-forward part. Weights get a scale for each output; activations one for each token,
found while running (dynamic), or one for each map (static). vLLM and export.genai multiply them as they are. Needs
calibration text, one layer of memory and its inputs.

Shapes: W = width, H = query heads, G = heads of values, D = width of a head, O = outputs, I = inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from slimline import activations, equivalent, grid, hf, layerwise, packed, passages
from slimline.layerwise import Layer
from slimline.packed import Scheme
from slimline.passages import Passages
from slimline.technique import Metrics, Stored

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True


class Config(Passages):
    """How much is moved, and how activations are scaled."""

    data: Stored = Field(description="documents to measure activations on: their split calibration")
    strength: float = Field(
        0.5, ge=0, le=1, description="1 makes all channels of activations alike, 0 all columns of weights"
    )
    activations: Literal["dynamic", "static"] = Field(
        "dynamic", description="a scale for each token while running, or one for each map, calibrated"
    )
    search: bool = Field(False, description="narrow an output's range where that lowers its squared error")
    windows: int = Field(32, ge=1, le=65_536, description="of that text, drawn by seed")
    length: int = Field(512, ge=1, le=131_072, description="tokens of one window")
    seed: int = Field(0, ge=0, description="of the windows")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with every layer's maps in int8. Embedding and head stay as they are."""
    kind, model_type = grid.check(source, 0), str(hf.read_config(source)["model_type"])
    scheme = Scheme(8, None, activations=config.activations)
    tokens_NT = passages.draw(source, config)
    error = size = 0.0
    for layer in layerwise.walk(source, out, tokens_NT, "smoothing and rounding layers"):
        largest = layer.measure(kind.maps, lambda inputs: inputs.abs().amax(0), _larger)
        largest = smooth(layer, largest, config.strength, model_type)
        packing = {}
        for name in kind.maps:
            weight_OI = layer.weight(name)
            scale_O1, _ = grid.fit(weight_OI, scheme, search=config.search)
            whole = packed.Integers(grid.nearest(weight_OI, scale_O1, None, 8), scale_O1, None)
            error += float((whole.floats() - weight_OI).double().square().sum())
            size += float(weight_OI.double().square().sum())
            packing[name] = {".weight": whole.numbers_OI, packed.SCALE: whole.scale_OG}
            if config.activations == "static":
                packing[name][packed.INPUT_SCALE] = activations.scale(largest[name].amax(), "int").float().reshape(1)
        layer.store(packing)
    grid.finish(source, out, scheme)
    return {"bits": 8.0, "relative_error": (error / size) ** 0.5 if size else 0.0}


def smooth(layer: Layer, largest: dict[str, torch.Tensor], strength: float, model_type: str) -> dict[str, torch.Tensor]:
    """Move outliers of a layer's activations into its weights. Returns the largest inputs [I] of every map then."""
    kind, after = layer.kind, dict(largest)
    for norm, readers in equivalent.norm_readers(kind).items():
        factor_W = factors(largest[readers[0]], _loudest(layer, readers), strength)
        equivalent.scale_norm(layer, norm, factor_W, model_type)
        after |= {name: largest[name] / factor_W for name in readers}

    value = equivalent.values(layer)
    shared = (value.groups, value.heads // value.groups, value.width)
    seen_GD, weight_GD = (
        peak_I.reshape(shared).amax(1) for peak_I in (largest[kind.mixed], _loudest(layer, (kind.mixed,)))
    )
    factor_GD = factors(seen_GD, weight_GD, strength)
    equivalent.scale_outputs(layer, kind.value, value.rows, 1 / factor_GD.flatten())
    factor_I = factor_GD.unsqueeze(1).expand(*shared).flatten()
    equivalent.scale_inputs(layer, kind.mixed, factor_I)
    after[kind.mixed] = largest[kind.mixed] / factor_I

    if (rows := equivalent.up_rows(layer)) is not None:
        factor_I = factors(largest[kind.down], _loudest(layer, (kind.down,)), strength)
        equivalent.scale_outputs(layer, kind.up, rows, 1 / factor_I)
        equivalent.scale_inputs(layer, kind.down, factor_I)
        after[kind.down] = largest[kind.down] / factor_I
    return after


def factors(seen: torch.Tensor, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """max|x|^strength / max|w|^(1 - strength) for each channel, in float64; 1 for a channel that is always 0."""
    import torch

    found = seen.double() ** strength / weight.double() ** (1 - strength)
    return torch.where((seen > 0) & (weight > 0), found, 1.0)


def _loudest(layer: Layer, names: tuple[str, ...]) -> torch.Tensor:
    """The largest weight [I] of every column, over maps that read the same inputs."""
    import torch

    return torch.stack([layer.weight(name).abs().amax(0) for name in names]).amax(0)


def _larger(first: Any, second: Any) -> Any:
    return first.maximum(second)
