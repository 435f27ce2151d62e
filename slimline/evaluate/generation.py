"""How fast a language model reads a prompt and writes behind it, against others, on real text.

All variants run in this process, interleaved (see bench.py), on the same text of a split, cut to prompts of fixed
lengths in each one's own tokens. An answer is a prompt read (prefill) and `tokens` more written one by one, greedily,
whether an end token comes or not; both are timed, tokenization is not. Every length is asked one prompt at a time,
and the shortest also in each of `batches`. Memory is the peak of a fresh process for each variant that loads it and
answers the longest prompt and the largest batch.

Writes latency.json, shaped as evaluate.latency's, so that the gate and the report read either; of each variant:

    p50_ms, p50_low_ms, p50_high_ms, p99_ms     of one token written, one text at a time behind the shortest prompt
    speedup, speedup_low, speedup_high          ratio of that to the first variant's, with its 95 % interval
    throughput_per_s                            tokens of the longest prompt read in a second, one prompt at a time
    batch_p50_ms                                of reading the longest prompt
    batch_speedup, batch_speedup_low, _high     ratio of reading the longest prompt
    ttft_{N}_ms                                 to the first token behind a prompt of N tokens, alone
    prefill_{N}_tokens_per_s                    tokens of that prompt read in a second
    decode_{N}_tokens_per_s                     tokens written in a second behind it
    ttft_batch_{B}_ms, decode_batch_{B}_tokens_per_s    of B texts at once: until all have a first token, and all
                                                their tokens together
    peak_memory_bytes, weights_bytes, size_bytes, name, digest, format, runtime

The first of `against` is the baseline of every ratio. Tokens are each model's own: between models with different
tokenizers, ratios are of tokens and not of text.

Cost: answers x (reading + tokens x writing) for every length, every batch and every variant.

Shapes: N = answers, B = texts at once, T = tokens of a prompt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from slimline import artifact, bench, data, language
from slimline.data import SplitName
from slimline.errors import ConfigError
from slimline.language import LanguageModel
from slimline.technique import BaseConfig, Metrics, Stored, track
from slimline.variants import describe, distinct, name_apart

NEEDS = "any"
GIVES = "evaluation"

LATENCY = "latency.json"
BLOCK = 2
"""Answers a block: one there and one back for every variant."""

Positive = Annotated[int, Field(gt=0)]
Setting = tuple[int, int]
"""Tokens of a prompt, and texts at once."""
Blocks = list[bench.Times]


class Config(BaseConfig):
    """What is timed against what, on how much text, and how often."""

    data: Stored = Field(description="data set that prompts are cut from")
    split: SplitName = Field("test", description="part of it to cut from")
    against: tuple[Stored, ...] = Field((), description="other models to time; the first one is the baseline")
    lengths: tuple[Positive, ...] = Field((32, 128, 512), min_length=1, description="tokens of the prompts")
    batches: tuple[Positive, ...] = Field((4,), description="texts at once, beside one at a time")
    tokens: int = Field(32, gt=0, description="tokens written behind a prompt")
    answers: int = Field(22, ge=6, description="timed for each length and batch; with tokens, 662 for a p99")
    threads: int = Field(1, gt=0, description="processor threads a model may use")
    seed: int = Field(0, ge=0, description="of the order of texts and of the bootstrap")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Time the model and what it is compared with, write latency.json, and return the model's own numbers."""
    if config.answers * config.tokens < bench.queries_needed(0.99):
        raise ConfigError(
            f"{config.answers} answers of {config.tokens} tokens cannot bound a p99. "
            f"Ask for {-(-bench.queries_needed(0.99) // config.tokens)} answers."
        )
    paths = distinct([*map(Path, config.against), source])
    models = {digest: language.load(path, config.threads) for digest, path in paths.items()}
    timed = {setting: answer_all(models, setting, config) for setting in settings(config)}
    variants = []
    for digest, path in track(list(paths.items()), "measuring memory"):
        longest = prompts(models[digest], (max(config.lengths), 1), config)[0]
        widest = prompts(models[digest], (min(config.lengths), max(config.batches, default=1)), config)[0]
        variants.append(
            {
                **describe(artifact.read(path), models[digest].runtime),
                **summarize(timed, digest, config),
                "peak_memory_bytes": bench.peak_memory_bytes(path, [longest.tolist(), widest.tolist()], config.threads),
            }
        )
    name_apart(variants)
    measured = {
        "asked": "decoded tokens",
        "queries": config.answers,
        "batch_size": 1,
        "lengths": sorted(set(config.lengths)),
        "batches": sorted(set(config.batches)),
        "tokens": config.tokens,
        "threads": config.threads,
        "tokenization": "left out",
        "machine": bench.machine(),
        "variants": variants,
    }
    (out / LATENCY).write_text(json.dumps(measured, indent=2, ensure_ascii=False), encoding="utf-8")
    own = next(v for v in variants if v["digest"] == artifact.read(source).digest)
    return {key: float(value) for key, value in own.items() if isinstance(value, int | float)}


def settings(config: Config) -> list[Setting]:
    """Every length alone, and the shortest in every batch."""
    alone = [(length, 1) for length in sorted(set(config.lengths))]
    return [*alone, *((min(config.lengths), size) for size in sorted(set(config.batches) - {1}))]


def prompts(model: LanguageModel, setting: Setting, config: Config) -> language.Tokens:
    """int64 [N, B, T]: real text in the model's tokens; all of it is used before some is used again."""
    length, size = setting
    texts = data.documents(Path(config.data), config.split).texts
    order = np.random.default_rng(config.seed).permutation(len(texts))
    whole = language.windows(model.tokenizer, [texts[i] for i in order], length)
    rows = np.resize(np.arange(len(whole)), config.answers * size)
    return whole[rows].reshape(config.answers, size, length)


class Timed:
    """Answers of one model, of which each notes when its first token was there and what every other took."""

    def __init__(self, model: LanguageModel, prompts_NBT: language.Tokens, tokens: int) -> None:
        self.model, self.prompts_NBT, self.tokens = model, prompts_NBT, tokens
        self.first_ms = np.empty(len(prompts_NBT))
        self.others_ms = np.empty((len(prompts_NBT), tokens))

    def __call__(self, number: int) -> None:
        moments = [time.perf_counter_ns()]
        state = self.model.prefill(self.prompts_NBT[number], self.tokens)
        moments.append(time.perf_counter_ns())
        for _ in range(self.tokens):
            state = self.model.step(state)
            moments.append(time.perf_counter_ns())
        took = np.diff(moments) / 1e6
        self.first_ms[number], self.others_ms[number] = took[0], took[1:]


def answer_all(models: dict[str, LanguageModel], setting: Setting, config: Config) -> dict[str, tuple[Blocks, Blocks]]:
    """By model, in blocks: milliseconds to each answer's first token, and of each token after it."""
    calls = {digest: Timed(m, prompts(m, setting, config), config.tokens) for digest, m in models.items()}
    for call in calls.values():  # warm, and what a first answer sets up is there
        call(0)
    blocks = -(-config.answers // BLOCK)
    bench.interleave({**calls}, config.answers, blocks, f"timing {setting[1]} x {setting[0]} tokens", warm=True)
    rows = np.array_split(np.arange(config.answers), blocks)
    return {d: ([c.first_ms[r] for r in rows], [c.others_ms[r].ravel() for r in rows]) for d, c in calls.items()}


def summarize(timed: dict[Setting, dict[str, tuple[Blocks, Blocks]]], digest: str, config: Config) -> dict[str, float]:
    """One variant's times and speeds, and its ratios to the first variant."""
    short, long = (min(config.lengths), 1), (max(config.lengths), 1)
    first = next(iter(timed[short]))
    low, p50, high = bench.median_interval(np.concatenate(timed[short][digest][1]))
    ratio = bench.speedup(timed[short][first][1], timed[short][digest][1], config.seed)
    long_ratio = bench.speedup(timed[long][first][0], timed[long][digest][0], config.seed)
    long_p50 = _median(timed[long][digest][0])
    found = {
        "p50_ms": p50,
        "p50_low_ms": low,
        "p50_high_ms": high,
        "p99_ms": bench.upper_bound(np.concatenate(timed[short][digest][1]), 0.99),
        "batch_p50_ms": long_p50,
        "throughput_per_s": 1000 * long[0] / long_p50,
        **dict(zip(("speedup", "speedup_low", "speedup_high"), ratio)),
        **dict(zip(("batch_speedup", "batch_speedup_low", "batch_speedup_high"), long_ratio)),
    }
    for (length, size), each in timed.items():
        ttft, other = (_median(part) for part in each[digest])
        if size == 1:
            found[f"ttft_{length}_ms"] = ttft
            found[f"prefill_{length}_tokens_per_s"] = 1000 * length / ttft
            found[f"decode_{length}_tokens_per_s"] = 1000 / other
        else:
            found[f"ttft_batch_{size}_ms"] = ttft
            found[f"decode_batch_{size}_tokens_per_s"] = 1000 * size / other
    return found


def _median(blocks: Sequence[bench.Times]) -> float:
    return float(np.median(np.concatenate(blocks)))
