"""The grids that weights are rounded to: whole numbers of 2 to 8 bits, a scale (and perhaps a zero point) a group.

What all weight quantizers share: their options, the scale of a group, rounding to the nearest, and the files that say
which matrix was rounded how. How to choose better than the nearest is what each technique is about.

Shapes: O = outputs, I = inputs, G = groups, C = inputs of one group.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from slimline import decoder, hf, layerwise, packed
from slimline.errors import ConfigError, ModelError
from slimline.packed import Integers, Scheme
from slimline.shards import Weights
from slimline.technique import BaseConfig

if TYPE_CHECKING:
    import torch

SHRINKS = tuple(1 - step / 40 for step in range(17))
"""How far a group's range is narrowed, at the most by 40 %, when the best scale is searched."""


class GridConfig(BaseConfig):
    """Options that all weight quantizers have in common."""

    bits: int = Field(4, ge=2, le=8, description="of each weight")
    group_size: int = Field(64, ge=0, description="neighbouring inputs that share a scale; 0 for one scale an output")
    symmetric: bool = Field(True, description="no zero points: the grid is the same on both sides of zero")
    search: bool = Field(True, description="narrow a group's range where that lowers its squared error")

    @property
    def scheme(self) -> Scheme:
        """How every matrix is stored."""
        return Scheme(self.bits, self.group_size or None, self.symmetric)


def check(source: Path, group_size: int, names: tuple[str, ...] | None = None) -> decoder.Family:
    """The family of a model of floats. Raises ModelError if it is quantized already, ConfigError for groups that do not
    divide a map's inputs.
    """
    values = hf.read_config(source)
    kind, weights = decoder.family(values, source), Weights(source)
    if values.get("quantization_config"):
        raise ModelError(f"{source} is quantized already. Start from the model of floats that it was made of.")
    for name in weights.floats():
        parts = name.removeprefix(f"{kind.layers}.").partition(".")
        if not name.startswith(f"{kind.layers}.") or parts[2].removesuffix(".weight") not in (names or kind.maps):
            continue
        shape = weights.shape(name) or (0, 0)
        inputs = shape[0] if kind.transposed else shape[1]
        if group_size and inputs % group_size:
            fitting = [size for size in (128, 64, 32, 16) if inputs % size == 0 and size <= inputs]
            hint = f"Ask for group_size={fitting[0]}" if fitting else "Ask for group_size=0, one scale an output"
            raise ConfigError(f"group_size {group_size} does not divide the {inputs} inputs of {name}. {hint}.")
    return kind


def fit(
    weight_OI: torch.Tensor, scheme: Scheme, importance_I: torch.Tensor | None = None, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scale [O, G] float16, zero [O, G] int8 or None) with which rounding to the nearest errs least.

    Without `search` the grid spans each group exactly. With it, ranges narrower by up to 40 % are tried, and per group
    the one with the least squared error wins, each input weighed by `importance_I` (such as its mean square) if given.
    Scales are float16, as they are stored, so that what is searched is what is read back.
    """
    import torch

    groups = weight_OI.shape[1] // (scheme.group_size or weight_OI.shape[1])
    weight_OGC = weight_OI.float().reshape(len(weight_OI), groups, -1)
    high_OG, low_OG = weight_OGC.amax(2).clamp(min=0), weight_OGC.amin(2).clamp(max=0)
    loud_GC = torch.ones_like(weight_OGC[0]) if importance_I is None else importance_I.float().reshape(groups, -1)
    best: tuple[torch.Tensor, torch.Tensor | None] | None = None
    least_OG = torch.full_like(high_OG, torch.inf)
    for shrink in SHRINKS if search else SHRINKS[:1]:
        scale_OG, zero_OG = _grid(low_OG * shrink, high_OG * shrink, scheme)
        numbers_OI = nearest(weight_OI, scale_OG, zero_OG, scheme.bits)
        gone_OGC = Integers(numbers_OI, scale_OG, zero_OG).floats().reshape(len(weight_OI), groups, -1) - weight_OGC
        error_OG = (gone_OGC.square() * loud_GC).sum(2)
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        if best is None:
            best = (scale_OG, zero_OG)
        else:
            kept = torch.where(better_OG, zero_OG, best[1]) if zero_OG is not None and best[1] is not None else None
            best = (torch.where(better_OG, scale_OG, best[0]), kept)
    assert best is not None
    return best


def _grid(low_OG: torch.Tensor, high_OG: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale, and zero point, of grids that span from low (at most 0) to high (at least 0)."""
    import torch

    steps, lowest = 2**scheme.bits - 1, -(2 ** (scheme.bits - 1))
    span_OG = torch.maximum(high_OG, -low_OG) * 2 if scheme.symmetric else high_OG - low_OG
    tiny = torch.finfo(torch.float16).tiny
    scale_OG = torch.where(span_OG > 0, span_OG / steps, 1.0).clamp(tiny, torch.finfo(torch.float16).max).half()
    if scheme.symmetric:
        return scale_OG, None
    zero_OG = (lowest - low_OG / scale_OG.float()).round().clamp(lowest, lowest + steps)
    return scale_OG, zero_OG.to(torch.int8)


def nearest(weight_OI: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, bits: int) -> torch.Tensor:
    """int8 [O, I]: the whole numbers that come nearest."""
    import torch

    lowest = -(2 ** (bits - 1))
    steps_OGC = weight_OI.float().reshape(*scale_OG.shape, -1) / scale_OG.float().unsqueeze(2)
    if zero_OG is not None:
        steps_OGC = steps_OGC + zero_OG.float().unsqueeze(2)
    numbers_OI: torch.Tensor = steps_OGC.round().clamp(lowest, lowest + 2**bits - 1).to(torch.int8).flatten(1)
    return numbers_OI


def finish(source: Path, out: Path, schemes: Scheme | dict[str, Scheme]) -> None:
    """Write config.json and the rest: how all maps of all layers are stored, or how each module, by its whole name."""
    if isinstance(schemes, Scheme):
        kind = decoder.family(hf.read_config(source), source)
        places = [f"{kind.layers}.{i}.{name}" for i in range(layerwise.depth(source)) for name in kind.maps]
        schemes = dict.fromkeys(places, schemes)
    decoder.copy_rest(source, out, {"quantization_config": packed.settings(schemes)})
