"""How fast a model answers, against others, on real texts.

All variants run in this process, interleaved (see bench.py), on texts of a split drawn by seed, at their
real lengths, tokenization included; alone and in batches. Memory is the peak of a fresh process for each variant
that loads it and answers the same texts. Writes latency.json; the first of `against` is the baseline of every
ratio.

Cost: queries x 1.1 x the sum of all variants' times, the batches, and some seconds a variant for memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import Field

from slimline import artifact, bench, data, serve
from slimline.data import SplitName
from slimline.technique import BaseConfig, Metrics, Stored, track
from slimline.variants import describe, distinct, name_apart

NEEDS = "any"
GIVES = "evaluation"

LATENCY = "latency.json"
BLOCK = 22
"""Queries a block: two turns of eleven for every variant."""
BATCHES_A_BLOCK = 2
MEMORY_BATCHES = 8


class Config(BaseConfig):
    """What is timed against what, and how often."""

    data: Stored = Field(description="data set that texts are drawn from")
    split: SplitName = Field("test", description="part of it to draw from")
    against: tuple[Stored, ...] = Field((), description="other models to time; the first one is the baseline")
    queries: int = Field(662, ge=662, description="single texts timed; a p99 needs 662")
    batch_size: int = Field(16, gt=0, description="texts in a batch")
    batches: int = Field(16, ge=6, description="batches timed; a median with an interval needs 6")
    threads: int = Field(1, gt=0, description="processor threads a model may use")
    seed: int = Field(0, ge=0, description="of the draw and of the bootstrap")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Time the model and what it is compared with, write latency.json, and return the model's own numbers."""
    paths = distinct([*map(Path, config.against), source])
    texts = draw(data.read(Path(config.data), config.split).texts, config)
    batches = [texts[at : at + config.batch_size] for at in range(0, len(texts), config.batch_size)]
    batches = [batches[i % len(batches)] for i in range(config.batches)]
    predictors = {digest: serve.load(path, config.threads) for digest, path in paths.items()}
    singly = bench.interleave(
        {digest: asking(p, [[text] for text in texts]) for digest, p in predictors.items()},
        config.queries,
        -(-config.queries // BLOCK),
        "timing single texts",
    )
    together = bench.interleave(
        {digest: asking(p, batches) for digest, p in predictors.items()},
        config.batches,
        -(-config.batches // BATCHES_A_BLOCK),
        "timing batches",
        warm=True,
    )
    variants = []
    for digest, path in track(list(paths.items()), "measuring memory"):
        variants.append(
            {
                **describe(artifact.read(path), predictors[digest].runtime),
                **times(singly, together, digest, config),
                "peak_memory_bytes": bench.peak_memory_bytes(path, batches[:MEMORY_BATCHES], config.threads),
            }
        )
    name_apart(variants)
    measured = {
        "queries": config.queries,
        "batch_size": config.batch_size,
        "threads": config.threads,
        "tokenization": "included",
        "machine": bench.machine(),
        "variants": variants,
    }
    (out / LATENCY).write_text(json.dumps(measured, indent=2, ensure_ascii=False), encoding="utf-8")
    own = next(v for v in variants if v["digest"] == artifact.read(source).digest)
    return {key: float(value) for key, value in own.items() if isinstance(value, int | float)}


def asking(predictor: serve.Predictor, questions: list[list[str]]) -> bench.Call:
    """A call that answers question number i."""
    return lambda i: predictor.predict(questions[i])


def draw(texts: list[str], config: Config) -> list[str]:
    """As many texts as there are queries, in an order drawn by seed; all are used before one is used again."""
    order = np.random.default_rng(config.seed).permutation(len(texts))
    return [texts[i] for i in np.resize(order, config.queries)]


def times(
    singly: dict[str, list[bench.Times]], together: dict[str, list[bench.Times]], digest: str, config: Config
) -> dict[str, float]:
    """One variant's times in milliseconds, and its ratios to the first variant."""
    baseline = next(iter(singly))
    low, p50, high = bench.median_interval(np.concatenate(singly[digest]))
    _, p99 = bench.tail(np.concatenate(singly[digest]))
    batch_p50 = float(np.median(np.concatenate(together[digest])))
    ratio = bench.speedup(singly[baseline], singly[digest], config.seed)
    batch_ratio = bench.speedup(together[baseline], together[digest], config.seed)
    return {
        "p50_ms": p50,
        "p50_low_ms": low,
        "p50_high_ms": high,
        "p99_ms": p99,
        "batch_p50_ms": batch_p50,
        "throughput_per_s": 1000 * config.batch_size / batch_p50,
        **dict(zip(("speedup", "speedup_low", "speedup_high"), ratio)),
        **dict(zip(("batch_speedup", "batch_speedup_low", "batch_speedup_high"), batch_ratio)),
    }
