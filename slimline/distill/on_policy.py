"""Distillation on the student's own text: it goes on from prompts, and the teacher says what it would have said.

A student that only ever reads good text never learns to find back from its own mistakes. Here it goes on from the
beginnings of documents, drawn at its own temperature, and at every token of that follows the live teacher's whole
distribution; in the other steps the documents themselves are gone on with (Agarwal et al., 2023, arXiv 2306.13649;
with reverse divergence as in Gu et al., 2023, arXiv 2306.08543, without its policy gradient). What is said is taken as
given: no gradient goes through the drawing. Costs both models in memory, and a step of both and of speaking, which is
slow: best after distill.tokens.

Shapes: B = texts, P = tokens of a prompt, A = tokens of an answer, T = P + A, V = vocabulary, N = tokens that count.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from slimline import decoder, hf, language, sheets, speech, tuition
from slimline.divergence import Kind, apart
from slimline.errors import DataError
from slimline.technique import Metrics, Stored

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True


class Config(tuition.Tuition):
    """Options of distill.on_policy."""

    teacher: Stored = Field(description="model to learn from, with the student's vocabulary")
    own_text: float = Field(0.5, ge=0, le=1, description="fraction of steps on the student's own text (lambda in GKD)")
    prompt: int = Field(32, ge=1, description="tokens of a document that are given; shorter documents are left out")
    answer: int = Field(96, ge=1, description="tokens that follow at most")
    divergence: Kind = Field("jensen_shannon", description="what brings the student near the teacher")
    beta: float = Field(0.5, gt=0, lt=1, description="of jensen_shannon: near 0 like forward, near 1 like reverse")
    temperature: float = Field(1.0, gt=0, le=100, description="softens both answers before they are compared")
    speaking_temperature: float = Field(1.0, gt=0, le=100, description="at which the student speaks")
    learning_rate: float = Field(3e-5, gt=0, lt=1, description="the highest rate, after warm-up")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Teach the student in `source` and write it to `out`."""
    return tuition.everywhere(lambda: work(source, out, config), out)


def work(source: Path, out: Path, config: Config) -> Metrics:
    """What every process does."""
    teacher, scratch = Path(config.teacher), out / "work"
    tuition.same_vocabulary(source, teacher)
    student, tokenizer = tuition.student(source), language.Tokenizer(source)
    documents = sheets.read(Path(config.data), "train", tokenizer)
    validation = tuition.measured(config, tokenizer, config.prompt + config.answer)
    course = Speaking([ids for ids, _ in documents], tokenizer.eos, decoder.load(teacher), config)
    metrics = tuition.fit(student, course, config, validation, scratch, "distilling")
    metrics |= {"parameters": float(sum(p.numel() for p in student.parameters()))}
    tuition.write(student, source, out)
    shutil.rmtree(scratch, ignore_errors=True)
    return metrics


class Speaking:
    """The course of going on from the beginnings of documents as the teacher would."""

    def __init__(self, documents: Sequence[list[int]], end: int | None, teacher: Any, config: Config) -> None:
        self.texts = [ids[: config.prompt + config.answer] for ids in documents if len(ids) > config.prompt]
        if not self.texts:
            raise DataError(f"no document is longer than the {config.prompt} tokens of a prompt. Lower `prompt`.")
        self.end, self.teacher, self.config = end, teacher, config
        self.length = config.prompt + config.answer

    def __len__(self) -> int:
        return len(self.texts)

    def speaks(self, step: int) -> bool:
        """Whether the student goes on by itself in this step."""
        return bool(np.random.default_rng([self.config.seed, step]).random() < self.config.own_text)

    def batch(self, student: Any, step: int, rows: Sequence[int]) -> tuition.Batch:
        """Prompts and what follows: the documents', or the student's own, by numbers drawn for step and row."""
        import torch

        plan, device = self.config, hf.config_device(student)
        texts = [self.texts[row] for row in rows]
        if self.speaks(step):
            prompts_BP = torch.tensor([ids[: plan.prompt] for ids in texts], device=device)
            numbers_BA = np.stack([np.random.default_rng([plan.seed, step, row]).random(plan.answer) for row in rows])
            drawn_BA = torch.from_numpy(numbers_BA).to(device)
            answers_BA, real_BA = speech.go_on(
                student, prompts_BP, plan.answer, self.end, drawn_BA, plan.speaking_temperature
            )
            ids_BT = torch.cat([prompts_BP, answers_BA], dim=1)
        else:
            padded = [ids + [self.end or 0] * (self.length - len(ids)) for ids in texts]
            ids_BT = torch.tensor(padded, device=device)
            long_B1 = torch.tensor([[len(ids)] for ids in texts], device=device)
            real_BA = torch.arange(plan.prompt, self.length, device=device) < long_B1
        counted_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        counted_BT[:, plan.prompt - 1 : -1] = real_BA
        return tuition.Batch(ids_BT, counted_BT, rows=tuple(rows))

    def loss(self, logits_BTV: torch.Tensor, batch: tuition.Batch) -> torch.Tensor:
        """T^2 * divergence from the teacher over the whole vocabulary, summed over the tokens that count."""
        import torch

        plan, counted_BT = self.config, batch.counted_BT
        with torch.no_grad():
            told_NV = self.teacher(input_ids=batch.ids_BT, use_cache=False).logits[counted_BT]
        log_p_NV, log_q_NV = (
            (logits_NV.float() / plan.temperature).log_softmax(dim=1) for logits_NV in (told_NV, logits_BTV[counted_BT])
        )
        return plan.temperature**2 * apart(log_p_NV, log_q_NV, plan.divergence, plan.beta).sum()
