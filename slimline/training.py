"""The one training loop: what finetune, distill and the recovery after pruning share.

Batches hold texts of like length, so that little is padded; their order is shuffled by seed. AdamW with linear warm-up
and decay, no decay on biases and norms, gradients clipped at 1 (Loshchilov and Hutter, 2019, arXiv 1711.05101). bf16
where the processor has tiles for it, or the GPU. Deterministic under a seed on one machine.

Shapes: B = texts, T = tokens, L = labels, W = width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from slimline import data, hf
from slimline.technique import BaseConfig, Metrics, track

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.nn.Module, dict[str, torch.Tensor], list[int]], torch.Tensor]
    """(model, batch, the rows of the split that it holds) -> a scalar."""


class Training(BaseConfig):
    """How long, how fast and how reproducibly: options that all who train have in common."""

    epochs: int = Field(2, gt=0, le=1000, description="how often the train split is read")
    batch_size: int = Field(32, gt=0, description="texts in a step")
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="the highest rate, after warm-up")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, lt=1, description="pull of every matrix towards zero")
    dropout: float = Field(0.1, ge=0, lt=1, description="fraction of every state that a step does not see")
    average: float = Field(
        0.0, ge=0, le=1, description="weights are averaged over about this fraction of the steps before an epoch's end"
    )
    freeze_embeddings: bool = Field(
        False, description="leave the embeddings as they are, which saves a tenth of the time"
    )
    seed: int = Field(0, ge=0, description="of a fresh head, the order of batches, and what is dropped or hidden")


@dataclass(frozen=True)
class Split:
    """One split, tokenized once."""

    texts: list[str]
    targets: np.ndarray[Any, np.dtype[np.int64]]
    lengths: list[int]


def read(path: Path, split: str, tokenizer: hf.Tokenizer, labels: Sequence[str]) -> Split:
    """A split with its targets in the order of `labels`."""
    examples = data.read(path, split, labels)
    return Split(examples.texts, examples.targets(labels), tokenizer.lengths(examples.texts))


def fit(
    model: torch.nn.Module,
    tokenizer: hf.Tokenizer,
    train: Split,
    validation: Split,
    plan: Training,
    loss: Loss,
    what: str,
) -> Metrics:
    """Train in place and leave the model as it was after the best epoch by validation accuracy, then by loss.

    With `average`, what an epoch leaves is an exponential moving average of the weights (Polyak and Juditsky, 1992),
    which a small validation split ranks with less luck, and which is mostly better.
    """
    import torch

    torch.manual_seed(plan.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    draw = np.random.default_rng(plan.seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = plan.dropout
    if plan.freeze_embeddings:
        for weight in model.base_model.embeddings.parameters():  # type: ignore[union-attr]
            weight.requires_grad_(False)
    batches = [rows for _ in range(plan.epochs) for rows in shuffled(train.lengths, plan.batch_size, draw)]
    each = len(batches) // plan.epochs
    optimizer, schedule = optimizing(model, plan, len(batches))
    average = Average(model, plan.average * len(batches))
    cast = autocast(model)
    best: tuple[float, float] = (-1.0, 0.0)
    state: dict[str, torch.Tensor] = {}
    recent, tokens, start = 0.0, 0, time.perf_counter()

    def note() -> str:
        return f"loss {recent:.3f}"

    for done, rows in enumerate(track(batches, what, note), 1):
        model.train()
        batch = hf.tensors(tokenizer.encode([train.texts[i] for i in rows]), model)
        with cast(), hf.first_token_only(model):
            value = loss(model, batch, rows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        tokens += batch["input_ids"].numel()
        now = float(value.detach())
        recent = now if done == 1 else 0.95 * recent + 0.05 * now
        if done % each == 0:
            with average.in_place():
                score = validate(model, tokenizer, validation)
                if score > best:
                    best, state = score, {k: v.detach().clone() for k, v in model.state_dict().items()}
    seconds = time.perf_counter() - start
    model.load_state_dict(state)
    model.eval().requires_grad_(True)
    return {
        "train_loss": recent,
        "validation_accuracy": best[0],
        "validation_loss": -best[1],
        "tokens_per_s": tokens / seconds,
        "steps": float(len(batches)),
    }


class Average:
    """An exponential moving average of the weights that are learned, over about so many steps; of one step, or fewer,
    the weights themselves.
    """

    def __init__(self, model: torch.nn.Module, steps: float) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad] if steps > 1 else []
        self.means = [p.detach().clone() for p in self.weights]
        self.steps, self.seen = steps, 0

    def update(self) -> None:
        """Take in the weights as they are now. The first steps count alike, so that the start is soon forgotten."""
        import torch

        self.seen += 1
        if self.weights:
            now = [p.detach() for p in self.weights]
            torch._foreach_lerp_(self.means, now, 1 / min(self.seen, self.steps))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        kept = [p.detach().clone() for p in self.weights]
        try:
            for p, mean in zip(self.weights, self.means):
                p.data.copy_(mean)
            yield
        finally:
            for p, now in zip(self.weights, kept):
                p.data.copy_(now)


def shuffled(lengths: Sequence[int], batch_size: int, draw: np.random.Generator) -> Iterator[list[int]]:
    """Every row once, in batches of like length, both who meets whom and the order of batches shuffled."""
    jitter = draw.uniform(-1.5, 1.5, len(lengths))
    order = np.argsort(np.asarray(lengths) + jitter, kind="stable")
    batches = [order[at : at + batch_size].tolist() for at in range(0, len(order), batch_size)]
    for i in draw.permutation(len(batches)):
        yield batches[i]


def optimizing(model: torch.nn.Module, plan: Training, steps: int) -> tuple[Any, Any]:
    """AdamW and its linear warm-up and decay over so many steps."""
    import torch

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=True)
    warm = max(1, round(plan.warmup * steps))

    def rate(step: int) -> float:
        return (step + 1) / warm if step < warm else max(0.0, (steps - step) / max(1, steps - warm))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def validate(model: torch.nn.Module, tokenizer: hf.Tokenizer, split: Split) -> tuple[float, float]:
    """(accuracy, minus mean cross-entropy): greater is better."""
    with hf.first_token_only(model):
        logits_BL = hf.logits(model, tokenizer, split.texts).astype(np.float64)
    logits_BL -= logits_BL.max(axis=1, keepdims=True)
    log_p_BL = logits_BL - np.log(np.exp(logits_BL).sum(axis=1, keepdims=True))
    right = float((logits_BL.argmax(axis=1) == split.targets).mean())
    return right, float(log_p_BL[np.arange(len(split.targets)), split.targets].mean())


def autocast(model: torch.nn.Module) -> Callable[[], Any]:
    """bf16 autocast where the hardware has it, else nothing.

    What decides is what the processor says of itself and not a trial of both: two runs on a busy machine would differ.
    With AMX a step of MiniLM-L6 on 32 texts takes half the time (0.23 s for 0.44 on two cores).
    """
    import torch

    if not hf.has_bf16():
        return nullcontext
    kind = hf.config_device(model).type
    return lambda: torch.autocast(kind, dtype=torch.bfloat16)
