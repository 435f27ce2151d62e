"""Learning from a teacher: what distillation and the recovery after pruning share.

The teacher answers every text once; the student follows those answers, softened, beside the labels (Hinton et al.,
2015, arXiv 1503.02531), reads each text with some words hidden, and may follow states layer by layer.

Shapes: B = texts, T = tokens, L = labels, W = width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from slimline import hf, training
from slimline.technique import track

if TYPE_CHECKING:
    import torch


class Imitation(training.Training):
    """How a student learns from a teacher."""

    temperature: float = Field(2.0, gt=0, le=100, description="softens both answers before they are compared")
    mixing: float = Field(0.9, ge=0, le=1, description="weight of the teacher's answers against the labels'")
    hide: float = Field(
        0.1, ge=0, lt=1, description="fraction of words that the student does not see, but the teacher saw"
    )
    hidden: float = Field(0.0, ge=0, description="weight of following the teacher's states, layer by layer")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the student's states; hiding words does more in less time")
    average: float = Field(
        0.5, ge=0, le=1, description="weights are averaged over about this fraction of the steps before an epoch's end"
    )


def ask(teacher: torch.nn.Module, tokenizer: hf.Tokenizer, split: training.Split) -> hf.Floats:
    """The teacher's logits [B, L] for every text of the split, in its order."""
    with hf.first_token_only(teacher):
        return hf.logits(teacher, tokenizer, split.texts, watch=lambda rows: track(rows, "asking the teacher"))


def hide(batch: dict[str, torch.Tensor], fraction: float, mask_id: int) -> dict[str, torch.Tensor]:
    """The batch with that fraction of its words [B, T] masked; first tokens, last tokens and padding stay.

    A student that must answer like a teacher who saw the whole text learns more from each (Tang et al., 2019, arXiv
    1903.12136).
    """
    import torch

    if not fraction:
        return batch
    ids_BT, real_BT = batch["input_ids"], batch["attention_mask"].bool()
    inner_BT = real_BT & real_BT.roll(-1, dims=1)  # the last token is followed by padding, or by the first one
    inner_BT[:, 0] = inner_BT[:, -1] = False
    chosen_BT = inner_BT & (torch.rand(ids_BT.shape, device=ids_BT.device) < fraction)
    return {**batch, "input_ids": ids_BT.masked_fill(chosen_BT, mask_id)}


def imitate(
    teacher_BL: np.ndarray[Any, Any], split: training.Split, temperature: float, mixing: float
) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    """The loss mixing * T^2 * KL(teacher || student) + (1 - mixing) * cross-entropy (Hinton, arXiv 1503.02531)."""
    import torch
    from torch.nn import functional

    soft_BL = torch.log_softmax(torch.from_numpy(teacher_BL) / temperature, dim=1)
    targets_B = torch.from_numpy(split.targets)

    def loss(logits_BL: torch.Tensor, rows: list[int]) -> torch.Tensor:
        place = logits_BL.device
        if mixing == 0:
            return functional.cross_entropy(logits_BL.float(), targets_B[rows].to(place))
        mine_BL = torch.log_softmax(logits_BL.float() / temperature, dim=1)
        apart = functional.kl_div(mine_BL, soft_BL[rows].to(place), log_target=True, reduction="batchmean")
        plain = functional.cross_entropy(logits_BL.float(), targets_B[rows].to(place))
        return mixing * temperature**2 * apart + (1 - mixing) * plain

    return loss


def apart(
    teacher: torch.nn.Module, batch: dict[str, torch.Tensor], mine: tuple[torch.Tensor, ...], kept: Sequence[int]
) -> torch.Tensor:
    """Mean squared distance of the student's states, each [B, T, W], from those after the teacher's layers `kept`.

    The last are those of the first token, the only one that the head reads (Jiao et al., 2020, arXiv 1909.10351).
    """
    import torch

    with torch.no_grad(), hf.first_token_only(teacher):
        states = teacher(**batch, output_hidden_states=True).hidden_states
    total = torch.zeros((), device=mine[0].device)
    for state_BTW, layer in zip(mine[1:], kept):
        real_BT = batch["attention_mask"][:, : state_BTW.shape[1]]
        far_BT = ((state_BTW - states[layer + 1]) ** 2).mean(dim=-1)
        total = total + (far_BT * real_BT).sum() / real_BT.sum()
    return total / len(kept)
