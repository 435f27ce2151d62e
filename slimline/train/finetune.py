"""Fine-tune an encoder on labelled texts.

The labels are those of the data, sorted by name; a bare encoder gets a fresh head, a head that is there must fit. The
model is left as it was after its best epoch on the validation split. Cost: about 3 x 2 x parameters x tokens operations
an epoch. How it trains is said in training.py.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from slimline import data, hf, training
from slimline.technique import Metrics, Stored

NEEDS = GIVES = "hf"


class Config(training.Training):
    """Options of train.finetune."""

    data: Stored = Field(description="data set: its train split is learned, its validation split chooses the epoch")
    learning_rate: float = Field(5e-5, gt=0, lt=1, description="the highest rate, after warm-up")
    max_length_tokens: int = Field(128, gt=2, le=8192, description="texts are cut here, now and when served")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Train the model in `source` on the data and write it to `out`."""
    labels = data.read(Path(config.data), "train").label_names
    model = hf.load(source, labels, seed=config.seed)
    limit = min(config.max_length_tokens, hf.max_length(source))
    model.config.slimline_max_length = limit  # type: ignore[union-attr]
    tokenizer = hf.tokenizer(source, limit)
    train, validation = (training.read(Path(config.data), name, tokenizer, labels) for name in ("train", "validation"))
    import torch

    targets_B = torch.from_numpy(train.targets)

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], rows: list[int]) -> torch.Tensor:
        logits_BL = model(**batch).logits
        return torch.nn.functional.cross_entropy(logits_BL.float(), targets_B[rows].to(logits_BL.device))

    metrics = training.fit(model, tokenizer, train, validation, config, loss, "training")
    hf.save(model, source, out)
    return metrics
