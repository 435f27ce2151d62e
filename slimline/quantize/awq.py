"""AWQ: make the weights of loud inputs larger before rounding, and their inputs smaller by as much.

Rounding to the nearest hurts most where inputs are loud. A scale for each input, s = loudness^alpha, is multiplied into
the map and divided out of what comes before it (a norm, the values under the attention, the gated half of the
feed-forward part), so that the model computes the same and the grid spends its precision where it is heard; alpha is
searched for least loss of the maps' output (Lin et al., 2023, arXiv 2306.00978). Then each group's range is narrowed
where that helps. Needs calibration text; memory is a layer, its inputs and their second moments. Faster than GPTQ.

Shapes: O = outputs, I = inputs, G = groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from slimline import grid, hf, layerwise, obq, packed
from slimline.decoder import Family
from slimline.errors import ModelError
from slimline.grid import GridConfig
from slimline.packed import Integers, Scheme
from slimline.passages import Passages, draw
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True
ONE_MORE = ("gemma", "gemma2", "gemma3_text")
"""Families whose norms multiply by 1 + weight."""


class Config(GridConfig, Passages):
    """The grid, the calibration text, and how finely scales are searched."""

    steps: int = Field(20, ge=1, description="values of alpha from 0 up to 1 that are tried")


class Fold(NamedTuple):
    """Where the scale of some maps' inputs can be divided out, without changing what the layer computes."""

    readers: tuple[str, ...]
    """All maps that read these activations, in the order they run."""
    before: str
    """The module that makes them: a norm, or a map whose outputs they are."""
    first: int = 0
    """The first of that map's outputs that are scaled; those after it are too."""
    repeats: int = 1
    """How many queries' heads share one of values: their inputs share its scale."""
    head: int = 1
    """Features of a head."""


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with every layer's maps packed, and the scales folded away. Embedding and head stay floats."""
    kind, tokens_NT = grid.check(source, config.group_size), draw(source, config)
    values, totals, scheme = hf.read_config(source), Metrics(), config.scheme
    for layer in layerwise.walk(source, out, tokens_NT, "rounding layers", totals=totals):
        seen = layer.measure([group[0] for group in kind.readers], lambda x_TI: x_TI.T @ x_TI)
        hessians = {name: seen[group[0]] for group in kind.readers for name in group}
        if not all(hessian_II.isfinite().all() for hessian_II in seen.values()):
            raise ModelError(f"what enters the maps of {layer.name} is not finite. Is {source} a working model?")
        for place in folds(kind, values, layer.module):
            weights = [layer.weight(name) for name in place.readers]
            scale_I = best_scale(weights, hessians[place.readers[0]], scheme, config.steps, place)
            fold(layer.module, kind, place, scale_I, one_more=values["model_type"] in ONE_MORE)
            for name in place.readers:
                hessians[name] = hessians[name] / (scale_I[:, None] * scale_I)
        packing, lost, output = {}, 0.0, 0.0
        for name in kind.maps:
            weight_OI, hessian_II = layer.weight(name), hessians[name]
            whole = nearest(weight_OI, hessian_II, scheme, config.search)
            lost += obq.loss(weight_OI, hessian_II, whole)
            output += float(((weight_OI @ hessian_II) * weight_OI).sum())
            packing[name] = packed.pack(whole, config.bits)
        layer.numbers = {"loss": lost, "output": output}
        layer.store(packing)
    grid.finish(source, out, scheme)
    error = (totals["loss"] / (totals["output"] or 1.0)) ** 0.5
    return {"bits": float(config.bits), "calibration_tokens": float(tokens_NT.size), "relative_error": error}


def folds(kind: Family, values: Mapping[str, Any], module: Any) -> list[Fold]:
    """All places of a layer whose inputs can be scaled.

    Left out are: norms that come after what they follow is added (early OPT), values whose heads do not fit the map
    after the attention, and feed-forward parts whose activation does not let a scale through.
    """
    groups = {group[0]: group for group in kind.readers}
    attention, feed = groups[kind.query], next(group for group in kind.readers if kind.up in group)
    if kind.before_attention == kind.before_feed:
        places = [Fold((*attention, *feed), kind.before_attention)]
    else:
        places = [Fold(attention, kind.before_attention), Fold(feed, kind.before_feed)]
    if not values.get("do_layer_norm_before", True):
        places = []
    inputs, heads = _shape(module, kind, kind.mixed)[1], int(values.get("num_attention_heads") or values["n_head"])
    size = int(values.get("head_dim") or int(values.get("hidden_size") or values["n_embd"]) // heads)
    made = _shape(module, kind, kind.value)[0]
    shared = made if kind.value != kind.query else _values_of(made, inputs)
    if shared and inputs % shared == 0 and shared % size == 0:
        places.append(Fold((kind.mixed,), kind.value, made - shared, inputs // shared, size))
    feed_inputs, rows = _shape(module, kind, kind.down)[1], _shape(module, kind, kind.up)[0]
    if kind.gate or values.get("activation_function") == "relu":
        places.append(Fold((kind.down,), kind.up, rows - feed_inputs))
    return places


def _values_of(rows: int, inputs: int) -> int:
    """Of a matrix that makes queries, keys and values, the rows for values: as many as for keys, the last ones."""
    return (rows - inputs) // 2


def _shape(module: Any, kind: Family, name: str) -> tuple[int, int]:
    shape = tuple(module.get_submodule(name).weight.shape)
    return (shape[1], shape[0]) if kind.transposed else (shape[0], shape[1])


def best_scale(
    weights: Sequence[torch.Tensor], hessian_II: torch.Tensor, scheme: Scheme, steps: int, place: Fold
) -> torch.Tensor:
    """[I]: of the scales loudness^alpha the one with which rounding loses least of these maps' output."""
    import torch

    loud_I = shared(hessian_II.diagonal().sqrt(), place)
    loud_I = (loud_I / loud_I.max().clamp(min=1e-30)).clamp(min=1e-4)  # silent inputs: no scale is infinite
    least, best_I = torch.inf, torch.ones_like(loud_I)
    for step in range(steps):
        scale_I = loud_I ** (step / steps)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        scaled_II = hessian_II / (scale_I[:, None] * scale_I)
        lost = 0.0
        for weight_OI in weights:
            lost += obq.loss(weight_OI * scale_I, scaled_II, nearest(weight_OI * scale_I, scaled_II, scheme, False))
        if lost < least:
            least, best_I = lost, scale_I
    return best_I


def shared(loud_I: torch.Tensor, place: Fold) -> torch.Tensor:
    """The same number for all inputs that come of one value: their mean square."""
    if place.repeats == 1:
        return loud_I
    loud_KRD = loud_I.reshape(-1, place.repeats, place.head)
    return loud_KRD.square().mean(1, keepdim=True).sqrt().expand_as(loud_KRD).reshape(-1)


def nearest(weight_OI: torch.Tensor, hessian_II: torch.Tensor, scheme: Scheme, search: bool) -> Integers:
    """Rounded to the nearest; with `search` on ranges that are narrowed where the inputs say that it helps."""
    scale_OG, zero_OG = grid.fit(weight_OI, scheme, hessian_II.diagonal(), search)
    return Integers(grid.nearest(weight_OI, scale_OG, zero_OG, scheme.bits), scale_OG, zero_OG)


def fold(module: Any, kind: Family, place: Fold, scale_I: torch.Tensor, one_more: bool) -> None:
    """Multiply the inputs' columns of all readers by the scale, and divide what comes before them by it, in place."""
    for name in place.readers:
        weight = module.get_submodule(name).weight.data
        weight *= scale_I[:, None] if kind.transposed else scale_I
    made = module.get_submodule(place.before)
    if place.before in (kind.before_attention, kind.before_feed):
        made.weight.data = (made.weight.data + 1) / scale_I - 1 if one_more else made.weight.data / scale_I
        if getattr(made, "bias", None) is not None:
            made.bias.data /= scale_I
        return
    made_I = scale_I.reshape(-1, place.repeats, place.head)[:, 0].reshape(-1) if place.repeats > 1 else scale_I
    rows = made.weight.data.T if kind.transposed else made.weight.data
    rows[place.first :] /= made_I[:, None]
    if made.bias is not None:
        made.bias.data[place.first :] /= made_I
