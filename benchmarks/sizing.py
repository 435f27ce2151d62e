"""What many optimizations a day need, computed from what was measured: writes docs/sizing.md from store.json.

    python -m benchmarks.sizing

Nothing is measured here. One optimization is one pipeline of benchmarks/store.md; what a real one has more of is
training, which runs on its own machines, and bytes of models, for which the movie reviews of the README stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "sizing.md"
A_DAY = (10, 1_000, 100_000)
BUSY = 0.5
"""How much of a server's processors may be in use on average, so that the busiest hour still fits."""
MODELS_MB = 91 + 91 + 46 + 46 + 40 + 15
"""What `make run` stores: the base, fine-tuned, distilled, pruned, exported and rounded."""
MINUTES = 13
"""What `make run` takes on two cores."""


def needs(known: dict[str, Any], a_day: int) -> dict[str, float]:
    """Cores, bytes and machines for so many optimizations a day."""
    runs = known["runs"]
    cores = {name: a_day * seconds / 86_400 / BUSY for name, seconds in runs["processor_s"].items()}
    return {
        **{f"{name}_cores": value for name, value in cores.items()},
        "database_gb_a_year": 365 * a_day * runs["database_bytes"] / runs["runs"] / 1e9,
        "bucket_gb_a_day": a_day * MODELS_MB / 1e3,
        "mb_per_s": a_day * 2 * MODELS_MB / 86_400,
        "step_cores": a_day * MINUTES * 60 * 2 / 86_400,
    }


def first(known: dict[str, Any]) -> tuple[str, float]:
    """The part that is full first as optimizations a day grow on one machine of two cores each, and at how many."""
    a_day = {name: 2 * BUSY * 86_400 / seconds for name, seconds in known["runs"]["processor_s"].items()}
    a_day["transfer"] = known["transfer"]["slimline up"]["mb_per_s"] * 86_400 * BUSY / (2 * MODELS_MB)
    name = min(a_day, key=lambda part: a_day[part])
    return name, a_day[name]


def page(known: dict[str, Any]) -> str:
    """The whole page."""
    table = {n: needs(known, n) for n in A_DAY}
    rows = (
        ("tracking server, cores", "tracking_cores", ".2f"), ("PostgreSQL, cores", "database_cores", ".2f"),
        ("bucket's server, cores", "bucket_cores", ".2f"), ("PostgreSQL, GB a year", "database_gb_a_year", ",.1f"),
        ("bucket, GB a day", "bucket_gb_a_day", ",.1f"), ("to and from the bucket, MB/s", "mb_per_s", ",.2f"),
        ("steps themselves, cores", "step_cores", ",.1f"),
    )  # fmt: skip
    lines = [f"| {name} | " + " | ".join(format(table[n][key], how) for n in A_DAY) + " |" for name, key, how in rows]
    part, a_day = first(known)
    names = {"tracking": "the tracking server", "database": "PostgreSQL", "bucket": "the bucket's server",
             "transfer": "the way to the bucket"}  # fmt: skip
    growth = known["growth"][0], known["growth"][-1]
    step = [row["actions"]["a step with its model"]["seconds"] * 1000 for row in growth]
    return f"""# Sizing

Computed by `python -m benchmarks.sizing` from [what was measured](../benchmarks/store.md) on
{known["machine"]["cores"]} cores of {known["machine"]["cpu"]}. Cores are those of that machine,
at {BUSY:.0%} use on average.

| optimizations a day | {" | ".join(f"{n:,}" for n in A_DAY)} |
| --- | {" | ".join("---:" for _ in A_DAY)} |
{chr(10).join(lines)}

One optimization stores {MODELS_MB} MB of models, as `make run` does, and reads each once; its steps keep two cores busy
for {MINUTES} minutes.

**What gives way first** is {names[part]}: with two cores it is half busy at {a_day:,.0f} optimizations a day.

- *The tracking server* hashes a password for every request, which would be most of what it does;
  `auth_cache_ttl_seconds = 60` in its settings, as measured here, spares that for as long as an old password may go on
  after it was changed. It keeps nothing else, so two of them behind one address do twice as much.
- *PostgreSQL* does not mind how many runs there are: behind {growth[1]["runs"]:,} a step asks {step[1]:.0f} ms of the
  store, behind {growth[0]["runs"]:,} {step[0]:.0f} ms.
- *The bucket* is what grows. Steps are reused as long as their models are there, so old ones are deleted by age and
  never under an alias; a lifecycle rule aborts unfinished multipart uploads after a day.
- *Models of gigabytes* go to the bucket straight from the steps. Let no tracking server pass them on: give steps
  credentials for the bucket, or let the server sign urls (`MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=true`).
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads((HERE / "store.json").read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
