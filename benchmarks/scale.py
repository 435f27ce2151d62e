"""What a model's size costs: memory, which should be flat, and minutes, which should be in proportion.

    python -m benchmarks.scale [--sizes 0.1 0.5 1 3] [--work quantize.rtn walk quantize.gptq] [--scratch FOLDER]
    python -m benchmarks.scale --gpu [--out FOLDER] [--scratch FOLDER]

Llama-shaped models of random bfloat16 weights are written shard by shard, worked on in a fresh process each, and
deleted again. Memory is what the process holds of its own (RssAnon), sampled every 10 ms, above what it held after the
same work on a tiny model: mapped files count in its resident set, too, but the system takes their pages back when it
needs them. Minutes are the processor's, so that a busy machine does not count. `walk` is what everything does that
calibrates: all layers on 16 windows of 512 tokens with the second moments of every map's inputs, and nothing changed.
Figures of earlier runs are kept, so that large sizes can be measured when the machine is free, and `--sizes` without
any only writes the page. Writes scale.json and scale.md.

With --gpu one layer of a model of 3 and one of 70 thousand million parameters is quantized on an NVIDIA GPU, from
folder to folder, and whole models of each size by quantize.gptq: seconds, and the most memory of the GPU and of the
process. Writes scale_gpu.json, and the page.

Shapes: N = windows, T = tokens, W = width.
"""

# Long because a size is made, worked on and told in one place, on a processor and on a GPU.
from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimline import bench, decoder, layerwise, technique
from slimline.shards import Writer

SIZES = {
    "0.1": (10, 768, 2048, 12, 4),
    "0.5": (16, 1536, 4096, 12, 4),
    "1": (22, 2048, 5632, 32, 4),
    "3": (28, 3072, 8192, 24, 8),
}
"""Thousand million parameters, about: layers, width, feed, heads, heads of keys."""
TINY = (2, 64, 128, 4, 2)
LARGE = ("70", 80, 8192, 28672, 64, 8, 128_256)
"""What is computed and not measured: Llama 3 70B, with its vocabulary."""
VOCABULARY, WINDOWS, LENGTH = 32_000, 16, 512
WORK = ("quantize.rtn", "walk", "quantize.gptq")
OPTIONS = {"quantize.rtn": {"search": False}, "quantize.gptq": {"windows": WINDOWS, "length": LENGTH}}
GPU_LAYERS = {"3": (28, 3072, 8192, 24, 8), "70": LARGE[1:6]}
"""Shapes of which one layer is quantized on a GPU; how many a model has comes first."""
GPU_WORK = ("quantize.rtn", "quantize.fp8_w8a8", "quantize.gptq")
GPU_WINDOWS, GPU_LENGTH, GPU_VOCABULARY = 16, 2048, 1024
HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    """Measure what was asked for, and write the table of all that is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--work", nargs="*", default=list(WORK), choices=WORK)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--one", nargs=3, metavar=("WORK", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.one:
        print(json.dumps(one(asked.one[0], *map(Path, asked.one[1:]))))
        return
    file = HERE / "scale.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"runs": {}}
    if asked.gpu:
        on_gpu(asked.out, asked.scratch)
        asked.sizes = []
    for size in asked.sizes:
        with tempfile.TemporaryDirectory(prefix="slimline-scale-", dir=asked.scratch) as scratch:
            source = Path(scratch) / "source"
            parameters = make(source, *SIZES[size])
            for work in asked.work:
                if work != "walk" and work.partition(".")[2] not in technique.names("quantize"):
                    print(f"{work} is not there yet")
                    continue
                out = Path(scratch) / "out"
                out.mkdir()
                command = [sys.executable, "-m", "benchmarks.scale", "--one", work, str(source), str(out)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = {"parameters": parameters, **json.loads(done.stdout.splitlines()[-1])}
                shutil.rmtree(out)
                known["runs"][f"{work} {size}"] = found
                known["machine"] = bench.machine()
                file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                (HERE / "scale.md").write_text(page(known), encoding="utf-8")
                print(work, size, found)
    (HERE / "scale.md").write_text(page(known), encoding="utf-8")


def make(
    folder: Path, layers: int, width: int, feed: int, heads: int, groups: int, vocabulary: int = VOCABULARY,
    device: str = "cpu",
) -> int:  # fmt: skip
    """Write a Llama of random weights in bfloat16, a layer in memory at a time. Returns how many parameters."""
    import torch

    folder.mkdir(parents=True)
    narrow, count = width // heads * groups, 0
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width), "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (feed, width), "mlp.up_proj": (feed, width),
        "mlp.down_proj": (width, feed), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    around = {"model.embed_tokens": (vocabulary, width), "model.norm": (width,), "lm_head": (vocabulary, width)}
    writer = Writer(folder, layers + 1)
    for i in range(layers + 1):
        torch.manual_seed(i)
        scope, part = (f"model.layers.{i}.", shapes) if i < layers else ("", around)
        tensors = {
            f"{scope}{name}.weight": torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[1] ** -0.5)
            for name, shape in part.items()
        }
        count += sum(tensor.numel() for tensor in tensors.values())
        writer.write(i, tensors)
    writer.finish()
    config = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": feed,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words(folder, vocabulary)
    return count


def words(folder: Path, vocabulary: int = VOCABULARY, windows: int = WINDOWS, length: int = LENGTH) -> None:
    """A tokenizer of as many words as the model has rows, and documents of random ones that fill these windows."""
    import numpy as np
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = np.random.default_rng(0)
    rows = (draw.integers(vocabulary, size=length + 1) for _ in range(windows + 1))
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row), "split": "calibration"}) for row in rows]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")


def one(work: str, source: Path, out: Path) -> dict[str, float]:
    """Minutes, and the most memory of its own that this process held before and while it worked."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:  # what libraries take once is no model's doing
        tiny, nowhere = Path(scratch) / "tiny", Path(scratch) / "out"
        make(tiny, *TINY)
        nowhere.mkdir()
        run(work, tiny, nowhere)
    peak, over = Peak(), threading.Event()
    sampler = threading.Thread(target=peak.watch, args=(over,))
    before, start, spent = own_bytes(), time.perf_counter(), time.process_time()
    sampler.start()
    run(work, source, out)
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    over.set()
    sampler.join()
    return {
        "seconds": seconds, "processor_seconds": spent,
        "before_bytes": before, "own_bytes": peak.own, "resident_bytes": peak.resident,
    }  # fmt: skip


def run(work: str, source: Path, out: Path) -> None:
    """Do the work, with random text where it calibrates."""
    if work == "walk":
        walk(source, out)
        return
    module = technique.find(work)
    data = {"data": str(source / "documents.jsonl")} if "data" in module.Config.model_fields else {}
    module.run(source, out, technique.configure(module, OPTIONS.get(work, {}) | data))


def walk(source: Path, out: Path) -> None:
    """Second moments of every map's inputs, and every layer stored as it is."""
    import numpy as np

    tokens_NT = np.random.default_rng(0).integers(VOCABULARY, size=(WINDOWS, LENGTH))
    for layer in layerwise.walk(source, out, tokens_NT):
        for names in layer.kind.readers:
            layer.measure(names[:1], lambda x_TI: x_TI.T @ x_TI)
        layer.store()
    decoder.copy_rest(source, out)


class Peak:
    """The most memory that this process has held, sampled by a thread."""

    def __init__(self) -> None:
        self.own = self.resident = 0

    def watch(self, over: threading.Event) -> None:
        """Sample until it is over."""
        while not over.wait(0.01):
            self.own = max(self.own, own_bytes())
            self.resident = max(self.resident, own_bytes("VmRSS"))


def own_bytes(name: str = "RssAnon") -> int:
    """What the system says that this process holds now."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) << 10 if found else 0


def layer_bytes(width: int, feed: int, heads: int, groups: int) -> int:
    """A Llama layer in float32."""
    return 4 * (2 * width**2 + 2 * width * (width // heads * groups) + 3 * width * feed)


def on_gpu(out: Path, scratch: Path) -> None:
    """Quantize one layer of each shape and whole models on the GPU, into scale_gpu.json. Without one: tiny ones."""
    import torch

    cuda = torch.cuda.is_available()
    device, windows, length = ("cuda", GPU_WINDOWS, GPU_LENGTH) if cuda else ("cpu", 2, 64)
    shapes, models = (GPU_LAYERS, SIZES) if cuda else ({"tiny": TINY}, {"tiny": TINY})
    found: dict[str, Any] = {
        "machine": bench.machine(), "windows": windows, "length": length, "layers": {}, "models": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="slimline-scale-", dir=scratch) as place:
        source = Path(place) / "source"

        def measure(part: str, size: str, work: tuple[str, ...], shape: Sequence[int], vocabulary: int) -> None:
            layers, width, feed, heads, groups = shape
            parameters = make(source, layers, width, feed, heads, groups, vocabulary, device)
            words(source, vocabulary, windows, length)
            for name in work:
                told = {"parameters": parameters, **quantized_on_gpu(name, source, windows, length)}
                if size != "warm":  # what libraries set up once is no layer's time
                    found[part][f"{name} {size}"] = told
                    print(part, name, size, told, flush=True)
                    (out / "scale_gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(source)

        for size, (_, *shape) in {"warm": TINY, **shapes}.items():
            measure("layers", size, GPU_WORK, (1, *shape), GPU_VOCABULARY)
        for size, whole in models.items():
            measure("models", size, ("quantize.gptq",), whole, VOCABULARY)


def quantized_on_gpu(work: str, source: Path, windows: int, length: int) -> dict[str, float]:
    """Seconds from folder to folder, and the most memory that tensors on the GPU and the process itself held."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    out = source.with_name("out")
    out.mkdir()
    module = technique.find(work)
    options: dict[str, Any] = {"search": False} if work == "quantize.rtn" else {}
    if work == "quantize.gptq":
        options = {"data": str(source / "documents.jsonl"), "windows": windows, "length": length}
    peak, over = Peak(), threading.Event()
    sampler = threading.Thread(target=peak.watch, args=(over,))
    before, start = own_bytes(), time.perf_counter()
    sampler.start()
    try:
        module.run(source, out, technique.configure(module, options))
    finally:
        over.set()
        sampler.join()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    held, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    return {
        "seconds": seconds, "gpu_bytes": held, "gpu_reserved_bytes": reserved, "own_bytes": max(0, peak.own - before),
    }  # fmt: skip


def gpu_table(found: dict[str, Any]) -> list[str]:
    """What a layer took on a GPU, and all of a model's layers after it; what whole models took."""
    machine = found["machine"]
    where = machine.get("gpu") or "a processor (a rehearsal)"
    lines = [
        f"## One layer on {where}, measured",
        "",
        f"`python -m benchmarks.scale --gpu`: one layer of random weights from folder to folder; quantize.gptq with "
        f"its defaults, on {found['windows']} windows of {found['length']} tokens. torch {machine['torch']}. "
        "All layers: as many times that, one after the other. Reserved is what PyTorch took of the GPU for it: what is "
        "less than 80 fits on one GPU of 80 GB.",
        "",
        "| work | model, 10^9 | seconds a layer | GPU GB | GPU GB reserved | own memory GB | all layers, minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, row in found["layers"].items():
        work, _, size = key.partition(" ")
        layers = GPU_LAYERS.get(size, TINY)[0]
        lines.append(
            f"| {work} | {size} | {row['seconds']:.1f} | {row['gpu_bytes'] / 1e9:.1f} | "
            f"{row['gpu_reserved_bytes'] / 1e9:.1f} | {row['own_bytes'] / 1e9:.1f} | "
            f"{row['seconds'] * layers / 60:.1f} |"
        )
    lines += [
        "",
        f"## Whole models on {where}, measured",
        "",
        f"By the same command: the models of the first table, quantize.gptq on {found['windows']} windows of "
        f"{found['length']} tokens.",
        "",
        "| work | parameters, 10^9 | minutes | a 10^9 | GPU GB | GPU GB reserved | own memory GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, row in found["models"].items():
        minutes = row["seconds"] / 60
        lines.append(
            f"| {key.partition(' ')[0]} | {row['parameters'] / 1e9:.2f} | {minutes:.2f} | "
            f"{minutes / row['parameters'] * 1e9:.2f} | {row['gpu_bytes'] / 1e9:.1f} | "
            f"{row['gpu_reserved_bytes'] / 1e9:.1f} | {row['own_bytes'] / 1e9:.1f} |"
        )
    return lines


def page(known: dict[str, Any]) -> str:
    """The tables as Markdown, with the machine and the command that made them."""
    runs = known["runs"]
    machine = ", ".join(f"{key} {value}" for key, value in known["machine"].items() if value)
    lines = [
        "# What a model's size costs",
        "",
        f"`python -m benchmarks.scale`: Llama-shaped models of random bfloat16 weights; `walk` and quantize.gptq on "
        f"{WINDOWS} windows of {LENGTH} tokens, quantize.rtn without search; one thread. Memory is the process's own "
        "(RssAnon) above what it held after the same work on a tiny model; mapped files, which it need not hold, are "
        "in the last column only.",
        "",
        f"Machine: {machine}.",
        "",
        "| work | parameters, 10^9 | processor minutes | a 10^9 | own memory MB | that without inputs, in layers | "
        "layer, float32 MB | calibration inputs MB | resident with mapped files MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for work in WORK:
        for size, shape in SIZES.items():
            found = runs.get(f"{work} {size}")
            if found is None:
                lines.append(f"| {work} | {size} | not measured on a processor | | | | | | |")
                continue
            minutes, own = found["processor_seconds"] / 60, found["own_bytes"] - found["before_bytes"]
            layer, inputs = layer_bytes(*shape[1:]), inputs_bytes(work, shape[1])
            lines.append(
                f"| {work} | {found['parameters'] / 1e9:.2f} | {minutes:.2f} | "
                f"{minutes / found['parameters'] * 1e9:.1f} | {own / 1e6:.0f} | {(own - inputs) / layer:.1f} | "
                f"{layer / 1e6:.0f} | {inputs / 1e6:.0f} | {found['resident_bytes'] / 1e6:.0f} |"
            )
    file = HERE / "scale_gpu.json"
    measured = ["", *gpu_table(json.loads(file.read_text()))] if file.is_file() else []
    return "\n".join([*lines, "", *computed(runs), *measured, ""])


def inputs_bytes(work: str, width: int) -> int:
    """Calibration inputs [N, T, W] in float32, where there are any."""
    return 0 if work == "quantize.rtn" else WINDOWS * LENGTH * width * 4


def computed(runs: dict[str, Any]) -> list[str]:
    """What 70 thousand million parameters need: computed from the figures above, not measured."""
    name, layers, width, feed, heads, groups, vocabulary = LARGE
    layer, windows, length = layer_bytes(width, feed, heads, groups), 128, 2048
    parameters = layers * layer // 4 + 2 * vocabulary * width
    inputs, largest = windows * length * width * 4, feed**2 * 4
    lines = [
        f"## {name} x 10^9 parameters, computed and not measured",
        "",
        f"Llama 3 {name}B: {layers} layers of {width} x {feed}, {parameters / 1e9:.1f} x 10^9 parameters, "
        f"{parameters * 2 / 1e9:.0f} GB of bfloat16 on disk and as much again at the most for the result.",
        "",
        f"- A layer in float32: {layer / 1e9:.2f} GB. The largest matrix of second moments (of {feed} inputs): "
        f"{largest / 1e9:.2f} GB; the others {width**2 * 4 / 1e9:.2f} GB each.",
        f"- Calibration inputs, {windows} windows of {length} tokens in the machine's memory: {inputs / 1e9:.1f} GB, "
        "and as much again for each further copy that a technique asks for (`original`).",
    ]
    for work in WORK[1:]:
        sizes = [size for size in SIZES if f"{work} {size}" in runs]
        if not sizes:
            continue
        found, shape = runs[f"{work} {sizes[-1]}"], SIZES[sizes[-1]]
        own = found["own_bytes"] - found["before_bytes"] - inputs_bytes(work, shape[1])
        times = own / layer_bytes(*shape[1:])
        need = times * layer
        fits = "fits" if need < 80e9 else "does not fit"
        lines.append(
            f"- {work} held {times:.1f} layers beside its inputs at {sizes[-1]} x 10^9. As many of these layers are "
            f"{need / 1e9:.0f} GB, which {fits} on one GPU of 80 GB; the machine needs {math.ceil(inputs / 1e9)} GB."
        )
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
