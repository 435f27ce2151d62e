"""The text that a language model is calibrated on: its options, and the windows of tokens that are drawn from it.

A few tens of thousands of tokens of the kind that the model will serve are enough for second moments of its inputs.
The split `calibration` keeps them apart from what the result is judged on.

Shapes: N = windows, T = tokens of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from slimline import decoder, hf, language
from slimline.data import SplitName, documents
from slimline.errors import ConfigError, ModelError
from slimline.technique import BaseConfig, Stored

if TYPE_CHECKING:
    from slimline.language import Tokens


class Passages(BaseConfig):
    """Options of all that calibrate a language model on text."""

    data: Stored = Field(description="documents to calibrate on, with a column text")
    split: SplitName = Field("calibration", description="which of them")
    windows: int = Field(64, ge=1, description="pieces of text that are drawn, at the most")
    length: int = Field(512, ge=2, description="tokens of each piece")
    seed: int = Field(0, ge=0, description="draws the pieces")


def draw(source: Path, config: Passages) -> Tokens:
    """int64 [N, T]: windows of the text in the source's tokens.

    Raises DataError if the text fills no window, ConfigError for windows longer than the model's context, and
    ModelError if its tokenizer has tokens that its embedding has not.
    """
    values = hf.read_config(source)
    if config.length > decoder.context(values):
        raise ConfigError(
            f"length {config.length} is more than the {decoder.context(values)} tokens that {source} can hold. "
            "Ask for shorter windows."
        )
    texts = documents(Path(config.data), config.split).texts
    tokens_NT = language.windows(language.Tokenizer(source), texts, config.length, config.windows, config.seed)
    vocabulary = int(values["vocab_size"])
    if tokens_NT.max() >= vocabulary:
        raise ModelError(
            f"{source}'s tokenizer gives token {tokens_NT.max()}, but its embedding has {vocabulary} tokens. "
            "Bring in the tokenizer that the model was trained with."
        )
    return tokens_NT
