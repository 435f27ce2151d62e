"""How fast, said with as much certainty as the measurement has.

Variants are timed interleaved in ABBA blocks, so that a noisy or warming machine slows all of them alike: in
each block all variants answer one half of the block's queries in turn, then, in reverse order, the other half.
What is compared is a ratio, with an interval from a bootstrap over blocks, since times within a block share
their weather.

A tail is reported as an upper bound from order statistics at 99 % confidence (the binomial bound of MLPerf's
loadgen): p99 needs 662 queries, p90 needs 64, so that the bound is not the maximum itself.

Shapes: times are milliseconds, one array a block.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from slimline import processor
from slimline.errors import ConfigError, ModelError
from slimline.technique import track

Times = np.ndarray[Any, np.dtype[np.float64]]
Call = Callable[[int], object]

WARM_UP = 10
"""Calls in a round of warm-up."""


def interleave(
    calls: dict[str, Call], queries: int, blocks: int, what: str = "timing", warm: bool = False
) -> dict[str, list[Times]]:
    """The time of `call(query)` for every variant and query 0..queries-1, each once, block by block.

    All are warmed up first, and each turn of a variant begins with one call that is not timed: the others have just
    emptied the caches. `warm` leaves out both, for variants that ran already and calls too long to feel it.
    """
    if not 1 <= blocks <= queries:
        raise ConfigError(f"{queries} queries do not fill {blocks} blocks. Ask for at least one query a block.")
    times: dict[str, list[Times]] = {name: [] for name in calls}
    for call in () if warm else calls.values():
        warm_up(call, queries)
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what the libraries hold stays: going through it after every block would cost more than the block
    gc.disable()  # a collection would be charged to whoever is on
    try:
        for block in track(np.array_split(np.arange(queries), blocks), what):
            there, back = np.array_split(block, 2)
            forth = {name: _turn(call, there, warm) for name, call in calls.items()}
            for name in reversed(list(calls)):
                times[name].append(np.concatenate([forth[name], _turn(calls[name], back, warm)]))
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return times


def _turn(call: Call, queries: np.ndarray[Any, Any], warm: bool) -> Times:
    taken = np.empty(len(queries))
    if len(queries) and not warm:
        call(int(queries[0]))
    for at, query in enumerate(queries):
        start = time.perf_counter_ns()
        call(int(query))
        taken[at] = time.perf_counter_ns() - start
    return taken / 1e6


def warm_up(call: Call, queries: int, patience: int = 20, clock: Callable[[], float] = time.perf_counter) -> int:
    """Call in rounds of ten over the same queries until a round is no longer faster by 5 %. Returns the calls made."""
    last, done = float("inf"), 0
    while done < patience:
        done += 1
        start = clock()
        for at in range(WARM_UP):
            call(at % queries)
        taken = clock() - start
        if taken > 0.95 * last:
            break
        last = taken
    return done * WARM_UP


@lru_cache
def queries_needed(percentile: float, over: int = 1, confidence: float = 0.99) -> int:
    """The fewest queries that bound a percentile when `over` of them may lie above the bound."""
    from scipy.stats import binom

    n = over + 1
    while binom.cdf(over, n, 1 - percentile) > 1 - confidence:
        n += 1
    return n


def upper_bound(times: Times, percentile: float, confidence: float = 0.99) -> float:
    """The smallest time seen that the true percentile is below with this confidence.

    With k of n sorted times at or below it, the bound holds with probability P(Binomial(n, percentile) < k).
    """
    from scipy.stats import binom

    n = len(times)
    k = int(binom.ppf(confidence, n, percentile)) + 1
    if k > n:
        needed = queries_needed(percentile, over=0, confidence=confidence)
        raise ConfigError(f"{n} queries cannot bound a p{percentile * 100:g}. Time at least {needed}.")
    return float(np.sort(times)[k - 1])


def tail(times: Times) -> tuple[int, float]:
    """(99, bound) from 662 times on, (90, bound) from 64 on. Raises ConfigError for fewer."""
    for percentile in (0.99, 0.9):
        if len(times) >= queries_needed(percentile):
            return round(percentile * 100), upper_bound(times, percentile)
    raise ConfigError(f"{len(times)} queries cannot bound a tail. Time at least {queries_needed(0.9)}.")


def median_interval(times: Times, confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, median, high): the order statistics that hold the true median between them."""
    from scipy.stats import binom

    n = len(times)
    below = int(binom.ppf((1 - confidence) / 2, n, 0.5))  # the l-th smallest is safe if P(Binomial < l) is small
    if binom.cdf(below - 1, n, 0.5) > (1 - confidence) / 2 or below < 1:
        below = 0
    if below == 0:
        raise ConfigError(f"{n} queries cannot bound a median. Time at least 6.")
    ordered = np.sort(times)
    return float(ordered[below - 1]), float(np.median(ordered)), float(ordered[n - below])


def speedup(baseline: Sequence[Times], variant: Sequence[Times], seed: int = 0) -> tuple[float, float, float]:
    """(ratio, low, high): how many times faster the variant's median is, with a 95 % interval.

    The ratio of medians, so that it agrees with the p50s beside it. Blocks are drawn with replacement, the same
    ones for both, since a slow moment of the machine hit both.
    """
    rng = np.random.default_rng(seed)
    ratio = _ratio(baseline, variant)
    drawn = rng.integers(0, len(baseline), size=(2000, len(baseline)))
    ratios = [_ratio([baseline[i] for i in row], [variant[i] for i in row]) for row in drawn]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return ratio, float(low), float(high)


def _ratio(baseline: Sequence[Times], variant: Sequence[Times]) -> float:
    return float(np.median(np.concatenate(baseline)) / np.median(np.concatenate(variant)))


def peak_memory_bytes(path: Path, batches: Sequence[Sequence[Any]], threads: int) -> int:
    """The most memory that a fresh process needs to load a model and answer these batches.

    Batches are of texts or, for a language model, of lists of token ids, each behind which it writes some more.
    """
    done = subprocess.run(
        [sys.executable, "-m", "slimline.probe", str(path), str(threads)],
        input=json.dumps([list(batch) for batch in batches]),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode != 0:
        last = (done.stderr.strip().split("\n") or [""])[-1]
        raise ModelError(f"{path} does not answer in a fresh process: {last[:300]}. Make it again.")
    return int(done.stdout.split()[-1])


# The machine

ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
"""Instruction sets that decide how fast int8 and bf16 are."""


def machine() -> dict[str, Any]:
    """What the numbers were measured on. Imports none of the libraries whose versions it gives."""
    known = processor.this()
    memory = [line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal:")]
    return {
        "cpu": known.name or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [name for name in ISA if known.has(name)],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip(),
        "memory_bytes": int(memory[0]) * 1024 if memory else 0,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
        "gpu": _gpu(),
    }


def _read(file: str) -> str:
    path = Path(file)
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
