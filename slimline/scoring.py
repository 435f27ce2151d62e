"""Texts under a language model: cut into windows in which every token is scored exactly once, and what came of it.

A window is what the model reads at once. The first scores all its tokens; each next one begins `stride` tokens later
and scores only those that none has scored yet, so that all but a text's first have at least length - stride tokens
before them. A text is read behind the token that begins one (bos, or else eos), so that its first token is scored too,
and neither that token nor an end is scored: as lm-evaluation-harness does it, and every byte of a text is paid for by
every tokenizer. Numbers are float64 nats; memory is the logits of one window.

Shapes: T = tokens of a window, S = those of them that are scored, V = vocabulary, D = documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from slimline import data, sampling
from slimline.data import SplitName
from slimline.errors import ConfigError, DataError, ModelError
from slimline.language import LanguageModel, Tokenizer
from slimline.technique import BaseConfig, Metrics, Stored

Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

ROWS_AT_ONCE = 64
"""Positions whose logits are float64 at the same time."""
DRAWS = 2000
"""Of a bootstrap."""


class ScoringConfig(BaseConfig):
    """What text is scored, and how much of it a model sees at once."""

    data: Stored = Field(description="data set with texts")
    split: SplitName = Field("test", description="part of it to score")
    length: int = Field(512, ge=1, description="tokens that the model reads at once; at most what it can hold")
    stride: int = Field(256, ge=1, description="tokens from one window to the next; at most their length")
    joined: bool = Field(False, description="texts one behind the other in one stream, as many published numbers are")
    max_documents: int = Field(0, ge=0, description="texts to score, from the first; 0 for all")
    threads: int = Field(0, ge=0, description="processor threads; 0 for as many as the library takes")


@dataclass(frozen=True)
class Window:
    """What is read at once, and the tokens that are scored there."""

    ids_T: Numbers
    at_S: Numbers
    """Positions whose logits say what the scored tokens are: each is one before its token."""
    target_S: Numbers
    owner_S: Numbers
    """The document that each scored token belongs to."""


@dataclass(frozen=True)
class Text:
    """The documents of a split as one model's tokens; lists have an entry for every document."""

    ids: list[str]
    token_count_D: Numbers
    """Tokens scored."""
    byte_count_D: Numbers
    """UTF-8 bytes of the text that these tokens are."""
    digests: list[str]
    """Of what decides a document's score beside the model: its tokens, and how they were cut into windows."""
    windows: list[Window]


def read(tokenizer: Tokenizer, config: ScoringConfig) -> Text:
    """The documents in tokens and windows. Raises DataError if no token of them can be scored."""
    found = data.documents(Path(config.data), config.split)
    count = config.max_documents or len(found.ids)
    names, texts = found.ids[:count], found.texts[:count]
    begin = [t for t in (tokenizer.bos, tokenizer.eos) if t is not None][:1]
    parts = [tokenizer.encode(text, special=False) for text in texts]
    stretches = [range(len(parts))] if config.joined else [range(i, i + 1) for i in range(len(parts))]
    byte_count_D, windows = np.array([len(text.encode()) for text in texts]), list[Window]()
    for stretch in stretches:
        ids_N = [token for i in stretch for token in (*begin, *parts[i])]
        owner_N = [owner for i in stretch for owner in (*[-1] * len(begin), *[i] * len(parts[i]))]
        windows += cut(np.array(ids_N, np.int64), np.array(owner_N, np.int64), config.length, config.stride)
        if not begin:  # with nothing before it, the first token cannot be scored
            byte_count_D[stretch[0]] -= len(tokenizer.decode(ids_N[:1]).encode())
    if not windows:
        raise DataError(f"{config.data} has no text of two tokens in split {config.split!r}. Give longer texts.")
    token_count_D = np.bincount(np.concatenate([w.owner_S for w in windows]), minlength=len(names))
    return Text(names, token_count_D, byte_count_D, _digests(begin, parts, config), windows)


def cut(ids_N: Numbers, owner_N: Numbers, length: int, stride: int) -> Iterator[Window]:
    """Windows over a stretch of tokens; those with owner -1, and the very first, are read and not scored."""
    for start, first, stop in spans(len(ids_N), length, stride):
        scored_S = first + np.flatnonzero(owner_N[first:stop] >= 0)
        if len(scored_S):
            yield Window(ids_N[start : stop - 1], scored_S - 1 - start, ids_N[scored_S], owner_N[scored_S])


def spans(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop) of each window: tokens start to stop - 2 are read, first to stop - 1 are scored."""
    start, first = 0, 1
    while first < count:
        stop = min(start + length + 1, count)
        yield start, first, stop
        start, first = start + stride, stop


def _digests(begin: list[int], parts: list[list[int]], config: ScoringConfig) -> list[str]:
    fresh = hashlib.sha256(f"{config.length} {config.stride} {config.joined}".encode())
    running, digests = fresh.copy(), []
    for part in parts:
        if not config.joined:  # in a stream, a text's score depends on all that came before
            running = fresh.copy()
        running.update(np.array([*begin, *part], dtype="<i8").tobytes())
        digests.append(running.hexdigest()[:32])
    return digests


def check(model: LanguageModel, where: str | Path, config: ScoringConfig) -> None:
    """Raises ConfigError if the windows do not fit the model, ModelError if its tokenizer has more tokens than it."""
    if config.stride > config.length:
        raise ConfigError(
            f"a stride of {config.stride} leaves tokens between windows of {config.length} unscored. "
            f"Set stride to at most {config.length}."
        )
    if config.length > model.context:
        raise ConfigError(
            f"windows of {config.length} tokens do not fit {where}, which holds {model.context}. "
            f"Set length to at most {model.context}, for all models that are compared."
        )
    if model.tokenizer.size > model.vocabulary:
        raise ModelError(
            f"the tokenizer of {where} has {model.tokenizer.size} tokens but the model {model.vocabulary}. "
            "Use the tokenizer that the model was trained with, or resize its embedding."
        )


def logits(model: LanguageModel, window: Window) -> sampling.Floats:
    """[S, V]: what the model says of each token that is scored here."""
    answer_SV: sampling.Floats = model.logits(window.ids_T[None])[0][window.at_S]
    return answer_SV


def pieces(count: int) -> Iterator[slice]:
    """Rows in pieces that are worked on together."""
    return (slice(at, min(at + ROWS_AT_ONCE, count)) for at in range(0, count, ROWS_AT_ONCE))


def log_softmax(logits_SV: np.ndarray[Any, Any]) -> Floats:
    """Log probabilities, in float64 whatever the logits are."""
    log_SV: Floats = logits_SV.astype(np.float64)
    log_SV -= log_SV.max(axis=1, keepdims=True)
    log_SV -= np.log(np.exp(log_SV).sum(axis=1, keepdims=True))
    return log_SV


def surprise(logits_SV: np.ndarray[Any, Any], target_S: Numbers) -> Floats:
    """[S]: the negative log likelihood of each token, in nats."""
    chosen = [np.take_along_axis(log_softmax(logits_SV[r]), target_S[r, None], 1)[:, 0] for r in pieces(len(target_S))]
    return -np.concatenate(chosen)


def finite(values: Floats, where: str | Path) -> Floats:
    """The values, if all are finite. Raises ModelError if not."""
    if not np.isfinite(values).all():
        raise ModelError(f"{where} answers with NaN or infinity. Repeat the step that made it.")
    return values


def ratio(name: str, amount_D: Any, count_D: Any, of: Callable[[Any], Any] = float, seed: int = 0) -> Metrics:
    """`of` the sum of amounts over the sum of counts, with its 95 % interval from a bootstrap over documents.

    `of` only ever rises. Named name, name_low and name_high; from one document no interval can be told.
    """
    rng, documents = np.random.default_rng(seed), np.flatnonzero(np.asarray(count_D))
    amount_D, count_D = (np.asarray(x, dtype=np.float64)[documents] for x in (amount_D, count_D))
    found = {name: float(of(amount_D.sum() / count_D.sum()))}
    if len(documents) > 1:
        drawn = [rng.integers(0, len(documents), len(documents)) for _ in range(DRAWS)]
        low, high = np.quantile([amount_D[d].sum() / count_D[d].sum() for d in drawn], [0.025, 0.975])
        found |= {f"{name}_low": float(of(low)), f"{name}_high": float(of(high))}
    return found
