"""Rotation: turn the model's inner spaces so that no channel stands out, and every quantizer after it errs less.

A transformer of norms that only divide by the root mean square (RMSNorm) gives the same answers when its residual
stream is turned by an orthogonal matrix: what writes the stream is turned forwards, what reads it backwards, the norms'
weights having moved into their readers (QuaRot, Ashkboos et al., 2024, arXiv 2404.00456). The values of every head can
be turned likewise, between the value map and the one after the attention (R2 of SpinQuant, Liu et al., 2024, arXiv
2405.16406), in every family. A Hadamard matrix with random signs spreads an outlier over all channels. Floats go in and
floats come out: put it before another quantizer. Nothing is learned, no text is needed, memory is one layer, and what
the model answers changes only by the rounding of the type that its weights are stored in.

A head that is the embedding cannot keep both jobs once the last norm's weights have moved into it, so a tied model's
stream is turned only on request, at the price of storing the head on its own.

Shapes: V = vocabulary, W = width, D = width of a head, O = outputs, I = inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from slimline import decoder, equivalent, grid, hf, layerwise, rotation
from slimline.decoder import Family
from slimline.errors import ConfigError, ModelError
from slimline.layerwise import Layer
from slimline.shards import Weights
from slimline.technique import BaseConfig, Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True


class Config(BaseConfig):
    """What is turned, and by what."""

    stream: Literal["auto", "yes", "no"] = Field(
        "auto", description="turn the residual stream; auto is yes where norms allow it and no tie is broken"
    )
    heads: bool = Field(True, description="turn the values of every head")
    untie: bool = Field(False, description="store the head beside the embedding where that lets the stream be turned")
    form: Literal["hadamard", "random"] = Field("hadamard", description="of the matrices; signs are random in both")
    seed: int = Field(0, ge=0, description="of the signs or of the random matrices")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the turned model, of the same shapes and, unless a head was untied, of the same size."""
    import torch

    kind, weights = grid.check(source, 0), Weights(source)
    model_type, tied = str(hf.read_config(source)["model_type"]), is_tied(source)
    stream_WW = None
    if turns_stream(source, kind, weights, tied, config):
        _, width = weights.shape(f"{kind.embedding}.weight") or (0, 0)
        stream_WW = torch.from_numpy(rotation.matrix(width, config.form, config.seed))
    untied = tied and stream_WW is not None
    around = turn_around(kind, model_type, weights, stream_WW, tied) if stream_WW is not None else None
    for layer in layerwise.walk(source, out, what="turning layers", change_rest=around):
        if stream_WW is not None:
            turn_stream(layer, stream_WW.to(layer.devices[0]), model_type)
        if config.heads:
            width = equivalent.values(layer).width
            turned_DD = torch.from_numpy(rotation.matrix(width, config.form, config.seed))
            turn_values(layer, turned_DD.to(layer.devices[0]))
        layer.store()
    decoder.copy_rest(source, out, {"tie_word_embeddings": False} if untied else None)
    return {"stream": float(stream_WW is not None), "heads": float(config.heads), "untied": float(untied)}


def is_tied(source: Path) -> bool:
    """Whether a model's head is its embedding: what config.json says, or its family's habit."""
    from transformers import AutoConfig

    return bool(AutoConfig.for_model(**hf.read_config(source)).tie_word_embeddings)


def turns_stream(source: Path, kind: Family, weights: Weights, tied: bool, config: Config) -> bool:
    """Whether the residual stream is turned. Raises ModelError or ConfigError if it was asked for and cannot be."""
    if config.stream == "no":
        return False
    between = norms_between(kind, weights)
    if not kind.root_mean_square or between:
        if config.stream == "auto":
            return False
        why = f"its norm {between[0]} stands between a map and the stream" if between else "its norms subtract a mean"
        raise ModelError(f"the stream of {source} cannot be turned: {why}. Ask for stream='no' to turn heads alone.")
    if tied and not config.untie:
        if config.stream == "auto":
            return False
        embedding_VW = weights.raw(f"{kind.embedding}.weight")
        raise ConfigError(
            f"{source} has its embedding as its head. To turn the stream the head must be stored on its own, "
            f"{embedding_VW.numel() * embedding_VW.element_size():,} bytes more. Ask for untie=true, or stream='no'."
        )
    return True


def norms_between(kind: Family, weights: Weights) -> list[str]:
    """The norms of the first layer through which its maps' outputs go into the stream, as Gemma 2 has them."""
    first = f"{kind.layers}.0"
    names = [name.removeprefix(f"{first}.").removesuffix(".weight") for name in weights.below(first)]
    own = (kind.before_attention, kind.before_feed, *kind.maps)
    inside = (f"{kind.attention}.", "mlp.")
    return [name for name in names if name not in own and not name.startswith(inside) and not name.endswith(".bias")]


def turn_stream(layer: Layer, stream_WW: torch.Tensor, model_type: str) -> None:
    """Turn what the layer reads from the stream and what it writes into it; its norms then multiply by 1."""
    kind = layer.kind
    for norm, readers in equivalent.norm_readers(kind).items():
        equivalent.fold_norm(layer, norm, model_type)
        for name in readers:
            weight_OW = layer.weight(name)
            weight_OW.copy_(weight_OW.double() @ stream_WW)
    for name in (kind.mixed, kind.down):
        weight_WI, bias_W = layer.weight(name), layer.map(name).bias
        weight_WI.copy_(stream_WW.T @ weight_WI.double())
        if bias_W is not None:
            bias_W.data.copy_(bias_W.data.double() @ stream_WW)


def turn_values(layer: Layer, turned_DD: torch.Tensor) -> None:
    """Turn every head of values, and the columns that read it: the same way for all, so that queries may share."""
    value = equivalent.values(layer)
    weight_RI, bias_O = layer.weight(layer.kind.value)[value.rows], layer.map(layer.kind.value).bias
    heads_GDI = weight_RI.double().reshape(value.groups, value.width, -1)
    weight_RI.copy_((turned_DD.T @ heads_GDI).flatten(0, 1))
    if bias_O is not None:
        heads_GD = bias_O.data[value.rows].double().reshape(value.groups, value.width)
        bias_O.data[value.rows] = (heads_GD @ turned_DD).flatten().to(bias_O.dtype)
    mixed_OI = layer.weight(layer.kind.mixed)
    heads_OHD = mixed_OI.double().reshape(-1, value.heads, value.width)
    mixed_OI.copy_((heads_OHD @ turned_DD).flatten(1))


def turn_around(
    kind: Family, model_type: str, weights: Weights, stream_WW: torch.Tensor, tied: bool
) -> layerwise.Change:
    """What becomes of embedding, last norm and head. A tied embedding gives a head of its own beside itself."""
    import torch

    norm, embedding, head = (f"{name}.weight" for name in (kind.norm, kind.embedding, kind.head))
    gain_W = equivalent.gain(weights.raw(norm), model_type)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if name == norm:
            return equivalent.weight_of(torch.ones_like(gain_W), model_type)
        if name == head:
            return {} if tied else {head: (tensor.double() * gain_W) @ stream_WW}
        if name == embedding:
            turned = {embedding: tensor.double() @ stream_WW}
            return turned | ({head: (tensor.double() * gain_W) @ stream_WW} if tied else {})
        return tensor

    return change
