"""Layers: leave out those that change least of what passes through them.

A layer's influence is 1 - cos(what enters it, what leaves it), the mean over calibration tokens (ShortGPT: Men et al.,
2024, arXiv 2403.03853). `choose=each` drops the layers of least influence, wherever they are. `choose=run` drops
neighbours together: of all runs of so many layers the one whose end is nearest in angle to its beginning, on the last
tokens of each window (Gromov et al., 2024, arXiv 2403.17887). What stays has the very weights that it had and is
numbered anew, so any runtime reads it, and it is smaller and faster by what is gone, cache included. Costs one run of
the calibration text and one layer of memory; quality falls fast with the number of layers, and distillation afterwards
wins some of it back.

Shapes: N = windows, T = tokens, W = width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from slimline import decoder, grid, hf, layerwise, passages, sparse
from slimline.errors import ConfigError, ModelError
from slimline.shards import Weights, Writer
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True
LAST = 32
"""Tokens at the end of each window by which runs of layers are compared: they have seen the most before them."""


class Config(passages.Passages):
    """Options of prune.layers."""

    drop: float = Field(0.1, ge=0, lt=1, description="fraction of the layers that goes, rounded to whole layers")
    num_layers: int = Field(0, ge=0, description="layers that go; 0 for the fraction that drop says")
    choose: Literal["each", "run"] = Field(
        "each", description="each: those of least influence; run: neighbours, the run that turns its inputs least"
    )
    windows: int = Field(16, ge=1, description="pieces of text that are drawn, at the most")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model without some layers."""
    number = how_many(source, config)
    seen = measure(source, passages.draw(source, config), number)
    stay = choose(seen, number, config.choose)
    write(source, out, stay)
    before, after = sparse.number(source), sparse.number(out)
    return {
        **{f"influence_{i:02}": value for i, value in enumerate(seen.influence)},
        **{f"stays_{i:02}": float(i in stay) for i in range(len(seen.influence))},
        "run_angle": min(seen.angles),
        "layers": float(len(stay)),
        "layers_removed": float(number),
        "parameters": float(after),
        "parameters_removed": float(before - after),
    }


class Seen(NamedTuple):
    """What the layers do to what passes through them."""

    influence: list[float]
    """Of each layer: 1 - cos(in, out), 0 for one that changes nothing but lengths."""
    angles: list[float]
    """Of each run of so many layers, by its first: the angle between in and out, as a fraction of half a turn."""


def how_many(source: Path, config: Config) -> int:
    """Layers that go. Raises ConfigError for none and for all, ModelError where a layer's place is part of its work."""
    grid.check(source, 0)
    depth = layerwise.depth(source)
    number = config.num_layers or round(config.drop * depth)
    if number >= depth:
        raise ConfigError(f"of {depth} layers {number} cannot go: one has to stay. Drop fewer.")
    if config.drop and not number:
        raise ConfigError(f"drop {config.drop:g} of {depth} layers is less than half of one. Ask for num_layers=1.")
    if hf.read_config(source).get("scale_attn_by_inverse_layer_idx"):
        raise ModelError(
            f"{source} divides attention by the number of its layer, so layers cannot move. Keep them all."
        )
    return number


def measure(source: Path, tokens_NT: Any, number: int) -> Seen:
    """Run the text through the model, and compare what enters and what leaves every layer and every run of `number`."""
    influence: list[float] = []
    ends: list[torch.Tensor] = []
    for layer in layerwise.look(source, tokens_NT, "measuring layers"):
        assert layer.target_NTW is not None
        if not layer.target_NTW.isfinite().all():
            raise ModelError(f"{layer.name} gives numbers that are not finite. Is {source} a working model?")
        influence.append(1 - float(cosines(layer.hidden_NTW, layer.target_NTW).mean()))
        ends += [states[:, -LAST:].clone() for states in (layer.hidden_NTW, layer.target_NTW)[bool(ends) :]]
    pairs = zip(ends, ends[number:])
    return Seen(influence, [float(cosines(x, y).clamp(-1, 1).arccos().mean()) / math.pi for x, y in pairs])


def cosines(one_NTW: torch.Tensor, other_NTW: torch.Tensor) -> torch.Tensor:
    """[N, T]: of the angle between two states of one token, in float64."""
    import torch

    pairs = zip(one_NTW, other_NTW)  # a window at a time, so that little is held in float64
    return torch.stack([torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in pairs])


def choose(seen: Seen, number: int, how: Literal["each", "run"]) -> list[int]:
    """The layers that stay, in their order. Ties fall to the earlier layer."""
    depth = len(seen.influence)
    start = seen.angles.index(min(seen.angles))
    by_influence = sorted(range(depth), key=seen.influence.__getitem__)
    gone = by_influence[:number] if how == "each" else range(start, start + number)
    return [i for i in range(depth) if i not in gone]


def write(source: Path, out: Path, stay: list[int]) -> None:
    """Write the model with these layers alone, numbered anew; every tensor is what it was."""
    values = hf.read_config(source)
    kind, weights, writer = decoder.family(values, source), Weights(source), Writer(out, len(stay) + 1)
    names = weights.stored()
    for new, old in enumerate(stay):
        inside = [name for name in names if name.startswith(f"{kind.layers}.{old}.")]
        if not writer.finished(new):
            renamed = {name.replace(f"{kind.layers}.{old}.", f"{kind.layers}.{new}.", 1): name for name in inside}
            writer.write(new, {name: weights.raw(was) for name, was in renamed.items()})
        weights.close()
    around = [name for name in names if not name.startswith(f"{kind.layers}.")]
    if not writer.finished(len(stay)):
        writer.write(len(stay), {name: weights.raw(name) for name in around})
    writer.finish()
    decoder.copy_rest(source, out, renumbered(values, decoder.frame(source).config, stay))


def renumbered(values: dict[str, Any], config: Any, stay: list[int]) -> dict[str, Any]:
    """What changes in config.json. Kinds of layers are listed one by one, since no rule gives them any more."""
    changes: dict[str, Any] = {"n_layer" if "n_layer" in values else "num_hidden_layers": len(stay)}
    if kinds := getattr(config, "layer_types", None):
        changes |= {"layer_types": [kinds[i] for i in stay], "sliding_window_pattern": None}
    if "max_window_layers" in values:
        changes["max_window_layers"] = sum(i < values["max_window_layers"] for i in stay)
    return changes
