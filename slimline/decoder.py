"""Decoders in PyTorch: the families there are, where a layer keeps its maps, and models whole or without weights.

A language model is a folder of format hf with the task "text-generation": config.json, tokenizer.json and safetensors,
in one file or in shards (shards.py), whose matrices may be packed integers (packed.py). `load` puts all of it into
memory; `frame` builds the same model without a single weight, which layerwise.py then fills one layer at a time.

Shapes: B = texts, T = tokens, W = width, V = vocabulary.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimline import activations, hf, keys_values, window
from slimline.errors import ModelError
from slimline.shards import Weights

if TYPE_CHECKING:
    import torch

TASK = "text-generation"
FILES = (*hf.TOKENIZER_FILES, "added_tokens.json", "chat_template.jinja", "generation_config.json")
"""What belongs to a language model beside its configuration and weights."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, by name; those of a layer are relative to it."""

    embedding: str
    layers: str
    norm: str
    """The norm before the head."""
    attention: str
    query: str
    key: str
    value: str
    """With query and key the same name where one matrix holds all three."""
    mixed: str
    """The map after the attention, whose columns are heads."""
    gate: str
    """Empty where the feed-forward part has no gate; the same name as `up` where one matrix holds both."""
    up: str
    down: str
    before_attention: str
    before_feed: str
    """The norms whose outputs the attention and the feed-forward part read."""
    root_mean_square: bool = True
    """Whether norms only scale (RMSNorm), so that their weights can be folded into what reads them."""
    transposed: bool = False
    """Whether matrices are stored [inputs, outputs], as GPT-2's Conv1D does."""
    head: str = "lm_head"

    @property
    def readers(self) -> tuple[tuple[str, ...], ...]:
        """A layer's maps in the order they run, those together that read the same activations."""
        groups = ((self.query, self.key, self.value), (self.mixed,), (self.gate, self.up), (self.down,))
        return tuple(tuple(dict.fromkeys(name for name in group if name)) for group in groups)

    @property
    def maps(self) -> tuple[str, ...]:
        """All linear maps of a layer."""
        return tuple(name for group in self.readers for name in group)


def _llama(**changes: Any) -> Family:
    parts: dict[str, Any] = {
        "embedding": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm",
        "attention": "self_attn", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
        "value": "self_attn.v_proj", "mixed": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "before_attention": "input_layernorm", "before_feed": "post_attention_layernorm",
    }  # fmt: skip
    return Family(**(parts | changes))


FAMILIES = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(),
    "gemma2": _llama(before_feed="pre_feedforward_layernorm"),
    "gemma3_text": _llama(before_feed="pre_feedforward_layernorm"),
    "phi3": _llama(
        query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj",
        gate="mlp.gate_up_proj", up="mlp.gate_up_proj",
    ),
    "phi": _llama(
        norm="model.final_layernorm", mixed="self_attn.dense", gate="", up="mlp.fc1", down="mlp.fc2",
        before_feed="input_layernorm", root_mean_square=False,
    ),
    "opt": _llama(
        embedding="model.decoder.embed_tokens", layers="model.decoder.layers", norm="model.decoder.final_layer_norm",
        mixed="self_attn.out_proj", gate="", up="fc1", down="fc2", before_attention="self_attn_layer_norm",
        before_feed="final_layer_norm", root_mean_square=False,
    ),
    "gpt2": Family(
        embedding="transformer.wte", layers="transformer.h", norm="transformer.ln_f", attention="attn",
        query="attn.c_attn", key="attn.c_attn", value="attn.c_attn", mixed="attn.c_proj", gate="", up="mlp.c_fc",
        down="mlp.c_proj", before_attention="ln_1", before_feed="ln_2", root_mean_square=False, transposed=True,
    ),
}  # fmt: skip


def family(values: dict[str, Any], where: str | Path) -> Family:
    """The family of a config.json. Raises ModelError for one that is not known."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"{where} is a {kind} model. Of language models this version takes {', '.join(FAMILIES)}.")
    return FAMILIES[str(kind)]


def is_decoder(folder: Path) -> bool:
    """Whether a folder of format hf holds a language model."""
    return hf.read_config(folder).get("model_type") in FAMILIES


def context(values: dict[str, Any]) -> int:
    """Tokens that a model's positions allow."""
    return int(values.get("max_position_embeddings") or values.get("n_positions") or 2048)


def load(folder: Path, dtype: str = "float32") -> torch.nn.Module:
    """A whole language model in evaluation mode on the best device, its packed matrices as floats.

    Where its config.json asks for inputs of 8 bits, maps round what they are given, as a server will; where it asks for
    a cache of 8 bits, attention rounds its keys and values.

    Raises ModelError if weights are missing, left over or of another shape, or if the family is not known.
    """
    import torch

    values = hf.read_config(folder)
    kind = family(values, folder)
    kept, weights = getattr(torch, dtype), Weights(folder)
    model = frame(folder)
    state: dict[str, Any] = {}
    for name in weights.floats():
        state[name] = weights.read(name, kind.transposed, hf.device()).to(kept)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and (head := f"{kind.head}.weight") in state:
        same = state[head].shape == state[f"{kind.embedding}.weight"].shape
        if not same or not torch.equal(state[head], state[f"{kind.embedding}.weight"]):
            raise ModelError(
                f"{folder} has a head of its own, but its config.json says that it is the embedding. Set "
                "tie_word_embeddings to false there, or remove the head's weights."
            )
    missing, extra = model.load_state_dict(state, strict=False, assign=True)
    lost = [name for name in missing if not (tied and name == f"{kind.head}.weight")]
    extra = [name for name in extra if not name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"))]
    if keys_values.asked(values.get("quantization_config"), str(folder)):
        extra = [name for name in extra if not name.endswith((keys_values.KEY_SCALE, keys_values.VALUE_SCALE))]
    if lost or extra:
        what = f"lacks {', '.join(lost[:3])}" if lost else f"holds {', '.join(extra[:3])}, which its family has not"
        raise ModelError(f"{folder} {what}. Is the checkpoint whole, and its config.json the one it came with?")
    model.tie_weights()
    if settings := values.get("quantization_config"):
        activations.install(model, weights, settings)
        keys_values.install(model, weights, settings)
    whole: torch.nn.Module = model.eval().to(hf.device()).requires_grad_(False)
    return whole


def frame(folder: Path) -> Any:
    """The model of a folder without its weights: parameters are on the meta device, buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    values = hf.read_config(folder)
    family(values, folder)
    values.pop("quantization_config", None)
    values.pop("dtype", None)
    config = AutoConfig.for_model(**values)
    config._attn_implementation = "eager" if values.get("attn_logit_softcapping") else "sdpa"
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    _cut_to_shapes(model, Weights(folder), family(values, folder))
    window.install(model, values)
    return model.eval()


def _cut_to_shapes(model: Any, weights: Weights, kind: Family) -> None:
    """Give each map the size that its weights have, for layers of uneven width."""
    import torch

    for i, layer in enumerate(model.get_submodule(kind.layers)):
        for name in kind.maps:
            here, there = layer.get_submodule(name), weights.shape(f"{kind.layers}.{i}.{name}.weight")
            if kind.transposed or there is None or tuple(here.weight.shape) == there:
                continue
            with torch.device("meta"):
                layer.set_submodule(name, torch.nn.Linear(there[1], there[0], bias=here.bias is not None))


def copy_rest(source: Path, out: Path, changes: dict[str, Any] | None = None) -> None:
    """Tokenizer, templates and config.json of a model, the latter with some values changed (None removes one)."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    values = hf.read_config(source) | (changes or {})
    values = {k: v for k, v in values.items() if not (changes and k in changes and v is None)}
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def save(model: Any, source: Path, out: Path, changes: dict[str, Any] | None = None, dtype: str = "") -> None:
    """Write a whole model that is in memory: one safetensors file, config.json with `changes`, and what belongs to it.

    A tied head is not written a second time. `dtype` such as "bfloat16" rounds what is stored.
    """
    import torch
    from safetensors.torch import save_file

    kind, state = family(hf.read_config(source), source), model.state_dict()
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop(f"{kind.head}.weight", None)
    kept = getattr(torch, dtype) if dtype else None
    state = {k: v.detach().cpu().to(kept or v.dtype).contiguous() for k, v in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    copy_rest(source, out, {"quantization_config": None, **({"dtype": dtype} if dtype else {}), **(changes or {})})
