"""Measure a champion against its base, served by PyTorch and by ONNX Runtime fp32, and write benchmarks/NAME.md.

    python -m benchmarks [NAME]

NAME is a registered model with a champion, or a ref such as models:/reviews/3; without one, reviews, as `make run`
leaves it. One thread, batch 1, real texts of the test split, tokenization included, all models interleaved in one
process; ratios with 95 % intervals. ONNX Runtime fp32 is the base with attention, layer norms and GELU fused, as ONNX
Runtime's own optimizer leaves it; what slimline's export adds (the last layer works on one token) is a row of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from slimline import artifact, evidence, judging, step, store
from slimline.evaluate import latency

QUERIES = 2000


def main(name: str) -> None:
    """Time, write the table and the numbers behind it, and say where they are."""
    ref = name if name.startswith("models:/") else f"models:/{name}@champion"
    name = ref.removeprefix("models:/").partition("@")[0].partition("/")[0]
    _, asked, _ = judging.verdict_at(store.version_of(ref).tags[store.PREFIX + "verdict_ref"])
    stage = artifact.read(store.fetch(asked.latency)).history[-1]
    base, served, *rest = (store.fetch(r) for r in stage.config["against"])
    quality = {
        "base": evidence.table(store.fetch(asked.baseline)),
        "champion": evidence.table(store.fetch(asked.quality)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        plain, out = Path(scratch) / "plain", Path(scratch) / "out"
        options = {"data": stage.config["data"], "first_token": False}
        step.run_on_folder("export.onnx", base, plain, options, lambda event: None)
        out.mkdir()
        against = (str(plain), str(base), str(served), *map(str, rest))
        config = latency.Config(data=stage.config["data"], against=against, queries=QUERIES, batches=48)
        latency.run(store.fetch(ref), out, config)
        measured = json.loads((out / latency.LATENCY).read_text(encoding="utf-8"))
    named = ["base, ONNX Runtime fp32", "base, PyTorch", "base, exported by slimline"]
    for variant, title in zip(measured["variants"], named):
        variant["name"] = title
    folder = Path(__file__).parent
    (folder / f"{name}.json").write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page(name, measured, quality), encoding="utf-8")
    print(f"{folder / name}.md")


def page(name: str, measured: dict[str, Any], quality: dict[str, dict[str, list[Any]]]) -> str:
    """The table as Markdown, with the machine and the command that made it."""
    variants = measured["variants"]
    torch = next(v for v in variants if v["format"] == "hf")
    machine = ", ".join(f"{key} {value}" for key, value in measured["machine"].items() if value)
    right = {who: accuracy(table) for who, table in quality.items()}
    lines = [
        f"# {name}: the champion against its base",
        "",
        f"`make run`, then `python -m benchmarks {name}`. {measured['queries']} texts of the test split one at a time "
        f"and {measured['batch_size']} at a time, {measured['threads']} thread, tokenization "
        f"{measured['tokenization']}, all models interleaved in one process; p99 is an upper bound from order "
        "statistics.",
        "",
        f"Machine: {machine}.",
        "",
        f"Accuracy on {len(quality['base']['id'])} test texts: base {right['base']:.2%}, champion "
        f"{right['champion']:.2%}: {right['champion'] / right['base']:.1%} of the base's.",
        "",
        "| model | p50 ms | p99 ms <= | against ONNX Runtime fp32 | against PyTorch | texts/s at "
        f"{measured['batch_size']} | weights MB | peak memory MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for v in variants:
        ratio = f"{v['speedup']:.2f}x ({v['speedup_low']:.2f}-{v['speedup_high']:.2f})"
        lines.append(
            f"| {v['name']} | {v['p50_ms']:.2f} | {v['p99_ms']:.2f} | {ratio} | "
            f"{torch['p50_ms'] / v['p50_ms']:.2f}x | {v['throughput_per_s']:.0f} | {v['weights_bytes'] / 1e6:.1f} | "
            f"{v['peak_memory_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def accuracy(table: dict[str, list[Any]]) -> float:
    """Fraction of the answers that are right."""
    return sum(a == b for a, b in zip(table["label"], table["predicted"])) / len(table["label"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "reviews")
