"""Families of language models on both sides: what llama.cpp calls a setting or a tensor, and what transformers does.

A tensor's name in one is found from its name in the other by the tables of the `gguf` package, asked with the names
that the transformers model really has (built without memory, on the device "meta"). Three things are stored otherwise:
llama's query and key rows, whose pairs are neighbours for llama.cpp and half a head apart for transformers (`turn`);
the norms of gemma, to which llama.cpp has added the one that transformers adds while running; and the maps of gpt2,
which lie the other way.

Shapes: R = rows, C = columns, N = heads, H = width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from slimline.errors import ModelError

Array = np.ndarray[Any, np.dtype[Any]]

DECODER = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GPT2 = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
HEAD = {"attention.key_length": "head_dim"}
SLIDING = {"attention.sliding_window": "sliding_window"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
GELU = "gelu_pytorch_tanh"
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """One architecture of llama.cpp and the model type of transformers that it is."""

    model_type: str
    keys: dict[str, str]
    """What llama.cpp calls a setting, without the architecture before it, and what config.json does."""
    optional: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False
    """Whether query and key rows are turned in neighbouring pairs."""
    norms_plus: float = 0.0
    """What has been added to every norm's weight."""
    transposed: bool = False
    theta: float = 10_000.0
    """What rope.freq_base is where the file does not say."""
    activation: str = "silu"


FAMILIES = {
    "llama": Family("llama", DECODER, HEAD, interleaved=True),
    "qwen2": Family("qwen2", DECODER),
    "qwen3": Family("qwen3", DECODER, HEAD),
    "gemma": Family("gemma", DECODER, HEAD, norms_plus=1.0, activation=GELU),
    "gemma2": Family("gemma2", DECODER, HEAD | SLIDING | CAPS, norms_plus=1.0, activation=GELU),
    "gemma3": Family("gemma3_text", DECODER, HEAD | SLIDING | CAPS, norms_plus=1.0, theta=1e6, activation=GELU),
    "phi3": Family("phi3", DECODER, {"rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "gpt2": Family("gpt2", GPT2, transposed=True, activation="gelu_new"),
}
ARCHITECTURES = {family.model_type: name for name, family in FAMILIES.items()} | {"mistral": "llama"}
"""Which architecture of llama.cpp runs a model type."""


class Place(NamedTuple):
    """A tensor of a transformers model: its name there, its name in GGUF, and its shape there."""

    name: str
    gguf: str
    shape: tuple[int, ...]


def family_of(fields: dict[str, Any], where: str) -> tuple[str, Family]:
    """The architecture a file states. Raises ModelError if it is none of FAMILIES."""
    name = fields.get("general.architecture")
    if name not in FAMILIES:
        raise ModelError(f"{where} is of the architecture {name!r}. This version takes: {', '.join(FAMILIES)}.")
    return str(name), FAMILIES[str(name)]


def places(values: dict[str, Any], where: str) -> list[Place]:
    """Every tensor of the model that config.json describes, in the order of their names."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = ARCHITECTURES[values["model_type"]]
    try:
        config = AutoConfig.for_model(**values)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"{where}: its settings make no {values['model_type']} model: {error}.") from None
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    found = []
    for name, tensor in sorted(model.state_dict().items()):
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        there = table.get_name(name, (".weight", ".bias"))
        if there is None:
            raise ModelError(f"{where}: llama.cpp has no place for {name!r}. Take a model of another family.")
        found.append(Place(name, there, tuple(tensor.shape)))
    return found


def stored_shape(family: Family, place: Place) -> tuple[int, ...]:
    """The shape that a tensor has in GGUF."""
    return place.shape[::-1] if _lies_the_other_way(family, place) else place.shape


def from_gguf(family: Family, place: Place, values: dict[str, Any]) -> Callable[[Array], Array] | None:
    """What turns a whole tensor of GGUF into that of transformers; None if they are the same."""
    if (heads := _heads(family, place, values)) is not None:
        return lambda weight: turn(weight, heads, weight.shape[0] // heads // 2)
    if family.norms_plus and place.name.endswith("norm.weight"):
        return lambda weight: weight - np.float32(family.norms_plus)
    return np.transpose if _lies_the_other_way(family, place) else None


def to_gguf(family: Family, place: Place, values: dict[str, Any]) -> Callable[[Array], Array] | None:
    """What turns a whole tensor of transformers into that of GGUF; None if they are the same."""
    if (heads := _heads(family, place, values)) is not None:
        return lambda weight: turn(weight, heads, 2)
    if family.norms_plus and place.name.endswith("norm.weight"):
        return lambda weight: weight + np.float32(family.norms_plus)
    return np.transpose if _lies_the_other_way(family, place) else None


def turn(weight_RC: Array, heads: int, inner: int) -> Array:
    """The rows of every head, counted in another order: what was row a * (H / inner) + b becomes row b * inner + a."""
    parts = weight_RC.reshape(heads, inner, weight_RC.shape[0] // heads // inner, *weight_RC.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight_RC.shape)


def _heads(family: Family, place: Place, values: dict[str, Any]) -> int | None:
    if not family.interleaved or not place.gguf.endswith(
        ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
    ):
        return None
    return int(values["num_attention_heads" if ".attn_q." in place.gguf else "num_key_value_heads"])


def _lies_the_other_way(family: Family, place: Place) -> bool:
    return family.transposed and place.name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
