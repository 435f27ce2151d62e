"""Language models ready to answer, whatever runs inside: the logits of every position, and text.

    model = load(folder)
    model.logits([[1, 2, 3]])              # float32 [B, T, V]: what may follow each token

A folder of format hf runs in PyTorch, packed weights as floats.

Shapes: B = texts, T = tokens of each, V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimline import artifact, decoder, hf
from slimline.artifact import Manifest
from slimline.errors import DataError, ModelError

Floats = np.ndarray[Any, np.dtype[np.float32]]
Tokens = np.ndarray[Any, np.dtype[np.int64]]


class Tokenizer:
    """Text to token ids and back, by the tokenizers library alone; nothing is cut or padded."""

    def __init__(self, folder: Path) -> None:
        self.fast = hf.Tokenizer(folder, 1 << 30).fast
        self.fast.no_truncation()
        values = hf.read_config(folder)
        self.bos, self.eos = (_first(values.get(key)) for key in ("bos_token_id", "eos_token_id"))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text, such as a token that begins it."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones left out."""
        text: str = self.fast.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def size(self) -> int:
        """Token ids that have a text: all are below this."""
        return int(self.fast.get_vocab_size(with_added_tokens=True))


def _first(value: Any) -> int | None:
    if isinstance(value, list):
        return int(value[0]) if value else None
    return None if value is None else int(value)


class LanguageModel(ABC):
    """A loaded language model."""

    runtime = ""
    """What answers, such as 'PyTorch 2.13.0 (cpu)'."""

    def __init__(self, path: Path, manifest: Manifest | None) -> None:
        values = hf.read_config(path)
        self.tokenizer = Tokenizer(path)
        self.context = decoder.context(values)
        """Tokens that it can hold, prompt and answer together."""
        self.vocabulary = int(values["vocab_size"])

    @abstractmethod
    def logits(self, ids_BT: Any) -> Floats:
        """float32 [B, T, V] for texts of one length: position t says what may follow token t."""


class TorchLanguageModel(LanguageModel):
    """A model of format hf, on the best device. `threads` holds for the whole process."""

    def __init__(self, path: Path, manifest: Manifest | None, threads: int | None) -> None:
        super().__init__(path, manifest)
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model = decoder.load(path)
        self.runtime = f"PyTorch {torch.__version__.partition('+')[0]} ({hf.config_device(self.model).type})"

    def logits(self, ids_BT: Any) -> Floats:
        import torch

        with torch.inference_mode():
            ids = torch.as_tensor(np.asarray(ids_BT), device=hf.config_device(self.model))
            answer: Floats = self.model(input_ids=ids, use_cache=False).logits.float().cpu().numpy()
        return answer


def load(path: Path, threads: int | None = None) -> LanguageModel:
    """The language model of a sealed directory. Raises ModelError if it is none."""
    path = Path(path)
    manifest = artifact.read(path)
    if manifest.task != decoder.TASK:
        raise ModelError(f"{path} is no language model but one for {manifest.task or 'no task'}.")
    return TorchLanguageModel(path, manifest, threads)


def windows(tokenizer: Tokenizer, texts: Sequence[str], length: int, count: int = 0, seed: int = 0) -> Tokens:
    """int64 [N, length]: the texts one behind the other, each ended by the end token, cut into windows.

    With `count` so many windows at most are drawn, by seed. Raises DataError if the text fills no window.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer.encode(text)
        if tokenizer.eos is not None:
            stream.append(tokenizer.eos)
    number = len(stream) // length
    if number == 0:
        raise DataError(
            f"the text is {len(stream)} tokens, which fill no window of {length}. Give more text, or shorter windows."
        )
    whole = np.asarray(stream[: number * length], dtype=np.int64).reshape(number, length)
    if count and count < number:
        whole = whole[np.sort(np.random.default_rng(seed).permutation(number)[:count])]
    return whole
