"""Attention that sees the first few tokens of a text and the last ones, so that any length fits into the same memory.

Models give much of their attention to the first tokens, whatever these are; a window that loses them breaks (Xiao et
al., 2023, arXiv 2309.17453). So the cache keeps the first S tokens, the sinks, beside the last W, and positions are
those within the cache: while nothing is left out they are the text's, and then a sink is never farther away than
S + W - 1. Among the last W only distances count, which rotary positions leave as they are; so nothing in the cache
moves, and it is the query that is turned back to position S + W - 1 where it meets a sink.

config.json says it by two keys, `slimline_window` and `slimline_sinks`; decoder.frame hears of them. Texts of a batch
are of one length, or packed on sheets (sheets.py). While all is seen it is transformers' own attention, bit for bit.

    for logits in stream(model, pieces): ...     # text of any length

Shapes: B = texts, H = heads, G = groups of heads that share a key, X = heads of a group and their queries,
Q = queries, K = keys, D = width of a head, F = frequencies, S = sinks, W = window, V = vocabulary.
"""

# Long because what attention sees, what the cache keeps and where positions begin anew must agree token by token.
from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slimline.errors import ModelError

if TYPE_CHECKING:
    import torch

WINDOW, SINKS = "slimline_window", "slimline_sinks"
NAME = "slimline_window"
"""Of this attention, among transformers' own."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "phi")
"""Those whose positions are rotations alone, the same in every layer."""
STEADY = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary positions whose frequencies do not depend on the length of the text."""


def install(model: Any, values: dict[str, Any]) -> None:
    """Give a model the attention that its config.json asks for; without those keys nothing happens."""
    if not values.get(WINDOW):
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    check(values, "config.json")
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _refuse_padding)
    model.config._attn_implementation = NAME
    frequencies_F = model.base_model.rotary_emb.inv_freq
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            module.turning = functools.partial(_turned, frequencies_F=frequencies_F)


def refuse(values: dict[str, Any], where: str, runtime: str) -> None:
    """Raises ModelError for a model whose attention has a window with sinks, which this runtime would not know of."""
    if values.get(WINDOW):
        raise ModelError(
            f"{where} attends to a window of {values[WINDOW]} tokens behind {values.get(SINKS, 0)} sinks, of which "
            f"{runtime} knows nothing. Serve it as it is, in PyTorch, or leave attention.sliding_window out."
        )


def check(values: dict[str, Any], where: str) -> None:
    """Raises ModelError for a model whose attention cannot be had this way."""
    kind, rope = values.get("model_type"), values.get("rope_parameters") or values.get("rope_scaling") or {}
    if kind not in FAMILIES:
        raise ModelError(
            f"{where}: sinks need rotary positions, the same in all layers: {', '.join(FAMILIES)}, not {kind}."
        )
    if (form := rope.get("rope_type", rope.get("type", "default"))) not in STEADY:
        raise ModelError(f"{where}: {form} positions change with the length of the text. {', '.join(STEADY)} do not.")


def _refuse_padding(attention_mask: torch.Tensor | None = None, **rest: Any) -> None:
    """No mask is needed, since positions say all. Raises ModelError where one leaves tokens out."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ModelError("attention with sinks takes no padding. Give texts of one length, or one by one.")


def attend(
    module: Any, query_BHQD: torch.Tensor, key_BGKD: torch.Tensor, value_BGKD: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, position_ids: torch.Tensor | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """[B, Q, H, D]: as transformers calls attention. Queries are the last of the keys; the first keys are the sinks."""
    import torch

    queries, keys = query_BHQD.shape[2], key_BGKD.shape[2]
    window, sinks = int(getattr(module.config, WINDOW)), int(getattr(module.config, SINKS))
    if position_ids is None:
        position_ids = torch.arange(keys - queries, keys, device=query_BHQD.device).unsqueeze(0)
    packed = queries == keys and bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any())
    if not packed and queries in (1, keys) and int(position_ids.max()) < window + sinks:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHQD, key_BGKD, value_BGKD, None, scaling=scaling, **more
        )
        return plain
    scaling = query_BHQD.shape[3] ** -0.5 if scaling is None else scaling
    if packed:  # sinks lie anywhere, and texts are short: all at once
        document_BK = (position_ids == 0).cumsum(dim=1)
        answer_BHQD = _attend(
            module, query_BHQD * scaling, key_BGKD, value_BGKD, position_ids, position_ids, document_BK
        )
        return answer_BHQD.transpose(1, 2).contiguous(), None
    positions_1Q = position_ids[:1]
    last, tail = int(positions_1Q[0, -1]), keys - min(sinks, keys)
    places = torch.arange(keys, device=query_BHQD.device)
    places_1K = torch.where(places < sinks, places, places + last + 1 - keys if tail else places).unsqueeze(0)
    answers = []
    for start in range(0, queries, window):  # so that time and memory grow with the length, not with its square
        rows = slice(start, min(queries, start + window))
        first, end = max(sinks, keys - queries + start - window + 1), keys - queries + rows.stop
        seen = slice(end) if first == sinks else torch.cat([places[: min(sinks, end)], places[first:end]])
        answers.append(
            _attend(
                module, query_BHQD[:, :, rows] * scaling, key_BGKD[:, :, seen], value_BGKD[:, :, seen],
                positions_1Q[:, rows], places_1K[:, seen],
            )
        )  # fmt: skip
    return torch.cat(answers, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    module: Any, query_BHQD: torch.Tensor, key_BGKD: torch.Tensor, value_BGKD: torch.Tensor,
    at_BQ: torch.Tensor, at_BK: torch.Tensor, document_BK: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[B, H, Q, D]: attention by where queries and keys are, of documents that do not see each other."""
    import torch

    window, sinks = int(getattr(module.config, WINDOW)), int(getattr(module.config, SINKS))
    batch, heads, queries, width = query_BHQD.shape
    folded = (batch, key_BGKD.shape[1], -1, width)  # heads of a group beside their queries: keys are not repeated
    key_BGDK = key_BGKD.transpose(2, 3)
    apart_BQK, sink_B1K = at_BQ.unsqueeze(2) - at_BK.unsqueeze(1), (at_BK < sinks).unsqueeze(1)
    score_BHQK = (query_BHQD.reshape(folded) @ key_BGDK).reshape(batch, heads, queries, -1)
    back_BQ = (sinks + window - 1 - at_BQ).clamp(max=0)
    if sinks and bool((back_BQ < 0).any()):
        turned_BHQD = module.turning(query_BHQD, back_BQ)
        known = key_BGDK.shape[3] if document_BK is not None else int(sink_B1K[0, 0].sum())  # alone, sinks come first
        near_BHQS = (turned_BHQD.reshape(folded) @ key_BGDK[..., :known]).reshape(batch, heads, queries, known)
        near_BHQS = torch.where(sink_B1K[:, None, :, :known], near_BHQS, score_BHQK[..., :known])
        score_BHQK = torch.cat([near_BHQS, score_BHQK[..., known:]], dim=-1)
    seen_BQK = (apart_BQK >= 0) & (sink_B1K | (apart_BQK < window))
    if document_BK is not None:
        seen_BQK &= document_BK.unsqueeze(2) == document_BK.unsqueeze(1)
    weight_BHQK = score_BHQK.float().masked_fill(~seen_BQK.unsqueeze(1), -torch.inf).softmax(dim=-1)
    weight_BGXK = weight_BHQK.to(value_BGKD.dtype).reshape(*folded[:3], weight_BHQK.shape[3])
    return (weight_BGXK @ value_BGKD).reshape(query_BHQD.shape)


def _turned(states_BHQD: torch.Tensor, by_BQ: torch.Tensor, frequencies_F: torch.Tensor) -> torch.Tensor:
    """States moved by so many positions: what rotary positions would have made of them there."""
    import torch

    angle_BQF = by_BQ.unsqueeze(2).float() * frequencies_F.float().to(by_BQ.device)
    cos_B1QF, sin_B1QF = angle_BQF.cos().unsqueeze(1), angle_BQF.sin().unsqueeze(1)
    half = len(frequencies_F)
    one, two, rest = states_BHQD[..., :half], states_BHQD[..., half : 2 * half], states_BHQD[..., 2 * half :]
    parts = [one * cos_B1QF - two * sin_B1QF, two * cos_B1QF + one * sin_B1QF, rest]
    return torch.cat([part.to(states_BHQD.dtype) for part in parts], dim=-1)


@functools.cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):  # type: ignore[no-untyped-call]
        """The keys and values of the sinks and of the last W - 1 tokens: with the one that comes next, all it sees."""

        def __init__(self, window: int, sinks: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.window, self.sinks, self.seen = window, sinks, 0

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            keys, values = super().update(key_states, value_states)
            self.seen += key_states.shape[2]
            drop = keys.shape[2] - self.sinks - (self.window - 1)
            if drop > 0:
                self.keys, self.values = (_without(whole, self.sinks, drop) for whole in (keys, values))
            return keys, values

        def get_seq_length(self) -> int:
            return self.seen

    return Layer


def _without(states_BGKD: torch.Tensor, first: int, number: int) -> torch.Tensor:
    """So many tokens less, from there on; a copy, so that the whole can be let go."""
    import torch

    return torch.cat([states_BGKD[:, :, :first], states_BGKD[:, :, first + number :]], dim=2)


def cache(model: Any) -> Any:
    """An empty cache for a model: bounded if its attention is, else one that grows."""
    from transformers import Cache, DynamicCache

    window = getattr(model.config, WINDOW, 0)
    if not window:
        return DynamicCache(config=model.config)
    sinks = int(getattr(model.config, SINKS))
    return Cache(layers=[_layer_class()(window, sinks) for _ in range(model.config.num_hidden_layers)])


def cached_bytes(cache: Any) -> int:
    """What its keys and values take."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    return sum(whole.numel() * whole.element_size() for layer in layers for whole in (layer.keys, layer.values))


def stream(model: Any, pieces: Iterable[torch.Tensor], cache: Any) -> Iterator[torch.Tensor]:
    """For every piece [B, Q] of a text of any length, the logits [B, V] after its last token.

    Long pieces go through in parts of a window. Before positions would leave the model's context they begin anew right
    behind the sinks, and the keys that are kept are turned back by as much.
    """
    import torch

    window, sinks = int(getattr(model.config, WINDOW)), int(getattr(model.config, SINKS))
    context = int(model.config.max_position_embeddings)
    at_once = max(1, min(window, context - sinks - window))
    for piece_BQ in pieces:
        for part_BQ in piece_BQ.split(at_once, dim=1):  # type: ignore[no-untyped-call]
            if cache.get_seq_length() + part_BQ.shape[1] > context:
                _begin_anew(model, cache, sinks + window)
            with torch.no_grad():
                answer = model(input_ids=part_BQ, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield answer.logits[:, -1]


def _begin_anew(model: Any, cache: Any, place: int) -> None:
    """Make `place` the position of the token that comes next."""
    import torch

    frequencies_F, back = model.base_model.rotary_emb.inv_freq, place - cache.get_seq_length()
    for layer in cache.layers:
        kept = layer.keys[:, :, layer.sinks :]
        by_1K = torch.full((1, kept.shape[2]), back, device=kept.device)
        layer.keys = torch.cat([layer.keys[:, :, : layer.sinks], _turned(kept, by_1K, frequencies_F)], dim=2)
        layer.seen = place
