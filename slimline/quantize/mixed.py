"""Mixed widths: more bits where the model suffers most, under a budget of bits, rounded as GPTQ does.

First every group of maps that read the same activations (queries, keys and values together, so that servers that fuse
them can) is rounded alone, at each width, and the layer's output compared with what it was, token by token. Then the
bits are given out one step after the other, where a bit of storage lowers the sum of those errors most: greedily along
each group's convex hull, which is the best for the bits that it spends but for the last step. At last everything is
rounded at its width. Costs GPTQ's time and a pass of `probes` windows for each width and group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from slimline import grid, layerwise, obq, packed, passages
from slimline.errors import ConfigError
from slimline.packed import Integers, Scheme
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

    from slimline.layerwise import Layer

NEEDS = GIVES = "hf"
RESUMES = True

Place = tuple[int, tuple[str, ...]]
"""A layer's index, and maps in it that read the same activations."""


class Config(obq.Rounding):
    """The grid, the calibration text, how columns are rounded, and the budget."""

    bits: float = Field(4.5, ge=2, le=8, description="of each weight, on average and at the most")  # type: ignore[assignment]  # the grid's own are whole
    widths: tuple[int, ...] = Field((4, 8), min_length=1, description="bits that a map may get, of 2 to 8")
    probes: int = Field(4, ge=1, description="windows that the suffering is measured on")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with every layer's maps packed. Embedding and head stay floats."""
    kind, widths = grid.check(source, config.group_size), sorted(set(config.widths))
    if not set(widths) <= set(range(2, 9)):
        raise ConfigError(f"widths are {list(config.widths)}, but each is one of 2 to 8 bits. Leave the others out.")
    if config.bits < widths[0]:
        raise ConfigError(f"bits {config.bits:g} is less than the least of widths {widths}. Allow a smaller width.")
    tokens_NT = passages.draw(source, config)
    sizes: dict[Place, int] = {}
    suffering: dict[Place, dict[int, float]] = {}
    for layer in layerwise.look(source, tokens_NT[: config.probes], "measuring what each width costs"):
        for group in kind.readers:
            sizes[layer.index, group] = sum(layer.weight(name).numel() for name in group)
            suffering[layer.index, group] = suffer(layer, group, widths, config)
    given = allocate(sizes, suffering, config.bits)
    schemes = {
        (index, name): Scheme(bits, config.group_size or None, config.symmetric)
        for (index, group), bits in given.items()
        for name in group
    }
    totals = Metrics()
    for layer in layerwise.walk(source, out, tokens_NT, "rounding layers", config.correction > 0, totals=totals):
        here = {name: schemes[layer.index, name] for name in kind.maps}
        rounded = obq.round_layer(layer, here, config)
        layer.numbers = obq.numbers(rounded)
        layer.store({name: packed.pack(one.whole, here[name].bits) for name, one in rounded.items()})
    grid.finish(source, out, {f"{kind.layers}.{index}.{name}": scheme for (index, name), scheme in schemes.items()})
    return {
        "bits": average(sizes, given),
        "calibration_tokens": float(tokens_NT.size),
        **{f"share_of_{width}_bits": _share(sizes, given, width) for width in widths},
        **obq.metrics(totals, config.damp),
    }


def suffer(layer: Layer, group: tuple[str, ...], widths: Sequence[int], config: Config) -> dict[int, float]:
    """At each width: |change of the layer's output|^2 / |output|^2, summed over tokens, when these maps are rounded."""
    assert layer.target_NTW is not None
    found, before = {}, {name: layer.weight(name).clone() for name in group}
    squares_I = layer.measure(group[:1], lambda x_TI: x_TI.square().sum(0))[group[0]]
    for width in widths:
        scheme = Scheme(width, config.group_size or None, config.symmetric)
        for name, weight_OI in before.items():
            scale_OG, zero_OG = grid.fit(weight_OI, scheme, squares_I, config.search)
            whole = Integers(grid.nearest(weight_OI, scale_OG, zero_OG, width), scale_OG, zero_OG)
            layer.weight(name).copy_(whole.floats())
        found[width] = _relative(layer.outputs(), layer.target_NTW)
    for name, weight_OI in before.items():
        layer.weight(name).copy_(weight_OI)
    return found


def _relative(changed_NTW: torch.Tensor, wanted_NTW: torch.Tensor) -> float:
    """Token by token, so that the few whose activations are huge do not count for all: norms level them anyway."""
    gone_NT = (changed_NTW - wanted_NTW).double().square().sum(2)
    return float((gone_NT / wanted_NTW.double().square().sum(2).clamp(min=1e-30)).sum())


def allocate(
    sizes: Mapping[Place, int], suffering: Mapping[Place, Mapping[int, float]], bits: float
) -> dict[Place, int]:
    """The width of each place, at most `bits` a weight on average.

    All begin with the least width. Of all next steps along the places' lower convex hulls the one with the largest fall
    for each bit of storage is taken, as long as it fits; a place whose step does not fit stays where it is.
    """
    given = {place: min(widths) for place, widths in suffering.items()}
    left = bits * sum(sizes.values()) - sum(sizes[place] * width for place, width in given.items())
    open_places = set(given)
    while steps := [
        (fall / sizes[place], place, width)
        for place in given  # in their order: of equal falls the first is taken
        if place in open_places
        for fall, width in [_steepest(suffering[place], given[place])]
        if fall > 0
    ]:
        _, place, width = max(steps, key=lambda step: step[0])
        cost = sizes[place] * (width - given[place])
        if cost > left:
            open_places.remove(place)
            continue
        left -= cost
        given[place] = width
    return given


def _steepest(suffering: Mapping[int, float], width: int) -> tuple[float, int]:
    """(fall for each bit, width) of the next corner of the hull; a fall of 0 if none is lower."""
    falls = [((suffering[width] - suffering[w]) / (w - width), w) for w in suffering if w > width]
    return max(falls, default=(0.0, width))


def average(sizes: Mapping[Place, int], given: Mapping[Place, int]) -> float:
    """Bits of a weight, scales and zero points not counted."""
    return sum(sizes[place] * width for place, width in given.items()) / sum(sizes.values())


def _share(sizes: Mapping[Place, int], given: Mapping[Place, int], width: int) -> float:
    return sum(sizes[place] for place, bits in given.items() if bits == width) / sum(sizes.values())
