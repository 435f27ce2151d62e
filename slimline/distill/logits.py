"""Distillation: a student with fewer of the teacher's layers learns the teacher's answers.

The student starts as a copy of the teacher with evenly spaced layers (Sanh et al., 2019, arXiv 1910.01108) and learns
from the teacher's softened answers beside the labels (Hinton et al., 2015, arXiv 1503.02531). The teacher answers the
train split once. With `hidden` it answers as the student learns, whose states then also follow those of the teacher's
layers that it stands in for (Jiao et al., 2020, arXiv 1909.10351).

Shapes: B = texts, T = tokens, L = labels, W = width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from slimline import artifact, hf, imitation, training
from slimline.errors import ConfigError
from slimline.technique import Metrics, Stored

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"


class Config(imitation.Imitation):
    """Options of distill.logits."""

    data: Stored = Field(description="data set: its train split is learned, its validation split chooses the epoch")
    layers: int = Field(3, gt=0, description="layers of the teacher that the student keeps")
    epochs: int = Field(3, gt=0, le=1000, description="how often the train split is read")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Make a student of the teacher in `source`, train it and write it to `out`."""
    labels = artifact.read(source).labels
    teacher, student = hf.load(source), hf.load(source)
    kept = evenly(len(hf.layers(teacher)), config.layers)
    keep_layers(student, kept)
    tokenizer = hf.tokenizer(source, hf.max_length(source))
    train, validation = (training.read(Path(config.data), name, tokenizer, labels) for name in ("train", "validation"))
    answers_NL = None if config.hidden else imitation.ask(teacher, tokenizer, train)
    loss = imitation.lesson(config, train, tokenizer.mask, answers_NL, teacher, kept)
    metrics = training.fit(student, tokenizer, train, validation, config, loss, "distilling")
    metrics |= {
        "teacher_validation_accuracy": training.validate(teacher, tokenizer, validation)[0],
        "layers": float(config.layers),
        "parameters": float(sum(p.numel() for p in student.parameters())),
    }
    hf.save(student, source, out)
    return metrics


def evenly(have: int, keep: int) -> list[int]:
    """Layers to keep, the last always among them: 3 of 6 are 1, 3 and 5. Raises ConfigError for more than there are."""
    if keep > have:
        raise ConfigError(f"distill.logits: option 'layers' is {keep}, but the teacher has {have}. Ask for fewer.")
    return [round((i + 1) * have / keep) - 1 for i in range(keep)]


def keep_layers(model: torch.nn.Module, kept: list[int]) -> None:
    """Drop all other layers, in place."""
    import torch

    all_layers = hf.layers(model)
    base: Any = model.base_model
    base.set_submodule(hf.layout(model).layers, torch.nn.ModuleList(all_layers[i] for i in kept))
    config: Any = model.config
    config.num_hidden_layers = len(kept)  # distilbert calls it n_layers, and maps this name to it
