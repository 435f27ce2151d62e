"""The one training loop of language models: what they learn is a Course, how is a Tuition.

AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) in float32, with bf16 products where the machine multiplies them
in hardware; the rate rises, then falls; gradients are clipped. Nothing is dropped out. Every GPU of the machine takes
its share of each step, through accelerate; the sum of what they learn is that of one that takes it all. A step is its
number and the seed: which rows it reads and what is drawn. So a run that was killed goes on from its bookmark and ends
in the same bytes. Memory is 16 bytes a parameter, what the layers note for the way back (`recompute` notes only what
enters each), and some copies of the logits.

Shapes: B = rows of a batch, T = tokens of each, V = vocabulary.
"""

# Long because sharing a step among devices and pieces, and going on after a kill, must agree on what a step is.
from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from slimline import bookmark, chunks, decoder, hf, language, sheets
from slimline.errors import ModelError
from slimline.sheets import Sheets
from slimline.technique import BaseConfig, Metrics, Stored, stored_fields, track

if TYPE_CHECKING:
    import torch

SPARSE = 0.1
"""A matrix with at least this fraction of zeros was pruned, and keeps them."""


class Tuition(BaseConfig):
    """How long, how fast and how reproducibly: options that all who teach language models have in common."""

    data: Stored = Field(description="data set: its train split is learned, its validation split only measured")
    epochs: int = Field(1, gt=0, le=1000, description="how often the train split is read, if `steps` is 0")
    steps: int = Field(0, ge=0, description="how many steps to take, over as many epochs as that needs; 0 for `epochs`")
    batch_tokens: int = Field(8192, gt=0, description="tokens of a step, on all devices together")
    tokens_at_once: int = Field(2048, gt=0, description="tokens that go through the model together, on one device")
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="the highest rate, after warm-up")
    warmup: float = Field(0.1, ge=0, lt=1, description="fraction of the steps in which the rate rises")
    decay: Literal["cosine", "linear", "none"] = Field("cosine", description="how the rate falls after warm-up, to 0")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="pull of every matrix towards zero")
    clip: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of products; auto is bf16 with hardware")
    recompute: bool = Field(False, description="compute layers again on the way back: less memory, a third more time")
    keep_zeros: bool = Field(True, description="what pruning has set to zero stays zero")
    save_every: int = Field(50, gt=0, description="steps between bookmarks, from which a killed run goes on")
    validation_tokens: int = Field(16_384, ge=0, description="of the validation split, to measure before and after")
    cache: str = Field("", description="folder that keeps what a teacher said, for other steps; empty keeps nothing")
    seed: int = Field(0, ge=0, description="of the order of what is read, and of what is drawn")


@dataclass(frozen=True)
class Batch:
    """Some rows of text. Where `counted_BT`, the token that follows is to be learned."""

    ids_BT: torch.Tensor
    counted_BT: torch.Tensor
    positions_BT: torch.Tensor | None = None
    rows: tuple[int, ...] = ()

    def part(self, rows: slice) -> Batch:
        """A few of the rows."""
        positions_BT = None if self.positions_BT is None else self.positions_BT[rows]
        return Batch(self.ids_BT[rows], self.counted_BT[rows], positions_BT, self.rows[rows])

    def targets(self) -> torch.Tensor:
        """[counted]: the tokens to be learned."""
        return self.ids_BT.roll(-1, dims=1)[self.counted_BT]


class Course(Protocol):
    """What is to be learned."""

    def __len__(self) -> int:
        """Rows, all of which an epoch reads once."""

    @property
    def length(self) -> int:
        """Tokens of a row."""

    def batch(self, student: Any, step: int, rows: Sequence[int]) -> Batch:
        """Those rows, for that step."""

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss summed over the tokens that count."""


class Reading:
    """The course of reading sheets: every token is learned from those before it."""

    def __init__(self, sheets: Sheets) -> None:
        self.sheets = sheets
        self.length = sheets.ids_NT.shape[1]

    def __len__(self) -> int:
        return len(self.sheets)

    def batch(self, student: Any, step: int, rows: Sequence[int]) -> Batch:
        """Those sheets, whatever the step."""
        import torch

        ids, counted, positions = (
            torch.from_numpy(whole[list(rows)]).to(hf.config_device(student))
            for whole in (self.sheets.ids_NT, self.sheets.counted_NT, self.sheets.positions_NT)
        )
        return Batch(ids, counted, positions, tuple(rows))

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Cross-entropy with the text, in nats."""
        from torch.nn import functional

        return functional.cross_entropy(logits_BTV[batch.counted_BT].float(), batch.targets(), reduction="sum")


def everywhere(work: Callable[[], Metrics], out: Path) -> Metrics:
    """Do the work in one process a GPU, where there are several; what the first returns is the answer."""
    import torch

    number = torch.cuda.device_count()
    if number < 2 or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # a process that has touched a GPU cannot be forked
        return work()
    from accelerate import notebook_launcher

    file = out / ".metrics"

    def told() -> None:
        metrics = work()
        if _accelerator().is_main_process:
            file.write_text(json.dumps(metrics), encoding="utf-8")

    with redirect_stdout(sys.stderr):
        notebook_launcher(told, num_processes=number, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0")
    metrics: Metrics = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return metrics


def _accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator()


def share() -> tuple[int, int]:
    """(which, of how many): this process among those that do the work together."""
    accelerator = _accelerator()
    return accelerator.process_index, accelerator.num_processes


def wait() -> None:
    """Return when all processes have come here."""
    _accelerator().wait_for_everyone()


def student(source: Path) -> Any:
    """The model that is to learn. Raises ModelError for one in packed integers, which would be lost."""
    if hf.read_config(source).get("quantization_config"):
        raise ModelError(f"{source} is quantized, and training would undo that. Put this step before quantize.")
    _accelerator()  # chooses the device
    return decoder.load(source).requires_grad_(True)


def write(model: Any, source: Path, out: Path) -> None:
    """Write the student in the type that the source is stored in; the first process alone."""
    from slimline.shards import Weights

    if _accelerator().is_main_process:
        weights = Weights(source)
        stored = str(weights.raw(weights.stored()[0]).dtype).removeprefix("torch.")
        decoder.save(model, source, out, dtype="" if stored == "float32" else stored)
    wait()


def measured(plan: Tuition, tokenizer: language.Tokenizer, length: int) -> Sheets | None:
    """The validation split on sheets, as much of it as is to be measured; None for nothing."""
    if not plan.validation_tokens:
        return None
    whole = sheets.lay(sheets.read(Path(plan.data), "validation", tokenizer), length, tokenizer.eos or 0)
    return whole.some(max(1, plan.validation_tokens // length))


def same_vocabulary(source: Path, teacher: Path) -> None:
    """Raises ModelError if student and teacher do not call the same tokens by the same numbers."""
    mine, other = (language.Tokenizer(folder).fast.get_vocab() for folder in (source, teacher))
    if mine != other:
        raise ModelError(
            f"the teacher {teacher} has another vocabulary than {source} ({len(other)} and {len(mine)} tokens). Take "
            "one of the same family, or distill.sequences, which goes through text."
        )


def precision(plan: Tuition) -> str:
    """What products are made in: "bf16" or "fp32", for "auto" by what the hardware has; a trial would not repeat."""
    if plan.precision != "auto":
        return plan.precision
    return "bf16" if hf.has_bf16() else "fp32"


def casting(plan: Tuition) -> Callable[[], Any]:
    """What a forward pass runs within."""
    import torch

    kind = hf.device()
    return (lambda: torch.autocast(kind, dtype=torch.bfloat16)) if precision(plan) == "bf16" else nullcontext


def rate(step: int, steps: int, plan: Tuition) -> float:
    """The learning rate of a step, counted from 0."""
    warm = round(plan.warmup * steps)
    if step < warm:
        return plan.learning_rate * (step + 1) / (warm + 1)
    gone = (step - warm) / max(1, steps - warm)
    falls = {"cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone, "none": 1.0}
    return plan.learning_rate * falls[plan.decay]


def extent(plan: Tuition, number: int, length: int) -> tuple[int, int]:
    """(rows of a step, steps) to learn from so many rows of that length."""
    size = max(1, plan.batch_tokens // length)
    return size, plan.steps or math.ceil(plan.epochs * number / size)


def rows_of(step: int, size: int, number: int, seed: int) -> list[int]:
    """The rows that a step reads: every epoch is shuffled anew, and a batch may reach over into the next."""
    places = range(step * size, (step + 1) * size)
    return [int(_shuffled(number, seed, place // number)[place % number]) for place in places]


@functools.lru_cache(maxsize=4)
def _shuffled(number: int, seed: int, epoch: int) -> Any:
    return np.random.default_rng([seed, epoch]).permutation(number)


def fit(model: Any, course: Course, plan: Tuition, validation: Sheets | None, folder: Path, what: str) -> Metrics:
    """Train in place. `folder` keeps a bookmark, which a run of the same plan that was killed goes on from."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    accelerator, cast = _accelerator(), casting(plan)
    size, steps = extent(plan, len(course), course.length)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=True)
    pruned = [p for p in learned if p.ndim > 1 and float((p == 0).float().mean()) >= SPARSE] if plan.keep_zeros else []
    masks = {p: p != 0 for p in pruned}
    options = plan.model_dump(mode="json", exclude={"cache", *stored_fields(type(plan))})
    key = chunks.key(plan=options, rows=len(course), steps=steps)
    facts = bookmark.read(folder, model, optimizer, key) or {"key": key, "step": 0, "loss": 0.0}
    if validation and "before" not in facts:
        facts["before"] = loss_on(model, validation, cast)
    if plan.recompute:
        _let_layers_forget(model)
    whole = accelerator.prepare(model)
    tokens, start = 0, time.perf_counter()

    def note() -> str:
        return f"loss {facts['loss']:.3f}"

    for step in track(range(facts["step"], steps), what, note):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, plan)
        torch.manual_seed(plan.seed * 1_000_003 + step)
        loss, count = _step(whole, course, step, rows_of(step, size, len(course), plan.seed), plan, accelerator, cast)
        torch.nn.utils.clip_grad_norm_(learned, plan.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for weight, mask in masks.items():
            weight.data.mul_(mask)
        tokens += count
        facts.update(step=step + 1, loss=loss if step == 0 else 0.9 * facts["loss"] + 0.1 * loss)
        if (step + 1) % plan.save_every == 0 and step + 1 < steps and accelerator.is_main_process:
            bookmark.write(folder, model, optimizer, facts)
    seconds = time.perf_counter() - start
    model.eval()
    measured = (
        {"validation_loss_before": facts["before"], "validation_loss": loss_on(model, validation, cast)}
        if validation
        else {}
    )
    return {"train_loss": facts["loss"], "steps": float(steps), "tokens_per_s": tokens / seconds, **measured}


def _step(
    whole: Any, course: Course, step: int, rows: list[int], plan: Tuition, accelerator: Any, cast: Callable[[], Any]
) -> tuple[float, int]:
    """Gradients of one step, of the mean over all tokens that count on any device. Returns (that mean, the tokens)."""
    import torch

    place, world = accelerator.process_index, accelerator.num_processes
    model = accelerator.unwrap_model(whole)
    mine = rows[place::world]
    model.eval()  # all of it, but for layers that forget: so nothing is dropped
    with torch.no_grad(), cast():
        batch = course.batch(model, step, mine or rows[:1])
    if not mine:  # fewer rows than devices: this one goes along, and adds nothing
        batch = Batch(batch.ids_BT, torch.zeros_like(batch.counted_BT), batch.positions_BT, batch.rows)
    count = int(accelerator.reduce(batch.counted_BT.sum(), "sum"))
    for layer in _layers(model) if plan.recompute else ():
        layer.training = True
    at_once = max(1, plan.tokens_at_once // batch.ids_BT.shape[1])
    parts = [batch.part(slice(at, at + at_once)) for at in range(0, len(batch.ids_BT), at_once)]
    total = torch.zeros((), device=batch.ids_BT.device)
    for number, part in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(whole):
            with cast():
                logits = whole(**sheets.inputs(model, part.ids_BT, part.positions_BT)).logits
                loss = course.loss(logits, part)
            accelerator.backward(loss * world / max(1, count))  # gradients are averaged over the devices
        total += loss.detach()
    return float(accelerator.reduce(total, "sum")) / max(1, count), count


def loss_on(model: Any, text: Sheets, cast: Callable[[], Any]) -> float:
    """Mean cross-entropy of sheets, in nats a token; its exponential is the perplexity."""
    import torch

    accelerator, course = _accelerator(), Reading(text)
    total = torch.zeros(2, dtype=torch.float64, device=hf.config_device(model))
    with torch.no_grad(), cast():
        for row in range(accelerator.process_index, len(text), accelerator.num_processes):
            batch = course.batch(model, 0, [row])
            logits = model(**sheets.inputs(model, batch.ids_BT, batch.positions_BT)).logits
            total += torch.stack([course.loss(logits, batch), batch.counted_BT.sum()])
    loss, count = accelerator.reduce(total, "sum").tolist()
    return float(loss / count)


def _let_layers_forget(model: Any) -> None:
    """Have layers note only what enters them, and compute the rest again on the way back, while they are training."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in _layers(model):
        if isinstance(getattr(layer, "dropout", None), float):  # OPT's layers drop by themselves
            layer.dropout = 0.0


def _layers(model: Any) -> Any:
    return model.get_submodule(decoder.family(model.config.to_dict(), "the student").layers)
