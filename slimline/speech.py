"""A language model goes on from prompts: token by token, repeatably, each text by its own numbers.

What is drawn for a text comes from numbers in [0, 1) that were drawn for it alone: the token is the first at which the
summed probabilities pass the number. So a text does not depend on those that are spoken beside it, or on the device.

Shapes: B = texts, P = tokens of a prompt, A = tokens of an answer, V = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimline import window

if TYPE_CHECKING:
    import torch


def go_on(
    model: Any,
    prompts_BP: torch.Tensor,
    number: int,
    end: int | None = None,
    drawn_BA: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(answers [B, A], real [B, A]): what follows the prompts, up to `number` tokens and the end token, which is real.

    Without `drawn_BA` always the likeliest token. Behind the end all is the end token again, and not real.
    """
    import torch

    cache, given_BT = window.cache(model), prompts_BP
    going_B = torch.ones(len(prompts_BP), dtype=torch.bool, device=prompts_BP.device)
    answers, real = [], []
    with torch.no_grad():
        for at in range(number):
            logits_BV = model(input_ids=given_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            next_B = logits_BV.argmax(1) if drawn_BA is None else draw(logits_BV / temperature, drawn_BA[:, at])
            if end is not None:
                next_B = torch.where(going_B, next_B, end)
            answers.append(next_B)
            real.append(going_B)
            if end is not None:
                going_B = going_B & (next_B != end)
                if not going_B.any():
                    break
            given_BT = next_B.unsqueeze(1)
    answers_BA, real_BA = torch.stack(answers, dim=1), torch.stack(real, dim=1)
    left = (0, number - len(answers))
    return torch.nn.functional.pad(answers_BA, left, value=end or 0), torch.nn.functional.pad(real_BA, left)


def draw(logits_BV: torch.Tensor, drawn_B: torch.Tensor) -> torch.Tensor:
    """[B]: the token that each number in [0, 1) falls on."""
    import torch

    passed_BV = logits_BV.double().softmax(dim=1).cumsum(dim=1)
    found_B1 = torch.searchsorted(passed_BV, drawn_B.double().unsqueeze(1) * passed_BV[:, -1:], right=True)
    return found_B1.squeeze(1).clamp(max=logits_BV.shape[1] - 1)


def beam(model: Any, prompts_BP: torch.Tensor, number: int, end: int | None, beams: int) -> tuple[Any, Any]:
    """The same by beam search: the whole answer that is likeliest among so many kept at once."""
    import torch

    prompt = prompts_BP.shape[1]
    with torch.no_grad():
        whole_BT = model.generate(
            prompts_BP, attention_mask=torch.ones_like(prompts_BP), max_new_tokens=number, num_beams=beams,
            do_sample=False, eos_token_id=end, pad_token_id=end or 0,
        )  # fmt: skip
    answers_BA = torch.nn.functional.pad(whole_BT[:, prompt:], (0, number - whole_BT.shape[1] + prompt), value=end or 0)
    ended_BA = (answers_BA == end).cumsum(dim=1) if end is not None else torch.zeros_like(answers_BA)
    real_BA = (ended_BA == 0) | ((ended_BA == 1) & (answers_BA == end))
    return answers_BA, real_BA
