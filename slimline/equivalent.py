"""Changes to a layer's weights that change nothing of what it answers: factors moved from one map to the next.

A norm's weights can go into the maps that read it, a factor for each channel out of the norm and into them; what a map
makes of its outputs can be undone in the one that reads those. Which maps read which, where queries share a value, and
norms that multiply by 1 + weight (Gemma) are said here once. Everything is computed in float64.

Shapes: W = width, H = query heads, G = heads of keys and values, D = width of a head, O = outputs, I = inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from slimline.decoder import Family
from slimline.layerwise import Layer

if TYPE_CHECKING:
    import torch

FROM_ONE = ("gemma", "gemma2", "gemma3_text")
"""The families whose norms multiply by 1 + weight."""


def norm_readers(kind: Family) -> dict[str, tuple[str, ...]]:
    """The maps that read each norm of a layer; where attention and feed-forward part share a norm, all of them."""
    found: dict[str, tuple[str, ...]] = {}
    for norm, maps in zip((kind.before_attention, kind.before_feed), (kind.readers[0], kind.readers[2])):
        found[norm] = found.get(norm, ()) + maps
    return found


def gain(weight_W: torch.Tensor, model_type: str) -> torch.Tensor:
    """What a norm with this weight multiplies by, in float64."""
    return weight_W.double() + (1.0 if model_type in FROM_ONE else 0.0)


def weight_of(gain_W: torch.Tensor, model_type: str) -> torch.Tensor:
    """The weight of a norm that multiplies by this, in float64."""
    return gain_W.double() - (1.0 if model_type in FROM_ONE else 0.0)


def fold_norm(layer: Layer, norm: str, model_type: str) -> None:
    """Move what a norm multiplies by into its readers: the norm then only divides by the root mean square."""
    import torch

    weight_W = layer.map(norm).weight.data
    gain_W = gain(weight_W, model_type)
    for name in norm_readers(layer.kind)[norm]:
        scale_inputs(layer, name, gain_W)
    weight_W.copy_(weight_of(torch.ones_like(gain_W), model_type))


def scale_norm(layer: Layer, norm: str, factor_W: torch.Tensor, model_type: str) -> None:
    """Divide a norm's outputs by a factor for each channel, and multiply its readers' columns by it."""
    module = layer.map(norm)
    module.weight.data.copy_(weight_of(gain(module.weight.data, model_type) / factor_W, model_type))
    if getattr(module, "bias", None) is not None:
        module.bias.data.copy_(module.bias.data.double() / factor_W)
    for name in norm_readers(layer.kind)[norm]:
        scale_inputs(layer, name, factor_W)


def scale_inputs(layer: Layer, name: str, factor_I: torch.Tensor) -> None:
    """Multiply a map's columns."""
    weight_OI = layer.weight(name)
    weight_OI.copy_(weight_OI.double() * factor_I)


def scale_outputs(layer: Layer, name: str, rows: slice, factor_R: torch.Tensor) -> None:
    """Multiply some of a map's outputs, its bias included."""
    weight_RI = layer.weight(name)[rows]
    weight_RI.copy_(weight_RI.double() * factor_R.unsqueeze(1))
    if (bias_O := layer.map(name).bias) is not None:
        bias_O.data[rows] = (bias_O.data[rows].double() * factor_R).to(bias_O.dtype)


class Values(NamedTuple):
    """The values of a layer's attention: rows of a map, as heads that several queries may share."""

    rows: slice
    """Of the map that makes them, which may make queries and keys as well."""
    heads: int
    """H"""
    groups: int
    """G"""
    width: int
    """D"""


def values(layer: Layer) -> Values:
    """Where a layer's values are, by the shapes of its own maps."""
    kind, width = layer.kind, int(layer.map(layer.kind.attention).head_dim)
    mixed, outputs = layer.weight(kind.mixed).shape[1], len(layer.weight(kind.value))
    size = outputs if kind.value != kind.query else (outputs - mixed) // 2
    return Values(slice(outputs - size, outputs), mixed // width, size // width, width)


def up_rows(layer: Layer) -> slice | None:
    """The rows of the map `up` that only multiply what the gate gives; None where there is no gate."""
    kind = layer.kind
    if not kind.gate:
        return None
    outputs: Any = len(layer.weight(kind.up))
    return slice(outputs // 2, outputs) if kind.gate == kind.up else slice(0, outputs)
