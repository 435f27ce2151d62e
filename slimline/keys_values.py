"""Keys and values rounded to 8 bits, as a model whose config.json asks for such a cache is run by what serves it.

Each layer has one scale for its keys, as they are cached, behind their positions, and one for its values: `k_scale` and
`v_scale` of its attention, measured beforehand. `kv_cache_scheme` in config.json's `quantization_config` says what 8
bits hold: E4M3 floats or whole numbers (compressed-tensors 0.20). A server's attention reads all keys and values from
the cache, those of the tokens that it has just put there too. So each is rounded once, where attention hands it to the
cache and even if there is none: the logits of a whole text are those of its tokens one by one. What is kept here are
floats still; it is a server's cache that shrinks. Some of vLLM's kernels round queries to E4M3 as well, which is not
seen here. decoder.load puts this in place.

Shapes: B = texts, G = groups of heads that share a key, T = tokens, D = width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimline import activations
from slimline.errors import ModelError

if TYPE_CHECKING:
    import torch

    from slimline.shards import Weights

    Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """(keys [B, G, T, D], values [B, G, T, D]) -> what is cached in their place."""

KEY_SCALE, VALUE_SCALE = ".k_scale", ".v_scale"
"""What follows the name of an attention."""
SCHEME = "kv_cache_scheme"
KINDS = {"fp8": "float", "int8": "int"}
"""What compressed-tensors calls each form."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi")
"""Those whose scales servers look for in self_attn."""


def check(values: dict[str, Any], where: str) -> None:
    """Raises ModelError for a model whose keys and values are floats for good, or of 8 bits already."""
    if (kind := values.get("model_type")) not in FAMILIES:
        raise ModelError(
            f"{where} is a {kind} model, for which no server reads scales of keys and values. Those of "
            f"{', '.join(FAMILIES)} are read."
        )
    if (values.get("quantization_config") or {}).get(SCHEME):
        raise ModelError(f"{where} keeps keys and values in 8 bits already. Start from the model that it was made of.")


def refuse(values: dict[str, Any], where: str, runtime: str, instead: str = "") -> None:
    """Raises ModelError for a model that keeps keys and values in 8 bits, which this runtime would not."""
    if found := (values.get("quantization_config") or {}).get(SCHEME):
        vllm = "with vLLM or " if found.get("type") == "float" else ""
        serve = f"{instead}. Or serve" if instead else "Serve"
        raise ModelError(
            f"{where} keeps keys and values in 8 bits, of which {runtime} knows nothing. "
            f"{serve} it {vllm}as it is, in PyTorch, or leave quantize.kv_cache out."
        )


def scales(weights: Weights, attentions: list[str]) -> tuple[list[float], list[float]]:
    """The scale of the keys and of the values of each of these attentions. Raises ModelError where one is missing."""
    keys = [float(_scale(weights, name + KEY_SCALE)) for name in attentions]
    return keys, [float(_scale(weights, name + VALUE_SCALE)) for name in attentions]


def _scale(weights: Weights, name: str) -> torch.Tensor:
    if name not in weights.found:
        raise ModelError(f"{weights.folder} has no {name}. Is the checkpoint whole?")
    return weights.raw(name).float()


def scheme(kind: str) -> dict[str, Any]:
    """The `kv_cache_scheme` of a kind: one scale for all keys of a layer and one for its values, found beforehand."""
    return {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False,
        "observer": "minmax",
    }  # fmt: skip


def asked(settings: dict[str, Any] | None, where: str) -> str:
    """The kind of 8 bits that a `quantization_config` asks for, '' for none.

    Raises ModelError for keys and values that are rounded in another way than is done here.
    """
    found = (settings or {}).get(SCHEME)
    if not found:
        return ""
    form = (found.get("num_bits"), found.get("symmetric"), found.get("strategy"), bool(found.get("dynamic")))
    if form != (8, True, "tensor", False) or found.get("type") not in activations.LARGEST:
        raise ModelError(
            f"{where} rounds keys and values in a way that is not known here ({found}). Of 8 bits, symmetric, a tensor "
            "at a time beforehand, int and float are."
        )
    return str(found["type"])


def install(model: Any, weights: Weights, settings: dict[str, Any]) -> None:
    """Let every attention round its keys and values from now on, where the settings ask for it.

    Raises ModelError if they are rounded in a way that is not known here, or a scale is missing.
    """
    if not (kind := asked(settings, str(weights.folder))):
        return
    for name, attention in model.named_modules():
        if not (hasattr(attention, "layer_idx") and hasattr(attention, "scaling")):
            continue
        on_the_way(attention, _rounding(kind, *(_scale(weights, name + part) for part in (KEY_SCALE, VALUE_SCALE))))


def on_the_way(attention: Any, change: Change) -> Any:
    """Let `change` see, and replace, what an attention hands to its cache. Returns a handle with `remove`."""

    def stand_in(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"past_key_values": _Way(kwargs.get("past_key_values"), change)}

    return attention.register_forward_pre_hook(stand_in, with_kwargs=True)


class _Way:
    """Stands where an attention looks for its cache, of any sort or none."""

    def __init__(self, cache: Any, change: Change) -> None:
        self.cache, self.change = cache, change

    def update(self, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """All keys and values so far, these among them."""
        key_BGTD, value_BGTD = self.change(key_BGTD, value_BGTD)
        if self.cache is None:
            return key_BGTD, value_BGTD
        whole: tuple[Any, Any] = self.cache.update(key_BGTD, value_BGTD, *args, **kwargs)
        return whole


def _rounding(kind: str, key_scale: torch.Tensor, value_scale: torch.Tensor) -> Change:
    def rounded(key_BGTD: torch.Tensor, value_BGTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            activations.rounded(key_BGTD, key_scale.to(key_BGTD.device), kind),
            activations.rounded(value_BGTD, value_scale.to(value_BGTD.device), kind),
        )

    return rounded
