"""The settings of a language model on both sides: a GGUF's keys and the values of a config.json, either way.

What GGUF has no word for llama.cpp takes for granted; a model that wants it otherwise is refused, since it would run
and answer otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from slimline.errors import ModelError
from slimline.gguf_families import ARCHITECTURES, FAMILIES, HEAD, ROPE_FREQS, Array, Family, family_of

IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
SCALED_BY = {"gemma2": 46, "gemma3": 62}
"""Layers of the one model of each kind whose attention llama.cpp divides by columns / heads."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def settings(
    fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], freqs: Array | None, where: str
) -> dict[str, Any]:
    """config.json's values from a file's settings, the shapes of its tensors and its rope_freqs.weight, if any."""
    architecture, family = family_of(fields, where)

    def said(key: str) -> Any:
        return fields.get(f"{architecture}.{key}")

    values = _numbers(said, family, f"{where}: {architecture}", len(shapes))
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{where} has no token_embd.weight. Give the first or only file of a whole model.")
    values["vocab_size"] = shapes["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values |= {name: fields.get(key) for key, name in IDS.items()}
    if family.transposed:
        return values
    width = values["hidden_size"] // values["num_attention_heads"]
    if HEAD.items() <= family.optional.items():
        values.setdefault("head_dim", width)
    if architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in shapes
        values["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if architecture in SCALED_BY:
        values["query_pre_attn_scalar"] = query_scalar(architecture, values)
    return values | {"rope_parameters": _rope(said, family, values, freqs, where)}


def _numbers(said: Callable[[str], Any], family: Family, where: str, num_tensors: int) -> dict[str, Any]:
    values: dict[str, Any] = {"model_type": family.model_type}
    for key, name in (family.keys | family.optional).items():
        found = said(key)
        if found is None and key == "attention.head_count_kv":
            found = said("attention.head_count")
        if found is None and key in family.optional:
            continue
        whole = type(found) is int and 0 < found < 2**31
        if not whole and not (type(found) is float and 0 < found < math.inf):
            if name != "sliding_window" or found != 0:  # none at all
                raise ModelError(f"{where}.{key} is {found!r}, where a number is needed. Convert the model again.")
            found = None
        values[name] = found
    if family.keys["block_count"] in values and values[family.keys["block_count"]] > num_tensors:
        raise ModelError(f"{where}.block_count is {said('block_count')}, but there are {num_tensors} tensors.")
    return values


def query_scalar(architecture: str, values: dict[str, Any]) -> int:
    """What gemma divides its attention by: the width of a head, but for the deepest model of each kind."""
    if values["num_hidden_layers"] == SCALED_BY[architecture]:
        return int(values["hidden_size"]) // int(values["num_attention_heads"])
    return int(values["head_dim"])


def _rope(
    said: Callable[[str], Any], family: Family, values: dict[str, Any], freqs: Array | None, where: str
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said("rope.freq_base") or family.theta)}
    kind, factor = said("rope.scaling.type"), said("rope.scaling.factor")
    if kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = said("rope.scaling.original_context_length")
    elif kind not in (None, "none"):
        raise ModelError(f"{where}: positions are scaled by {kind!r}, which is not read. Take one with linear or yarn.")
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if freqs is not None:
        rope |= LLAMA3 | {"rope_type": "llama3", "factor": float(freqs.max())}
        wanted = llama3_factors(rope, width)
        if wanted.shape != freqs.shape or not np.allclose(wanted, freqs, rtol=1e-3):
            raise ModelError(f"{where}: its {ROPE_FREQS} is not llama 3's. Bring it in from its own safetensors.")
    if family.model_type == "phi3":
        rope["partial_rotary_factor"] = (said("rope.dimension_count") or width) / width
    if family.model_type == "gemma3_text":  # near and far layers turn at speeds of their own
        near = {"rope_type": "default", "rope_theta": float(said("rope.freq_base_swa") or 10_000.0)}
        return {"full_attention": rope, "sliding_attention": near}
    return rope


def described(plain: dict[str, Any], where: str) -> tuple[str, Family, dict[str, Any]]:
    """Architecture, family and all values, defaults too, of a config.json. Raises ModelError for other models."""
    from transformers import AutoConfig

    kind = plain.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"{where} is of a {kind} model. GGUF is written of: {', '.join(ARCHITECTURES)}.")
    if plain.get("quantization_config"):
        raise ModelError(f"{where}: the model is quantized already. Export the one that it was made from.")
    values: dict[str, Any] = AutoConfig.for_model(**plain).to_dict()
    return ARCHITECTURES[kind], FAMILIES[ARCHITECTURES[kind]], values


def slowed(values: dict[str, Any]) -> Array | None:
    """What rope_freqs.weight holds, for a model with llama 3's slowed turns."""
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    return llama3_factors(rope, values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A GGUF's settings from config.json's values, by key, without the architecture before it. The other way round.

    Raises ModelError for what llama.cpp would compute otherwise.
    """
    architecture = ARCHITECTURES[values["model_type"]]
    family = FAMILIES[architecture]
    _require_the_same(architecture, values, where)
    found = {key: values.get(name) for key, name in (family.keys | family.optional).items()}
    if family.transposed:
        return found | {"feed_forward_length": found["feed_forward_length"] or 4 * values["n_embd"]}
    found["attention.head_count_kv"] = found["attention.head_count_kv"] or values["num_attention_heads"]
    if architecture == "phi3":
        found["attention.sliding_window"] = values.get("sliding_window") or 0
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if "attention.key_length" in found:
        found["attention.value_length"] = found["attention.key_length"] = width
    rope = values["rope_parameters"]
    if architecture == "gemma3":
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    found["rope.freq_base"] = float(rope["rope_theta"])
    found["rope.dimension_count"] = int(width * rope.get("partial_rotary_factor", 1.0))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        found["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    elif kind not in ("default", "llama3") or (kind == "llama3" and architecture != "llama"):
        raise ModelError(f"{where}: positions are scaled by {kind!r}, which is not written to GGUF.")
    return {key: value for key, value in found.items() if value is not None}


def _require_the_same(architecture: str, values: dict[str, Any], where: str) -> None:
    """Raise ModelError for a setting that GGUF has no word for and that is not what llama.cpp takes for granted."""
    family = FAMILIES[architecture]
    wanted: dict[str, Any] = {}
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if values.get(name) is not None:
            wanted[name] = family.activation
    if architecture in SCALED_BY:
        wanted["query_pre_attn_scalar"] = query_scalar(architecture, values)
    if (
        values.get("model_type") == "mistral"
        and (values.get("sliding_window") or 0) < values["max_position_embeddings"]
    ):
        wanted["sliding_window"] = None
    if "use_sliding_window" in values:
        wanted["use_sliding_window"] = False
    for name, value in wanted.items():
        if values.get(name) != value:
            raise ModelError(f"{where}: {name} is {values.get(name)!r}, where llama.cpp takes {value!r} for granted.")


def llama3_factors(rope: dict[str, Any], width: int) -> Array:
    """By how much llama 3 slows each of a head's H / 2 turns: fast ones not at all, slow ones by `factor`."""
    turns = 1.0 / (float(rope["rope_theta"]) ** (np.arange(0, width, 2, dtype=np.float64) / width))
    waves = rope["original_max_position_embeddings"] / (2 * math.pi / turns)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    between = 1 / ((1 - (waves - low) / (high - low)) / factor + (waves - low) / (high - low))
    slowed: Array = np.where(waves > high, 1.0, np.where(waves < low, factor, between)).astype(np.float32)
    return slowed
