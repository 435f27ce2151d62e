"""A teacher's answers to text, made once and kept: the likeliest tokens after each, and the mass of all others.

Log-probabilities are kept rather than logits: float16 is finest near 0, where the likely tokens are. At 64 tokens an
answer takes about 220 bytes where 49,152 logits take 196,608. What is lost by that is in divergence.py.

Shapes: N = sheets, T = tokens of one, K = tokens kept, V = vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline import decoder, divergence
from slimline.chunks import Chunks, identity, key
from slimline.sheets import Sheets, inputs
from slimline.technique import track

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

TOKENS_A_CHUNK = 4096
LEAST = -60.0
"""The logarithm of a mass that is as good as none: finite, so that it can be compared."""


class Answers:
    """What the teacher says after every token of some sheets."""

    def __init__(self, chunks: Chunks, sheets: Sheets) -> None:
        self.chunks, self.length = chunks, sheets.ids_NT.shape[1]
        self.each = max(1, TOKENS_A_CHUNK // self.length)
        self.number = -(-len(sheets) // self.each)
        self.counted_NT = sheets.counted_NT

    def read(self, sheet: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [T, K], log-probabilities float32 [T, K + 1], the last of all other tokens together)."""
        import torch

        found = self.chunks.read(sheet // self.each, group=sheet % self.each)
        log_p_TC = np.concatenate([found["log_p"].astype(np.float32), found["log_rest"][:, None]], axis=1)
        exact_TC = torch.log_softmax(torch.from_numpy(log_p_TC), dim=1)  # float16 has rounded them: sum to 1 again
        return torch.from_numpy(found["ids"].astype(np.int64)), exact_TC

    def rest(self) -> float:
        """The mean mass of what was not kept, over the tokens that count."""
        total, count = 0.0, 0
        for number in range(self.number):
            log_rest_NT = self.chunks.read(number, ["log_rest"])["log_rest"].reshape(-1, self.length)
            counted_NT = self.counted_NT[number * self.each : (number + 1) * self.each]
            total += float(np.exp(log_rest_NT[counted_NT].astype(np.float64)).sum())
            count += int(counted_NT.sum())
        return total / count


def ask(
    teacher: Path,
    sheets: Sheets,
    kept: int,
    temperature: float,
    folder: Path,
    precision: str,
    cast: Callable[[], Any],
    share: tuple[int, int] = (0, 1),
) -> Answers:
    """The teacher's answers to all sheets. Those that `folder` has already are not made again.

    `share` (i, n) makes the i-th of n parts only; the others are somebody else's.
    """
    made_of = key(
        teacher=identity(teacher), ids=sheets.ids_NT, positions=sheets.positions_NT, kept=kept,
        temperature=temperature, precision=precision, least=LEAST, tokens_a_chunk=TOKENS_A_CHUNK,
    )  # fmt: skip
    answers = Answers(Chunks(folder, made_of), sheets)
    missing = [i for i in range(answers.number) if i not in answers.chunks and i % share[1] == share[0]]
    model: Any = decoder.load(teacher) if missing else None
    for number in track(missing, "asking the teacher"):
        rows = range(number * answers.each, min(len(sheets), (number + 1) * answers.each))
        answers.chunks.write(number, _answer(model, sheets, rows, kept, temperature, cast), group=answers.length)
    return answers


def _answer(
    model: Any, sheets: Sheets, rows: Sequence[int], kept: int, temperature: float, cast: Callable[[], Any]
) -> dict[str, Any]:
    """Columns ids int32 [tokens, K], log_p float16 [tokens, K], log_rest float32 [tokens]; sheet by sheet."""
    import torch

    device = next(model.parameters()).device
    ids, known = [], []
    for row in rows:
        ids_1T, positions_1T = (
            torch.from_numpy(whole[row : row + 1]).to(device) for whole in (sheets.ids_NT, sheets.positions_NT)
        )
        with torch.inference_mode(), cast():
            logits_TV = model(**inputs(model, ids_1T, positions_1T)).logits[0]
            ids_TK, log_p_TC = divergence.likeliest(logits_TV, kept, temperature)
        ids.append(ids_TK.cpu())
        known.append(log_p_TC.cpu())
    ids_RK, log_p_RC = torch.cat(ids), torch.cat(known).clamp(min=LEAST)
    number = ids_RK.shape[1]
    nothing_R = torch.full((len(ids_RK),), LEAST)
    return {
        "ids": ids_RK.int().numpy(),
        "log_p": log_p_RC[:, :number].half().numpy(),
        "log_rest": (log_p_RC[:, number] if log_p_RC.shape[1] > number else nothing_R).numpy(),
    }
