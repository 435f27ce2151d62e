"""A language model on an NVIDIA GPU in bf16, fp8, int8 and int4: times, and the roofline beside each.

    python -m benchmarks.gpu_llm [--shape llama-3.2-3b] [--batches 1,8,32,128] [--context 512] [--prompts 512,2048]
                                 [--minutes 6] [--scratch FOLDER] [--out FOLDER]

Writes gpu_llm.json and gpu_llm.md. A model of that shape with random weights is made on the spot and taken through
slimline's own techniques on the GPU; what is timed are the folders that they wrote, run by the kernels that PyTorch has
for their weights (runner.py; for int4 also one of ours, fused.py). Before any time is taken, each product and the whole
model are held against float32: what does not agree is named and not timed. Then all forms write one token each behind
a context, or read a prompt, as CUDA graphs, interleaved in one process.

The roofline of a row is what it must do at least over what this GPU was seen to do at best, in the same process: bytes
of weights, keys and values over the bandwidth of a copy; operations over the speed of a large product of their kind.
The larger of the two times is the floor, and the fraction reached is the floor over the time.

Needs torch with CUDA, triton, transformers, accelerate, safetensors, tokenizers, scipy, psutil, pydantic and pyarrow;
neither MLflow nor Kubeflow. With --device cpu --shape tiny it is a rehearsal, whose times say nothing about a GPU.
"""

# Long because what is measured, what it costs at least and how both are told belong side by side.
from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import gpu, scale
from slimline import bench, decoder, hf
from slimline.errors import ConfigError, ModelError
from slimline.shards import Weights, Writer

TECHNIQUES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("", {}),
    "fp8": ("quantize.fp8_w8a8", {}),
    "int8": ("quantize.smoothquant", {"windows": 8, "length": 512}),
    "int4": ("quantize.rtn", {"group_size": 128, "search": False}),
}
"""The forms, and what makes them. Times do not depend on how numbers were chosen, so the quickest way is taken."""
SAID = {"bf16": "as made", "fp8": "fp8_w8a8", "int8": "smoothquant, w8a8", "int4": "rtn, groups of 128"}
MULTIPLIES = {"bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "bf16"}
"""What the products of each form are computed in."""
QUERIES, BLOCKS = 48, 12
LAYERS_ALONE = 8
"""Layers whose products are timed without the rest: together they are larger than any cache."""
PRODUCT_ERROR, LOGIT_ERROR = 0.01, 0.3
"""|found - float32| / |float32|, at the most. A product's bfloat16 answers are off by 0.002. Those of a whole model by
far more where inputs are rounded to 8 bits: what differs in its last bit before may be rounded to the other side, and
random weights forgive nothing. In float32 throughout, the same steps are off by 1e-6 without rounded inputs.
"""


class Shape(NamedTuple):
    """A Llama whose head is its embedding."""

    layers: int
    width: int
    feed: int
    heads: int
    groups: int
    vocabulary: int


SHAPES = {
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 128_256),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128_256),
    "tiny": Shape(2, 128, 256, 4, 2, 512),
}


class Work(NamedTuple):
    """What has to be done at least."""

    bytes: float
    operations: dict[str, float]
    """By what they are computed in."""


class Ceilings(NamedTuple):
    """What this machine was seen to do at best."""

    bytes_per_s: float
    """Of a copy, read and written together."""
    operations_per_s: dict[str, float]

    def floor_s(self, work: Work) -> tuple[float, str]:
        """(the least time that the work can take, whether bytes or operations ask for it)."""
        moving = work.bytes / self.bytes_per_s
        computing = sum(number / self.operations_per_s[kind] for kind, number in work.operations.items())
        return max(moving, computing), "bytes" if moving >= computing else "operations"


def work(shape: Shape, weights: int, kind: str, texts: int, tokens: int, places: int) -> Work:
    """What reading the last `tokens` of `texts` with `places` each costs, with logits behind the last of each.

    `weights` are bytes of the layers' maps. Read are these, the head, and all keys and values that came before; written
    the new ones and the logits. A product costs two operations a weight and token; attention two for each place that a
    token sees, twice.
    """
    width = shape.width // shape.heads
    head, maps = shape.vocabulary * shape.width, parameters(shape) - shape.vocabulary * shape.width
    sees = places * tokens - tokens * (tokens - 1) / 2
    operations: dict[str, float] = {kind: 2.0 * maps * texts * tokens}
    plain = 2.0 * head * texts + 4.0 * shape.layers * shape.heads * width * texts * sees
    operations["bf16"] = operations.get("bf16", 0.0) + plain
    kept = 2 * 2 * shape.layers * shape.groups * width * texts * places
    return Work(weights + 2 * head + kept + 2 * shape.vocabulary * texts, operations)


def parameters(shape: Shape) -> int:
    """Weights of all matrices, the embedding once."""
    narrow = shape.width // shape.heads * shape.groups
    layer = 2 * shape.width**2 + 2 * shape.width * narrow + 3 * shape.width * shape.feed
    return shape.layers * layer + shape.vocabulary * shape.width


def main(arguments: Sequence[str]) -> None:
    """Measure, and write the page after every part. Raises ConfigError on a machine without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_llm")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("torch finds no NVIDIA GPU here. Run it on a machine that has one.")
    with tempfile.TemporaryDirectory(prefix="slimline-llm-", dir=asked.scratch) as scratch:
        measure(asked, Path(scratch))
    print(asked.out / "gpu_llm.md")


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All parts in turn: forms made, ceilings, parity, products alone, tokens and prompts."""
    from benchmarks import runner

    shape, device, clock = SHAPES[asked.shape], asked.device, gpu.Clock(60 * asked.minutes)
    batches, prompts = ([int(n) for n in text.split(",") if n] for text in (asked.batches, asked.prompts))
    skipped: dict[str, str] = {}
    found: dict[str, Any] = {
        "machine": bench.machine() | {name: metadata.version(name) for name in ("torch", "transformers")},
        "device": device, "shape": asked.shape, "parameters": parameters(shape), "context": asked.context,
        "made": {}, "ceilings": {}, "parity": {}, "alone": {}, "steps": {}, "reads": {}, "skipped": skipped,
    }  # fmt: skip

    def note(what: str) -> None:
        print(f"{time.monotonic() - clock.start:6.1f} s  {what}", flush=True)
        (asked.out / "gpu_llm.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (asked.out / "gpu_llm.md").write_text(page(found), encoding="utf-8")

    source, warm = scratch / "bf16", scratch / "warm" / "bf16"
    make(warm, SHAPES["tiny"], device)
    for form, (name, options) in TECHNIQUES.items():  # what libraries set up once is not a technique's time
        with gpu.leaving_out(f"{form}, tiny", skipped):
            quantized(warm, form, name, options, device)
    note("warm")
    make(source, shape, device)
    note(f"{asked.shape} is made")
    models: dict[str, runner.Model] = {}
    for form, (name, options) in TECHNIQUES.items():
        with gpu.leaving_out(form, skipped):
            folder, found["made"][form] = quantized(source, form, name, options, device)
            models[form] = runner.Model(folder, device)
            note(f"{form} is made and read")
    ceilings = ceiling(device)
    found["ceilings"] = ceilings._asdict()
    note(f"ceilings: {ceilings}")
    if device == "cuda":
        with gpu.leaving_out("steps between products", skipped):
            found["steps_error"] = check_steps()
            note(f"steps between products: {found['steps_error']:.2g}")
    for form in list(models):
        with gpu.leaving_out(f"{form} in all", skipped):
            found["parity"][form] = check(models, form, scratch / form, skipped)
            note(f"{form}: {found['parity'][form]}")
        if f"{form} in all" in skipped:
            note(f"{form} is left out: {skipped[f'{form} in all']}")
            del models[form]
    best: dict[tuple[str, int], str] = {}
    settings = [(texts, 1, asked.context) for texts in batches] + [(1, tokens, tokens) for tokens in prompts]
    for texts, tokens, places in settings:
        with gpu.leaving_out(f"{texts} x {tokens} tokens", skipped):
            clock.require(0.9)
            size = texts * tokens
            if str(size) not in found["alone"]:
                found["alone"][str(size)] = alone(models, size, ceilings, best, skipped)
            part, key = ("steps", str(texts)) if tokens == 1 else ("reads", str(tokens))
            found[part][key] = whole(models, shape, texts, tokens, places, ceilings, best)
            note(f"{texts} x {tokens} behind {places - tokens}")
    note(f"left out: {skipped or 'nothing'}")
    return found


def make(folder: Path, shape: Shape, device: str) -> None:
    """Write a Llama of random weights in bfloat16, with norms of every size, a tokenizer and documents."""
    import torch

    folder.mkdir(parents=True)
    narrow = shape.width // shape.heads * shape.groups
    out = (2 * shape.layers) ** -0.5  # the residual stays as loud as its first layer makes it
    maps = {
        "self_attn.q_proj": (shape.width, shape.width, 1.0), "self_attn.k_proj": (narrow, shape.width, 1.0),
        "self_attn.v_proj": (narrow, shape.width, 1.0), "self_attn.o_proj": (shape.width, shape.width, out),
        "mlp.gate_proj": (shape.feed, shape.width, 1.0), "mlp.up_proj": (shape.feed, shape.width, 1.0),
        "mlp.down_proj": (shape.width, shape.feed, out),
    }  # fmt: skip
    writer = Writer(folder, shape.layers + 1)
    draw = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(std=std, generator=draw)

    def norm() -> torch.Tensor:
        return torch.empty(shape.width, dtype=torch.bfloat16, device=device).uniform_(0.5, 1.5, generator=draw)

    for i in range(shape.layers):
        before = f"model.layers.{i}."
        tensors = {f"{before}{n}.weight": normal(o, w, by * w**-0.5) for n, (o, w, by) in maps.items()}
        tensors |= {f"{before}{n}.weight": norm() for n in ("input_layernorm", "post_attention_layernorm")}
        writer.write(i, tensors)
    writer.write(
        shape.layers,
        {"model.embed_tokens.weight": normal(shape.vocabulary, shape.width, 0.02), "model.norm.weight": norm()},
    )
    writer.finish()
    config = {
        "model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": shape.width,
        "intermediate_size": shape.feed, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    scale.words(folder, shape.vocabulary)


def quantized(
    source: Path, form: str, name: str, options: dict[str, Any], device: str
) -> tuple[Path, dict[str, float]]:
    """The folder that a technique makes of the source, and what that took."""
    import torch

    out, given = source.parent / form, dict(options)
    if name in ("quantize.smoothquant",):
        given["data"] = str(source / "documents.jsonl")
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    start = time.perf_counter()
    if name:
        gpu.perform(name, source, out, **given)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return out, {"seconds": seconds if name else 0.0, "gpu_peak_bytes": float(peak), "folder_bytes": float(size)}


# Ceilings


def ceiling(device: str) -> Ceilings:
    """A large copy, and a large product of each kind, of random numbers."""
    import torch

    big = device == "cuda"
    values = torch.randint(-128, 128, (1 << (31 if big else 24),), dtype=torch.int8, device=device)
    out = torch.empty_like(values)
    moved = 2 * values.numel() / _median_s(partial(out.copy_, values), device)
    del values, out
    n = 8192 if big else 256
    left, right = (torch.randn(n, n, device=device) for _ in range(2))
    one = torch.ones((), device=device)
    low = [x.to(torch.bfloat16) for x in (left, right)], [x.to(torch.float8_e4m3fn) for x in (left, right)]
    whole = [(x * 40).round().clamp(-128, 127).to(torch.int8) for x in (left, right)]

    def fp8() -> object:
        return torch._scaled_mm(low[1][0], low[1][1].T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    calls: dict[str, Callable[[], object]] = {
        "bf16": lambda: low[0][0] @ low[0][1].T, "fp8": fp8, "int8": lambda: torch._int_mm(whole[0], whole[1].T),
    }  # fmt: skip
    return Ceilings(moved, {kind: 2 * n**3 / _median_s(call, device) for kind, call in calls.items()})


def _median_s(call: Callable[[], object], device: str, times: int = 20) -> float:
    """Seconds of a call, between events on a GPU."""
    import torch

    for _ in range(3):
        call()
    if device == "cpu":
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return float(np.median(taken))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(np.median([begin.elapsed_time(end) for begin, end in pairs])) / 1000


# Parity


def apart(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted|, in float64; infinite where a number is not finite."""
    gone = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return float(gone) if bool(gone.isfinite()) else float("inf")


def check_steps() -> float:
    """The largest difference between Triton's steps and PyTorch's on random inputs. Raises ModelError above a limit."""
    import torch

    from benchmarks import fused, runner

    def random(rows: int, columns: int, whole: bool) -> tuple[Any, Any, Any]:
        if not whole:
            return torch.randn(rows, columns, device="cuda").bfloat16(), None, None
        numbers = torch.randint(-5000, 5000, (rows, columns), dtype=torch.int32, device="cuda")
        return numbers, torch.rand(rows, 1, device="cuda") / 1000, torch.rand(columns, device="cuda")

    def values(prepared: tuple[Any, Any], tokens: int) -> Any:
        stored, by = prepared[0][:tokens].float(), prepared[1]
        return stored if by is None else stored * by

    errors: dict[str, float] = {}
    for tokens, texts in ((1, 1), (33, 3)):
        for form in ("", "int", "float"):
            whole, rows = form == "int", 64 if form == "int" else 0
            product, residual = random(tokens, 3072, whole), torch.randn(tokens, 3072, device="cuda").bfloat16()
            norm, mixed = torch.rand(3072, device="cuda").bfloat16(), random(tokens, 3072, False)[0]
            wide, joint = random(tokens, 2 * 8192, whole), random(tokens, (24 + 16) * 128, whole)
            angles = torch.randn(2, tokens // texts, 64, device="cuda")
            both = []
            for steps in (fused, runner.PLAIN):
                sides = residual.clone()
                kept = torch.zeros(2, texts, 8, 40, 128, device="cuda").bfloat16()
                slots = kept[:, :, :, 3 : 3 + tokens // texts]
                both.append(
                    {
                        "enter": values(steps.enter(sides, *product, norm, 1e-5, form, rows), tokens),
                        "residual": sides,
                        "close": values(steps.close(mixed, form, rows), tokens),
                        "gate": values(steps.gate(*wide, form, rows), tokens),
                        "turn": steps.turn(*joint, *angles, *slots, 24),
                        "kept": kept,
                    }
                )
            for name in both[0]:
                errors[f"{name} for {form or 'bf16'}"] = apart(both[0][name], both[1][name])
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > PRODUCT_ERROR:
        raise ModelError(f"{worst} is {errors[worst]:.3g} off, of {PRODUCT_ERROR} allowed")
    return errors[worst]


def check(models: dict[str, Any], form: str, folder: Path, skipped: dict[str, str]) -> dict[str, Any]:
    """How far products are from float32, and the whole model from slimline's own reading of its folder.

    A kernel that strays is left out by name. Raises ModelError if none is left, or if the whole strays.
    """
    import torch

    from benchmarks import runner

    model, weights = models[form], Weights(folder)
    maps = {
        product: runner.joined([runner.matrix(weights, f"model.layers.0.{name}", model.device) for name in names])
        for product, names in runner.JOINED.items()
    }
    errors: dict[str, float] = {}
    for name, kernel in list(model.kernels.items()):
        with gpu.leaving_out(f"{form}, {name}", skipped):
            errors[name] = 0.0
            for product, matrix in maps.items():
                wanted_OI = matrix.floats()
                for tokens in (1, 8, 33, 512):
                    x_MI = torch.randn(tokens, wanted_OI.shape[1], device=model.device)
                    stored, by = runner.low(x_MI, kernel.form, kernel.rows)
                    seen_MI = stored[:tokens].float() * (1.0 if by is None else by)
                    given = kernel.multiply(stored, by, *model.layers[0].kept[product][name]).floats()
                    errors[name] = max(errors[name], apart(given, seen_MI @ wanted_OI.T))
            if errors[name] > PRODUCT_ERROR:
                raise ModelError(f"{errors[name]:.3g} off, of {PRODUCT_ERROR} allowed")
        if f"{form}, {name}" in skipped:
            del model.kernels[name]
    if not model.kernels:
        raise ModelError("none of its kernels multiplies as it should")
    del maps
    return {"products": errors, **check_whole(model, folder)}


def check_whole(model: Any, folder: Path, tokens: int = 128) -> dict[str, float]:
    """Logits of a text, all at once and its last token alone, against slimline's reading of the folder in float32."""
    import torch

    ids_BT = torch.randint(0, len(model.table_VW), (1, tokens), device=model.device)
    reference = decoder.load(folder)
    with torch.inference_mode():
        wanted_TV = reference(input_ids=ids_BT.to(hf.config_device(reference))).logits[0].to(model.device)
    del reference
    told: dict[str, float] = {}
    with torch.inference_mode():
        for kernel in model.kernels.values():
            cache = model.room(1, tokens)
            found_TV = model.read(ids_BT, cache, kernel, every=True)[0]
            for part in cache[0]:
                part[:, :, -1] = 0  # so that the last token has to put its own back
            last_V = model.step(ids_BT[:, -1:], cache, kernel)[0]
            log_p_TV, log_q_TV = (x.double().log_softmax(1) for x in (wanted_TV, found_TV))
            one = {
                "logits": apart(found_TV, wanted_TV),
                "step": apart(last_V, wanted_TV[-1]),
                "kl": float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1).mean()),
                "differ": float((found_TV.argmax(1) != wanted_TV.argmax(1)).double().mean()),
            }
            told = {key: max(value, told.get(key, 0.0)) for key, value in one.items()}
    if max(told["logits"], told["step"]) > LOGIT_ERROR:
        raise ModelError(f"logits are {max(told['logits'], told['step']):.3g} off, of {LOGIT_ERROR} allowed")
    return told


# Times


def captured(call: Callable[[], object], device: str) -> bench.Call:
    """The call as a CUDA graph, replayed and waited for; on a processor the call itself."""
    import torch

    if device == "cpu":
        return lambda _: call()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = (call, call())  # a graph knows addresses alone: what it reads and writes must not be let go before it

    def replay(_: int, kept: object = kept) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def alone(
    models: dict[str, Any], size: int, ceilings: Ceilings, best: dict[tuple[str, int], str], skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """The products of some layers with so many rows, by form and kernel; `best` gets each form's fastest kernel."""
    import torch

    from benchmarks import runner

    calls: dict[str, bench.Call] = {}
    each: dict[str, tuple[str, str, int, float, float]] = {}
    with torch.inference_mode():
        for form, model in models.items():
            layers = model.layers[:LAYERS_ALONE]
            for name, kernel in model.kernels.items():
                inputs = {n: model.feed if n == "down" else model.width for n in runner.JOINED}
                given = {
                    n: runner.low(torch.randn(size, wide, device=model.device), kernel.form, kernel.rows)
                    for n, wide in inputs.items()
                }

                def call(kernel: Any = kernel, layers: Any = layers, given: Any = given) -> Any:
                    for layer in layers:
                        for product, (stored, by) in given.items():
                            out = kernel.multiply(stored, by, *layer.kept[product][kernel.name])
                    return out

                key = f"{form}: {name}"
                with gpu.leaving_out(f"{key}, {size} rows", skipped):
                    calls[key] = captured(call, model.device)
                    each[key] = (
                        form, name, len(layers),
                        model.size / len(model.layers), model.operations / len(model.layers) * size,
                    )  # fmt: skip
        times = bench.interleave(calls, QUERIES // 2, BLOCKS // 2, what=f"products of {size} rows")
    rows: dict[str, dict[str, Any]] = {}
    for key, blocks in times.items():
        form, name, number, moved, operations = each[key]
        p50 = float(np.median(np.concatenate(blocks))) / 1000 / number
        floor, bound = ceilings.floor_s(Work(moved, {MULTIPLIES[form]: operations}))
        rows[key] = {
            "form": form, "kernel": name, "us_a_layer": 1e6 * p50, "floor_us": 1e6 * floor, "bound": bound,
            "reached": floor / p50,
        }  # fmt: skip
        before = best.get((form, size))
        if before is None or rows[f"{form}: {before}"]["us_a_layer"] > rows[key]["us_a_layer"]:
            best[form, size] = name
    return rows


def whole(
    models: dict[str, Any], shape: Shape, texts: int, tokens: int, places: int, ceilings: Ceilings,
    best: dict[tuple[str, int], str],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """All forms, with the kernel that is best for so many rows: the last `tokens` of `texts` with `places` each."""
    import torch

    if not models:
        return {}
    first = next(iter(models.values()))
    ids_BT = torch.randint(0, shape.vocabulary, (texts, tokens), device=first.device)
    calls: dict[str, bench.Call] = {}
    with torch.inference_mode():
        cache = first.room(texts, places)  # what is in it does not change the time, so one is enough for all
        for form, model in models.items():
            if (form, texts * tokens) not in best:
                continue  # none of its kernels takes so many rows, which is said by name
            kernel = model.kernels[best[form, texts * tokens]]
            model.angles(places - tokens, tokens)  # made before, not within, the graph
            calls[form] = captured(
                lambda m=model, k=kernel: (m.step if tokens == 1 else m.read)(ids_BT, cache, k),  # type: ignore[misc]
                model.device,
            )
        times = bench.interleave(calls, QUERIES, BLOCKS, what=f"{texts} x {tokens} tokens")
    base = "bf16" if "bf16" in times else next(iter(times))
    rows: dict[str, dict[str, Any]] = {}
    for form, blocks in times.items():
        ratio, low, high = bench.speedup(times[base], blocks)
        p50 = float(np.median(np.concatenate(blocks)))
        needs = work(shape, models[form].size, MULTIPLIES[form], texts, tokens, places)
        floor, bound = ceilings.floor_s(needs)
        rows[form] = {
            "kernel": best[form, texts * tokens], "p50_ms": p50, "tokens_per_s": 1000 * texts * tokens / p50,
            "ratio": ratio, "ratio_low": low, "ratio_high": high, "bytes": needs.bytes,
            "operations": sum(needs.operations.values()), "floor_ms": 1000 * floor, "bound": bound,
            "reached": 1000 * floor / p50,
        }  # fmt: skip
    return rows


# The page


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown, with the machine, and what is slower than bf16."""
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value)
    on = found["machine"].get("gpu") or "a processor: a rehearsal"
    lines = [
        f"# A language model on {on}",
        "",
        f"`python -m benchmarks.gpu_llm --shape {found['shape']}`, {time.strftime('%Y-%m-%d')}. Machine: {machine}.",
        "",
        f"{found['shape']}: {found['parameters'] / 1e9:.2f} x 10^9 random weights, taken through slimline's techniques "
        "on this machine; the folders that they wrote are run by the kernels named, with four Triton steps between "
        "products, a cache of fixed size and CUDA graphs. Embedding, head, keys and values are bf16 in all forms. "
        "Medians of interleaved blocks; ratios to bf16 with 95 % intervals.",
        "",
        *ceiling_lines(found["ceilings"]),
        *parity_table(found),
        *time_table("One token more for each text", "texts", "a token, ms", found["steps"], found["context"]),
        *time_table("A prompt read", "tokens", "a prompt, ms", found["reads"], 0),
        *slower(found),
        *alone_table(found["alone"]),
    ]
    lines += [f"Not measured: {name}: {reason}" for name, reason in found["skipped"].items()]
    lines += found.get("notes", [])
    return "\n".join(lines).rstrip() + "\n"


def ceiling_lines(ceilings: dict[str, Any]) -> Iterator[str]:
    """What this machine was seen to do at best."""
    if not ceilings:
        return
    speeds = ", ".join(f"{kind} {speed / 1e12:.0f}" for kind, speed in ceilings["operations_per_s"].items())
    yield "## Ceilings"
    yield ""
    yield f"- A copy of 2 GiB: {ceilings['bytes_per_s'] / 1e12:.2f} x 10^12 bytes/s, read and written together."
    yield f"- A product of three 8192 x 8192 matrices, 10^12 operations/s: {speeds}. int4 weights multiply as bf16."
    yield ""


def parity_table(found: dict[str, Any]) -> Iterator[str]:
    """How each form was made, and how far its kernels are from float32."""
    yield "## Forms"
    yield ""
    yield (
        "Off is |found - float32| / |float32|: of the worst product of random inputs (1 to 512 rows), and of the "
        "logits of 128 tokens against slimline's own reading of the folder (`decoder.load`), all at once and the last "
        "alone; the worst kernel of each form."
    )
    yield ""
    yield (
        "| form | made by | seconds | peak GPU MB | folder MB | product off | logits off | last alone off | "
        "mean KL, nats | other top token |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for form, made in found["made"].items():
        row = found["parity"].get(form)
        told = "| | | | | |"
        if row:
            told = (
                f"| {max(row['products'].values()):.4f} | {row['logits']:.4f} | {row['step']:.4f} | {row['kl']:.2g} | "
                f"{row['differ']:.1%} |"
            )
        yield (
            f"| {form} | {SAID[form]} | {made['seconds']:.1f} | {made['gpu_peak_bytes'] / 1e6:.0f} | "
            f"{made['folder_bytes'] / 1e6:.0f} {told}"
        )
    yield ""


def time_table(title: str, of: str, what: str, rows: dict[str, Any], context: int) -> Iterator[str]:
    """One row a size and form, with the roofline beside it."""
    if not rows:
        return
    yield f"## {title}" + (f", the {context}th" if context else "")
    yield ""
    yield (f"| {of} | form | kernel | {what} | tokens/s | over bf16 | GB | 10^12 ops | floor ms | by | reached |")
    yield "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |"
    for size, forms in rows.items():
        for form, row in forms.items():
            ratio = f"{row['ratio']:.2f}x ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
            yield (
                f"| {size} | {form} | {row['kernel']} | {row['p50_ms']:.3f} | {row['tokens_per_s']:.0f} | {ratio} | "
                f"{row['bytes'] / 1e9:.2f} | {row['operations'] / 1e12:.3f} | {row['floor_ms']:.3f} | {row['bound']} | "
                f"{row['reached']:.0%} |"
            )
    yield ""


def slower(found: dict[str, Any]) -> Iterator[str]:
    """Where a form is not proven faster than bf16."""
    said = False
    for part, of in (("steps", "texts"), ("reads", "tokens")):
        for size, forms in found[part].items():
            for form, row in forms.items():
                if form != "bf16" and row["ratio_low"] <= 1:
                    how = "slower than" if row["ratio_high"] < 1 else "not proven faster than"
                    yield f"- {form} is {how} bf16 at {size} {of}: {row['ratio']:.2f}x."
                    said = True
    if said:
        yield ""


def alone_table(found: dict[str, Any]) -> Iterator[str]:
    """The products alone, by kernel."""
    if not found:
        return
    yield "## Products alone"
    yield ""
    yield f"All products of {LAYERS_ALONE} layers in a CUDA graph, by kernel; the fastest is the one above."
    yield ""
    yield "| rows | form | kernel | a layer, us | floor us | by | reached |"
    yield "| ---: | --- | --- | ---: | ---: | --- | ---: |"
    for size, rows in found.items():
        for row in rows.values():
            yield (
                f"| {size} | {row['form']} | {row['kernel']} | {row['us_a_layer']:.1f} | {row['floor_us']:.1f} | "
                f"{row['bound']} | {row['reached']:.0%} |"
            )
    yield ""


if __name__ == "__main__":
    gpu.ending_in_a_sentence(main)
