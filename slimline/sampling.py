"""What follows a prompt: which token is taken, where an answer ends, and text in whole pieces while it grows.

Everything here works on token ids and numbers, so that every runtime answers by the same rules: the same logits give
the same text.

Shapes: V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimline.errors import DataError

Floats = np.ndarray[Any, np.dtype[np.float32]]

UNFINISHED = "\ufffd"
"""What a decoder makes of a character whose bytes are not all there yet."""
DEFAULT_TOKENS = 256


class Sampling(BaseModel):
    """How an answer is made. Equal settings give equal answers, whatever else is asked beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(0, ge=0, description="tokens of an answer at most; 0 for 256, or what the context leaves")
    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the likeliest token; higher draws more freely")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens that hold this probability")
    seed: int = Field(0, ge=0, lt=2**63, description="of the drawing; every answer begins with it anew")
    stop: tuple[str, ...] = Field((), description="texts that end an answer, and are not part of it")

    @classmethod
    def of(cls, params: dict[str, Any] | None) -> Sampling:
        """Settings as they come from outside; what is None is left out. Raises DataError in one sentence."""
        given = {key: value for key, value in (params or {}).items() if value is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        if isinstance(given.get("stop"), list | tuple):  # an empty text would end every answer before it begins
            given["stop"] = tuple(text for text in given["stop"] if text != "")
        try:
            return cls(**given)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(str(part) for part in problem["loc"])
            raise DataError(
                f"the parameter {name!r} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}. "
                f"There are: {', '.join(cls.model_fields)}."
            ) from None

    def draw(self) -> np.random.Generator:
        """The dice of one answer."""
        return np.random.default_rng(self.seed)


GREEDY = Sampling.of(None)
"""The likeliest token every time."""


def pick(logits_V: Floats, sampling: Sampling, draw: np.random.Generator) -> int:
    """The token that follows: the likeliest (the lower id of equals), or one that is drawn."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled_V = (logits_V.astype(np.float64) - float(logits_V.max())) / sampling.temperature
    grown_V = np.exp(scaled_V)
    probability_V = grown_V / grown_V.sum()
    order = np.argsort(-probability_V, kind="stable")  # stable: equals by id, so that a seed means one text
    held = np.cumsum(probability_V[order])
    kept = int(np.searchsorted(held, sampling.top_p)) + 1 if sampling.top_p < 1 else len(order)
    held = held[:kept]
    return int(order[min(int(np.searchsorted(held, draw.random() * held[-1], side="right")), len(held) - 1)])


class Decoder(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


def pieces(tokens: Iterable[int], prompt: Sequence[int], decoder: Decoder) -> Iterator[str]:
    """The new text, piece by piece, each of whole characters; what never becomes whole is said at the end.

    The last tokens of the prompt are decoded along, since some tokenizers drop the space that a text begins with.
    """
    held = [*prompt[-8:]]
    shown = decoder.decode(held)
    for token in tokens:
        held.append(token)
        text = decoder.decode(held)
        if text.endswith(UNFINISHED) or len(text) <= len(shown):
            continue
        yield text[len(shown) :]
        held = held[-8:]
        shown = decoder.decode(held)
    if len(text := decoder.decode(held)) > len(shown):
        yield text[len(shown) :]


def until(stops: Sequence[str], parts: Iterable[str]) -> Iterator[str]:
    """The parts up to the first of the stops, which is left out; what may be the beginning of one is held back."""
    held = ""
    for part in parts:
        held += part
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            if held[: min(found)]:
                yield held[: min(found)]
            return
        begun = max((_overlap(held, stop) for stop in stops), default=0)
        if said := held[: len(held) - begun]:
            yield said
        held = held[len(held) - begun :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end are the beginning of the stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
