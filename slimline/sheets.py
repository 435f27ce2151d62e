"""Documents laid out on sheets of one length, so that a language model learns from them with little padding.

A sheet holds several documents one behind the other. Their positions begin at 0 each, and by that transformers tells
them apart: it masks attention block by block, so that no document sees another, and every token gets the answer that it
would get if its document were alone. Longer documents are cut into pieces of a sheet's length.

Shapes: N = sheets, B = those of a batch, T = tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slimline import data, language
from slimline.errors import DataError

if TYPE_CHECKING:
    import torch

Whole = np.ndarray[Any, np.dtype[np.int64]]


class Document(NamedTuple):
    """Token ids, of which those before `start` are read but not learned, as a prompt is."""

    ids: list[int]
    start: int = 0


@dataclass(frozen=True)
class Sheets:
    """Documents on sheets. Where `counted`, the token that follows in the sheet is to be learned."""

    ids_NT: Whole
    positions_NT: Whole
    counted_NT: np.ndarray[Any, np.dtype[np.bool_]]

    def __len__(self) -> int:
        return len(self.ids_NT)

    def some(self, number: int, seed: int = 0) -> Sheets:
        """So many of them, drawn by seed, or all; in the same order."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:number])
        return Sheets(self.ids_NT[chosen], self.positions_NT[chosen], self.counted_NT[chosen])


def read(path: Path, split: str, tokenizer: language.Tokenizer) -> list[Document]:
    """The documents of one split of a data set, each ended by the end token."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return [Document(tokenizer.encode(text) + end) for text in data.documents(path, split).texts]


def lay(documents: Sequence[Document], length: int, fill: int = 0) -> Sheets:
    """Lay the documents out, the longest first, each on the fullest sheet that has room (best fit decreasing).

    What stays empty holds `fill`, counts as a document of its own, and is never learned. Raises DataError if nothing
    is left to learn.
    """
    pieces = [piece for document in documents for piece in _cut(document, length) if len(piece.ids) > 1]
    pieces.sort(key=lambda piece: -len(piece.ids))  # stable: equal lengths stay in the order of the file
    sheets: list[list[Document]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # by tokens left: the sheets that have so many
    for piece in pieces:
        left = next((left for left in range(len(piece.ids), length + 1) if room[left]), None)
        if left is None:
            left = length
            room[left].append(len(sheets))
            sheets.append([])
        sheet = room[left].pop()
        sheets[sheet].append(piece)
        room[left - len(piece.ids)].append(sheet)
    shape = (len(sheets), length)
    found = Sheets(np.full(shape, fill, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_))
    for sheet, on_it in enumerate(sheets):
        at = 0
        for ids, start in [*on_it, Document([fill] * (length - sum(len(piece.ids) for piece in on_it)), length)]:
            here = slice(at, at + len(ids))
            found.ids_NT[sheet, here] = ids
            found.positions_NT[sheet, here] = np.arange(len(ids))
            found.counted_NT[sheet, here] = np.arange(1, len(ids) + 1) >= start
            at += len(ids)
            found.counted_NT[sheet, at - 1] = False  # the last token of a document predicts nothing
    if not found.counted_NT.any():
        raise DataError("the text has no token to learn. Give documents of at least two tokens.")
    return found


def inputs(model: Any, ids_BT: torch.Tensor, positions_BT: torch.Tensor | None) -> dict[str, Any]:
    """What to call a model with to read sheets, or with no positions one text a row, without a cache."""
    import torch

    given = {"input_ids": ids_BT, "use_cache": False}
    if positions_BT is None:
        return given
    given["position_ids"] = positions_BT
    if model.config.model_type == "opt":  # it does not look at positions when it masks
        document_BT = (positions_BT == 0).cumsum(dim=1)
        same_BTT = document_BT.unsqueeze(2) == document_BT.unsqueeze(1)
        given["attention_mask"] = torch.tril(same_BTT).unsqueeze(1)
    return given


def _cut(document: Document, length: int) -> list[Document]:
    return [
        Document(document.ids[at : at + length], max(0, document.start - at))
        for at in range(0, len(document.ids), length)
    ]
