"""Read what the evaluations wrote, as the gate and the report want it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from slimline import gate
from slimline.errors import StoreError

DOCUMENTS, DIVERGENCES = "documents.parquet", "divergence.parquet"
LENGTHS = ((0, 16), (16, 32), (32, 64), (64, None))
"""Slices by length in tokens: from, up to but without."""


def table(folder: Path) -> dict[str, list[Any]]:
    """The answers of one model to every example: columns id, text, label, predicted, score, length_tokens, logit_*."""
    import pyarrow.parquet as parquet

    file = folder / "predictions.parquet"
    if not file.is_file():
        raise StoreError(
            f"{folder} is not a quality evaluation: it has no {file.name}. Give one of evaluate.classification."
        )
    columns: dict[str, list[Any]] = parquet.read_table(file).to_pydict()
    return columns


def quality(folder: Path) -> gate.Predictions | gate.Losses:
    """What a quality evaluation found: answers, or how surprised a language model is by documents."""
    return losses(folder) if (folder / DOCUMENTS).is_file() else predictions(folder)


def losses(folder: Path) -> gate.Losses:
    """How surprised a language model is by each document of which a token was scored."""
    import pyarrow.parquet as parquet

    rows = [row for row in parquet.read_table(folder / DOCUMENTS).to_pylist() if row["tokens"]]
    return gate.Losses(
        ids=[row["id"] for row in rows],
        tokens=[row["tokens"] for row in rows],
        nll=[row["nll"] for row in rows],
        text=hashlib.sha256("".join(str(row["digest"]) for row in rows).encode()).hexdigest(),
    )


def strays(folder: Path) -> gate.Strays:
    """How far a language model's next tokens are from the baseline's."""
    import pyarrow.parquet as parquet

    file = folder / DIVERGENCES
    if not file.is_file():
        raise StoreError(f"{folder} is no divergence: it has no {file.name}. Give one of evaluate.divergence.")
    columns = parquet.read_table(file, columns=["tokens", "kl_sum", "agreed"]).to_pydict()
    tokens = sum(columns["tokens"])
    return gate.Strays(kl=sum(columns["kl_sum"]) / tokens, agreement=sum(columns["agreed"]) / tokens)


def predictions(folder: Path) -> gate.Predictions:
    """The answers of one model, with the slices by label and by length that limits may name."""
    rows = table(folder)
    label, tokens = np.array(rows["label"]), np.array(rows["length_tokens"])
    slices = {f"label:{name}": label == name for name in sorted(set(rows["label"]))}
    for low, high in LENGTHS:
        name = f"length:{low}-{high - 1}" if high else f"length:{low}+"
        slices[name] = (tokens >= low) & (tokens < (high or np.inf))
    return gate.Predictions(ids=rows["id"], labels=rows["label"], predicted=rows["predicted"], slices=slices)


def timings(folder: Path) -> dict[str, Any]:
    """All of a latency evaluation: how it was measured, on what machine, and every variant."""
    file = folder / "latency.json"
    if not file.is_file():
        raise StoreError(f"{folder} is not a latency evaluation: it has no {file.name}. Give one of evaluate.latency.")
    whole: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return whole


def variant(whole: dict[str, Any], digest: str) -> dict[str, Any]:
    """The numbers of the model with this digest."""
    for entry in whole["variants"]:
        if entry["digest"] == digest:
            return dict(entry)
    raise StoreError(f"the latency evaluation has no model {digest[:12]}. Measure it together with its baseline.")


def speed(folder: Path, digest: str) -> gate.Speed:
    """The model with this digest against the first of the latency evaluation."""
    whole = timings(folder)
    mine, base = variant(whole, digest), whole["variants"][0]
    return gate.Speed(
        latency=(mine["speedup"], mine["speedup_low"], mine["speedup_high"]),
        throughput=(mine["batch_speedup"], mine["batch_speedup_low"], mine["batch_speedup_high"]),
        size=base["weights_bytes"] / mine["weights_bytes"],
        memory=base["peak_memory_bytes"] / mine["peak_memory_bytes"],
        p50_ms=mine["p50_ms"],
        weights_bytes=mine["weights_bytes"],
        asked=whole.get("asked", "single texts"),
        memory_bytes=mine["peak_memory_bytes"],
    )
