"""Width: fewer neurons, heads and hidden channels, as many in every layer, so that any runtime reads the result.

What is worth least goes for good, by the size of activations alone and so without gradients (Minitron: Muralidharan et
al., 2024, arXiv 2407.14679). A channel of activations is worth its mean magnitude over the tokens of a window, L2 over
windows: a neuron by what enters the map down from it, a head by the sum of its channels where they enter the map after
the attention, a hidden channel by what leaves the norms, over all layers. Where query heads share a key and a value,
they go together. Which neurons and heads go is each layer's own affair; hidden channels are the same for all.

What stays has the weights that it had: without some neurons or heads the model equals the source in which they give
nothing. For hidden channels that holds too, since norms over fewer channels are scaled (and their epsilon with them) to
divide by the same length; LayerNorm's mean alone is then over fewer. Costs two runs of the calibration text and one
layer of memory. Quality falls at once; distillation afterwards wins most back, at some hundredths of a training's cost.

Shapes: N = windows, T = tokens, X = tokens of several windows, I = inputs of a map, W = hidden channels.
"""

# Long because what goes from each tensor, what that does to norms and what config.json says of it must agree.
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from slimline import decoder, grid, hf, layerwise, passages, sparse
from slimline.decoder import Family
from slimline.errors import ConfigError, ModelError
from slimline.shards import Weights
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True
SQUARE = ("gpt2", "opt")
"""Families whose heads together are as wide as the hidden state, always."""
GEMMA = ("gemma", "gemma2", "gemma3_text")
"""Families whose norms multiply by 1 + weight, and that multiply embeddings by the root of the hidden size."""
NEURONS = {"gpt2": "n_inner", "opt": "ffn_dim"}
"""What config.json calls the neurons of a layer, where not intermediate_size."""


class Config(passages.Passages):
    """Options of prune.width."""

    neurons: float = Field(0.25, ge=0, lt=1, description="fraction of every layer's feed-forward neurons that goes")
    heads: float = Field(0, ge=0, lt=1, description="fraction of every layer's heads that goes, in whole groups of GQA")
    channels: float = Field(0, ge=0, lt=1, description="fraction of the hidden channels that goes, in all layers")
    multiple: int = Field(
        32, ge=1, description="what stays of neurons and channels is a multiple of this, for kernels and quantizers"
    )
    windows: int = Field(16, ge=1, description="pieces of text that are drawn, at the most")


class Size(NamedTuple):
    """How wide a model is, in every layer."""

    neurons: int
    heads: int
    groups: int
    """Heads of keys and values, each for heads / groups of queries."""
    head_width: int
    channels: int


class Whole(NamedTuple):
    """A model before it is narrowed."""

    kind: Family
    gemma: bool
    tied: bool
    size: Size


class Parts(NamedTuple):
    """Something of each neuron, each group of heads and each hidden channel of a layer: its worth, or which stay."""

    neurons: torch.Tensor
    groups: torch.Tensor
    channels: torch.Tensor


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the narrower model."""
    whole = measured(source)
    size, target = whole.size, wanted(source, whole.size, config)
    changes = renamed(source, size, target)
    tokens_NT = passages.draw(source, config)
    worths = [worth(layer, size, tokens_NT.shape[1]) for layer in layerwise.look(source, tokens_NT, "measuring widths")]
    channels_W = best(sum(each.channels for each in worths), target.channels)

    def change_rest(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return cut_rest(whole, name, tensor, channels_W.to(tensor.device))

    for layer in layerwise.walk(source, out, what="cutting layers", change_rest=change_rest):
        found = worths[layer.index]
        stay = Parts(best(found.neurons, target.neurons), best(found.groups, target.groups), channels_W)
        state = layer.module.state_dict()
        layer.stored = cut_layer(whole, {k: v for k, v in state.items() if v.device.type != "meta"}, stay)
    decoder.copy_rest(source, out, changes)
    before, after = sparse.number(source), sparse.number(out)
    return {
        **{name: float(number) for name, number in target._asdict().items()},
        "neurons_removed": float(len(worths) * (size.neurons - target.neurons)),
        "heads_removed": float(len(worths) * (size.heads - target.heads)),
        "channels_removed": float(size.channels - target.channels),
        "parameters": float(after),
        "parameters_removed": float(before - after),
    }


def measured(source: Path) -> Whole:
    """What the model is. Raises ModelError if its layers are not all of one width."""
    kind, depth, weights = grid.check(source, 0), layerwise.depth(source), Weights(source)
    values, config = hf.read_config(source), decoder.frame(source).config
    heads, channels = int(config.num_attention_heads), int(config.hidden_size)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    head_width = int(getattr(config, "head_dim", None) or channels // heads)

    def widths(name: str) -> set[int]:
        shapes = [weights.shape(f"{kind.layers}.{i}.{name}.weight") or (0, 0) for i in range(depth)]
        return {shape[0] if kind.transposed else shape[1] for shape in shapes}

    neurons = widths(kind.down)
    if len(neurons) > 1 or widths(kind.mixed) != {heads * head_width}:
        raise ModelError(f"{source} has layers of uneven width. Narrow the model that it was made from.")
    size = Size(neurons.pop(), heads, groups, head_width, channels)
    return Whole(kind, values["model_type"] in GEMMA, bool(config.tie_word_embeddings), size)


def wanted(source: Path, size: Size, config: Config) -> Size:
    """The size that the options ask for. Raises ModelError or ConfigError for one that the family cannot have."""
    values = hf.read_config(source)
    if (values["model_type"] in SQUARE or values.get("qk_layernorm")) and (config.heads or config.channels):
        raise ModelError(
            f"{source} is a {values['model_type']} model whose heads are together as wide as its hidden state, always: "
            "neither can be narrowed. Ask for neurons alone."
        )
    groups = fewer("heads", size.groups, config.heads, 1)
    heads = groups * (size.heads // size.groups)
    step = math.lcm(config.multiple, heads)  # llama and others take no hidden state that their heads do not divide
    return Size(
        fewer("neurons", size.neurons, config.neurons, config.multiple),
        heads,
        groups,
        size.head_width,
        fewer("channels", size.channels, config.channels, step),
    )


def fewer(what: str, size: int, drop: float, multiple: int) -> int:
    """How many of `size` stay: the nearest multiple, but one at least. Raises ConfigError if that is all of them."""
    if not drop:
        return size
    stay = max(1, round((1 - drop) * size / multiple)) * multiple
    if stay >= size:
        raise ConfigError(
            f"{what}={drop:g} removes nothing: of {size} a multiple of {multiple} stays. Ask for more"
            + (", or for a smaller multiple." if multiple > 1 else ".")
        )
    return stay


def renamed(source: Path, size: Size, target: Size) -> dict[str, Any]:
    """What changes in config.json. Raises ConfigError if transformers takes no such model."""
    from transformers import AutoConfig

    values, changes = hf.read_config(source), dict[str, Any]()
    if target.neurons != size.neurons:
        changes[NEURONS.get(values["model_type"], "intermediate_size")] = target.neurons
    if (target.heads, target.channels) != (size.heads, size.channels):
        changes |= {"num_attention_heads": target.heads, "num_key_value_heads": target.groups}
        changes |= {"head_dim": target.head_width, "hidden_size": target.channels}
    if target.channels != size.channels:
        whole = AutoConfig.for_model(**values)
        key = "rms_norm_eps" if hasattr(whole, "rms_norm_eps") else "layer_norm_eps"
        changes[key] = getattr(whole, key) * size.channels / target.channels
    try:
        AutoConfig.for_model(**(values | changes))
    except Exception as error:  # each family has errors of its own
        fitting = [n for n in range(1, size.groups + 1) if target.channels % (target.heads // target.groups * n) == 0]
        raise ConfigError(
            f"transformers takes no {values['model_type']} model of {target.heads} heads and {target.channels} hidden "
            f"channels: {str(error).splitlines()[-1].strip()[:120]} Of {size.groups} groups of heads as many may stay "
            f"as {', '.join(map(str, fitting))}."
        ) from None
    return changes


def worth(layer: layerwise.Layer, size: Size, length: int) -> Parts:
    """What each part of a layer is worth."""
    kind = layer.kind

    def squares(x_XI: torch.Tensor) -> torch.Tensor:
        return x_XI.reshape(-1, length, x_XI.shape[1]).abs().mean(dim=1).square().sum(dim=0)

    names = list(dict.fromkeys((kind.query, kind.mixed, kind.up, kind.down)))
    loud = {name: total.sqrt() for name, total in layer.measure(names, squares).items()}
    if not all(values.isfinite().all() for values in loud.values()):
        raise ModelError(f"{layer.name} has inputs that are not finite. Is the model whole?")
    groups = loud[kind.mixed].reshape(size.groups, -1).sum(dim=1)
    return Parts(loud[kind.down], groups, loud[kind.query] + loud[kind.up])


def best(worth: Any, number: int) -> torch.Tensor:
    """Indexes of the `number` that are worth most, in their old order. Ties fall to the lower index."""
    kept: torch.Tensor = worth.argsort(descending=True, stable=True)[:number].sort().values
    return kept


def cut_layer(whole: Whole, state: dict[str, torch.Tensor], stay: Parts) -> dict[str, torch.Tensor]:
    """A layer's tensors without what goes."""
    kind, (outputs, inputs) = whole.kind, kept(whole.kind, whole.size, stay)
    cut = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if module in inputs and part == "weight":
            rows, columns = (outputs[module], inputs[module])[:: -1 if kind.transposed else 1]
            cut[name] = tensor[rows][:, columns]
        elif module in inputs:
            cut[name] = tensor[outputs[module]]
        elif name.startswith(f"{kind.attention}."):
            cut[name] = tensor  # norms of queries and keys, each over one head
        else:
            cut[name] = cut_norm(whole, part, tensor, stay.channels)
    return cut


def kept(kind: Family, size: Size, stay: Parts) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and inputs that stay, of each map. A map that holds several has them one behind the other."""
    import torch

    queries = spread(stay.groups, size.heads // size.groups * size.head_width)
    keys = spread(stay.groups, size.head_width)
    outputs: dict[str, torch.Tensor] = {}
    begin: dict[str, int] = {}
    for name, indexes, whole in (
        (kind.query, queries, size.heads * size.head_width),
        (kind.key, keys, size.groups * size.head_width),
        (kind.value, keys, size.groups * size.head_width),
        (kind.mixed, stay.channels, size.channels),
        (kind.gate, stay.neurons, size.neurons),
        (kind.up, stay.neurons, size.neurons),
        (kind.down, stay.channels, size.channels),
    ):
        own = indexes + begin.get(name, 0)
        outputs[name] = torch.cat([outputs[name], own]) if name in outputs else own
        begin[name] = begin.get(name, 0) + whole
    inputs = dict.fromkeys((kind.query, kind.key, kind.value, kind.gate, kind.up), stay.channels)
    return outputs, {**inputs, kind.mixed: queries, kind.down: stay.neurons}


def spread(groups: torch.Tensor, width: int) -> torch.Tensor:
    """The channels of groups of `width` each."""
    import torch

    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


def cut_norm(whole: Whole, part: str, tensor_W: torch.Tensor, channels_W: torch.Tensor) -> torch.Tensor:
    """A norm over fewer channels, with larger weights, so that it divides by the same length as over all."""
    less_W, scale = tensor_W[channels_W], math.sqrt(whole.size.channels / len(channels_W))
    if part != "weight" or scale == 1:
        return less_W
    return (less_W + 1) * scale - 1 if whole.gemma else less_W * scale


def cut_rest(whole: Whole, name: str, tensor: torch.Tensor, channels_W: torch.Tensor) -> torch.Tensor:
    """Embedding, last norm or head over fewer channels; anything else as it is.

    What gemma multiplies its embeddings by gets smaller, so they get larger. If they are the head too, the last norm
    does not, and its answers stay as they are.
    """
    kind, (module, _, part) = whole.kind, name.rpartition(".")
    embeds = module == kind.embedding or (module == kind.head and whole.tied)
    if module == kind.norm:
        return tensor[channels_W] if whole.gemma and whole.tied else cut_norm(whole, part, tensor, channels_W)
    if part != "weight" or not (embeds or module == kind.head):
        return tensor
    return tensor[:, channels_W] * (math.sqrt(whole.size.channels / len(channels_W)) if whole.gemma and embeds else 1)
