"""Distillation token by token: a smaller language model learns what its teacher would say after every token of a text.

The student is the model that comes in, such as one that has lost layers, heads or weights; the teacher is named. It
answers the train split once (answers.py): the likeliest tokens and the mass of the rest, kept and used again by key.
The student follows those answers (Hinton et al., 2015, arXiv 1503.02531), by the divergence asked for, beside the text
itself. Costs the teacher's answers, three times a forward pass a token of the student, and 16 bytes a parameter.

Shapes: B = sheets, T = tokens, V = vocabulary, N = tokens that count, K = tokens that the teacher's answer names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from slimline import answers, language, sheets, tuition
from slimline.divergence import Kind, apart, classes
from slimline.sheets import Sheets
from slimline.technique import Metrics, Stored

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True


class Config(tuition.Tuition):
    """Options of distill.tokens."""

    teacher: Stored = Field(description="model to learn from, with the student's vocabulary")
    length: int = Field(512, ge=8, description="tokens of a sheet, on which documents are packed")
    divergence: Kind = Field("forward", description="what brings the student near the teacher")
    beta: float = Field(0.5, gt=0, lt=1, description="of jensen_shannon: near 0 like forward, near 1 like reverse")
    temperature: float = Field(1.0, gt=0, le=100, description="softens both answers before they are compared")
    mixing: float = Field(0.8, ge=0, le=1, description="weight of the teacher's answers against the text's")
    kept: int = Field(64, ge=1, le=4096, description="tokens of the teacher's answer that are told from the rest")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Teach the student in `source` and write it to `out`."""
    return tuition.everywhere(lambda: work(source, out, config), out)


def work(source: Path, out: Path, config: Config) -> Metrics:
    """What every process does."""
    teacher, scratch = Path(config.teacher), out / "work"
    tuition.same_vocabulary(source, teacher)
    student, tokenizer = tuition.student(source), language.Tokenizer(source)
    text = sheets.lay(sheets.read(Path(config.data), "train", tokenizer), config.length, tokenizer.eos or 0)
    size, steps = tuition.extent(config, len(text), config.length)
    text = text.some(size * steps, config.seed)  # the teacher is not asked about what will not be read
    validation = tuition.measured(config, tokenizer, config.length)
    cast = tuition.casting(config)
    answered = answers.ask(
        teacher, text, config.kept, config.temperature, Path(config.cache) if config.cache else scratch,
        tuition.precision(config), cast, tuition.share(),
    )  # fmt: skip
    tuition.wait()
    course = Following(text, answered, config)
    metrics = tuition.fit(student, course, config, validation, scratch, "distilling")
    metrics |= {"teacher_rest": answered.rest(), "parameters": float(sum(p.numel() for p in student.parameters()))}
    tuition.write(student, source, out)
    shutil.rmtree(scratch, ignore_errors=True)
    return metrics


class Following(tuition.Reading):
    """The course of following a teacher's answers to sheets."""

    def __init__(self, text: Sheets, answered: answers.Answers, config: Config) -> None:
        super().__init__(text)
        self.answered, self.config = answered, config

    def loss(self, logits_BTV: torch.Tensor, batch: tuition.Batch) -> torch.Tensor:
        """The sum mixing * T^2 * divergence + (1 - mixing) * cross-entropy, summed over the tokens that count."""
        import torch

        plan = self.config
        plain = super().loss(logits_BTV, batch) if plan.mixing < 1 else 0.0
        told = [self.answered.read(row) for row in batch.rows]
        device, counted_BT = logits_BTV.device, batch.counted_BT
        ids_NK = torch.stack([ids_TK for ids_TK, _ in told]).to(device)[counted_BT]
        log_p_NC = torch.stack([log_p_TC for _, log_p_TC in told]).to(device)[counted_BT]
        log_q_NC = classes(logits_BTV[counted_BT], ids_NK, plan.temperature)
        log_p_NC = log_p_NC[:, : log_q_NC.shape[1]]
        far_N = apart(log_p_NC, log_q_NC, plan.divergence, plan.beta)
        return plan.mixing * plan.temperature**2 * far_N.sum() + (1 - plan.mixing) * plain
