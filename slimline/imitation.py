"""Learning from a teacher: what distillation and the recovery after pruning share.

The teacher answers every text once; the student follows those answers, softened, beside the labels (Hinton et al.,
2015, arXiv 1503.02531), reads each text with some words hidden, and may follow states layer by layer.

Shapes: N = texts of a split, B = texts of a batch, T = tokens, L = labels, W = width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def lesson(
    config: Imitation,
    train: training.Split,
    mask_id: int,
    answers_NL: torch.Tensor | None,
    watched: Any,
    kept: Sequence[int],
) -> training.Loss:
    """The loss of a student who reads with some words hidden, imitates, and with `hidden` follows states as well.

    `watched` shows the states, of its layers `kept`; it also gives the answers where there are none from before.
    """
    import torch

    targets_N = torch.from_numpy(train.targets)

    def loss(student: torch.nn.Module, batch: dict[str, torch.Tensor], rows: list[int]) -> torch.Tensor:
        mine = student(**hide(batch, config.hide, mask_id), output_hidden_states=config.hidden > 0)
        shown: Any = show(watched, batch) if config.hidden else None
        answers_BL = shown.logits if answers_NL is None else answers_NL[rows]
        value = imitate(mine.logits, answers_BL, targets_N[rows], config)
        if not config.hidden:
            return value
        return value + config.hidden * apart(mine.hidden_states, shown.hidden_states, batch["attention_mask"], kept)

    return loss


def ask(teacher: torch.nn.Module, tokenizer: hf.Tokenizer, split: training.Split) -> torch.Tensor:
    """The teacher's logits [N, L] for every text of the split, in its order."""
    import torch

    with hf.first_token_only(teacher):
        logits_NL = hf.logits(teacher, tokenizer, split.texts, watch=lambda rows: track(rows, "asking the teacher"))
    return torch.from_numpy(logits_NL)


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
    mine_BL: torch.Tensor, teacher_BL: torch.Tensor, targets_B: torch.Tensor, config: Imitation
) -> torch.Tensor:
    """The loss mixing * T^2 * KL(teacher || student) + (1 - mixing) * cross-entropy (Hinton, arXiv 1503.02531)."""
    from torch.nn import functional

    mine_BL, place = mine_BL.float(), mine_BL.device
    plain = functional.cross_entropy(mine_BL, targets_B.to(place))
    soft_BL = functional.log_softmax(teacher_BL.float().to(place) / config.temperature, dim=1)
    mine_BL = functional.log_softmax(mine_BL / config.temperature, dim=1)
    far = functional.kl_div(mine_BL, soft_BL, log_target=True, reduction="batchmean")
    return config.mixing * config.temperature**2 * far + (1 - config.mixing) * plain


def show(teacher: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    """What the teacher makes of a batch: `logits` [B, L] and `hidden_states`, [B, T, W] before and after each layer.

    The last is of the first token, the only one that the head reads.
    """
    import torch

    with torch.no_grad(), hf.first_token_only(teacher):
        return teacher(**batch, output_hidden_states=True)


def apart(
    mine: Sequence[torch.Tensor], shown: Sequence[torch.Tensor], mask_BT: torch.Tensor, kept: Sequence[int]
) -> torch.Tensor:
    """Mean squared distance of the student's states, each [B, T, W], from those after the teacher's layers `kept`.

    Padding does not count (Jiao et al., 2020, arXiv 1909.10351).
    """
    import torch

    total = torch.zeros((), device=mine[0].device)
    for state_BTW, layer in zip(mine[1:], kept):
        real_BT = mask_BT[:, : state_BTW.shape[1]]
        far_BT = ((state_BTW - shown[layer + 1]) ** 2).mean(dim=-1)
        total = total + (far_BT * real_BT).sum() / real_BT.sum()
    return total / len(kept)
