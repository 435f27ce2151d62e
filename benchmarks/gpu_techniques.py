"""Whether slimline's techniques use a GPU, and say there what they say on the processor.

    python -m benchmarks.gpu_techniques [--minutes 4] [--out FOLDER]

Writes gpu_techniques.json and gpu_techniques.md. Every technique works on the same tiny models and texts in two fresh
processes, one of which is shown no GPU. Compared are its numbers and the weights that it wrote, packed ones as floats.
Where numbers are rounded in an order that differs, a weight here and there lands on the other side: what is allowed
stands beside each, and exit code 1 says that one differs by more. Beside that: whether the GPU was used at all, the
most of its memory, and what was still held afterwards; and whether bf16 and recomputed layers learn what float32
learns, in less memory.

Needs what gpu_llm.py needs. Without a GPU both processes run on the processor, which rehearses it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slimline import artifact, bench, decoder, hf, technique
from slimline.shards import Weights

WORDS = 96
LABELS = ("bad", "good")
HELD = 1 << 20
"""Bytes that may be held after a technique: less than any of the models."""
DRAWN = {"windows": 8, "length": 64}
ROUNDED = {"group_size": 32, **DRAWN}
TAUGHT = {
    "steps": 6, "batch_tokens": 512, "tokens_at_once": 256, "learning_rate": 3e-3, "validation_tokens": 512,
    "precision": "fp32",
}  # fmt: skip
LEARNED = {"epochs": 1, "batch_size": 16, "dropout": 0.0}


class Case(NamedTuple):
    """A technique, its options, and how far its numbers and its weights may differ, as fractions."""

    name: str
    options: dict[str, Any]
    numbers: float = 1e-3
    weights: float = 1e-3
    model: str = "decoder"


CASES = (
    Case("quantize.rtn", {"group_size": 32}),
    Case("quantize.fp8_w8a8", {}),
    Case("quantize.rotate", {"heads": True, "untie": True}),
    Case("quantize.smoothquant", DRAWN, 1e-3, 5e-3),
    Case("quantize.gptq", ROUNDED, 0.02, 0.1),
    Case("quantize.awq", ROUNDED, 0.02, 0.1),
    Case("quantize.round", {**ROUNDED, "steps": 20, "arithmetic": "float32"}, 0.05, 0.1),
    Case("quantize.mixed", {**ROUNDED, "bits": 5.0}, 0.05, 0.2),
    Case("quantize.kv_cache", DRAWN),
    # two weights of which one goes may be worth the same but for the last bit, and later layers hear which it was
    Case("prune.wanda", DRAWN, 1e-3, 0.05),
    Case("prune.sparsegpt", DRAWN, 1e-3, 0.05),
    Case("prune.width", {**DRAWN, "neurons": 0.5, "heads": 0.5, "channels": 0.25, "multiple": 8}),
    Case("prune.layers", {**DRAWN, "num_layers": 1}),
    Case("attention.sliding_window", {"window": 32, "sinks": 4}),
    Case("distill.tokens", {**TAUGHT, "length": 64, "kept": 8}, 0.02, 0.02),
    Case("distill.sequences", {**TAUGHT, "length": 64, "prompt": 8, "answer": 16}, 0.05, 0.05),
    Case("distill.on_policy", {**TAUGHT, "prompt": 8, "answer": 16}, 0.05, 0.05),
    Case("evaluate.perplexity", {"length": 64, "stride": 32}),
    Case("evaluate.divergence", {"length": 64, "stride": 32}, 0.02),
    Case("train.finetune", {**LEARNED, "max_length_tokens": 48}, 0.05, 0.05, "classifier"),
    Case("distill.logits", {**LEARNED, "layers": 1, "hide": 0.0, "average": 0.0}, 0.05, 0.05, "classifier"),
    Case("prune.heads", {**LEARNED, "hide": 0.0, "average": 0.0, "multiple": 8}, 0.05, 0.05, "classifier"),
)
STORES_NOTHING = ("attention.sliding_window",)
"""Techniques that compute nothing, and so need no GPU."""
TEXTS_ONLY = ("evaluate.",)
LONGER = {**TAUGHT, "steps": 4, "length": 256, "batch_tokens": 4096, "tokens_at_once": 4096, "kept": 8}
LEARNING = {
    "float32": LONGER,
    "bf16": LONGER | {"precision": "bf16"},
    "float32, layers recomputed": LONGER | {"recompute": True},
    "bf16, layers recomputed": LONGER | {"precision": "bf16", "recompute": True},
}
"""distill.tokens on a wider model, in each precision, with and without layers that are computed again."""


def main(arguments: Sequence[str]) -> None:
    """Run all cases in two processes, compare, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_techniques")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.one:
        work(asked.one, asked.out)
        return
    with tempfile.TemporaryDirectory(prefix="slimline-techniques-") as scratch:
        made = Path(scratch) / "models"
        make(made)
        found = {"machine": bench.machine(), **both(made, Path(scratch), asked.minutes)}
    (asked.out / "gpu_techniques.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (asked.out / "gpu_techniques.md").write_text(page(found), encoding="utf-8")
    print(asked.out / "gpu_techniques.md")
    if any(row["wrong"] for row in found["cases"].values()):
        sys.exit(1)


def both(made: Path, scratch: Path, minutes: float) -> dict[str, Any]:
    """What a process that is shown no GPU says of every case, and one that is; and how far they are apart."""
    running = {}
    for where, hidden in (("cpu", {"CUDA_VISIBLE_DEVICES": ""}), ("gpu", {})):
        out = scratch / where
        out.mkdir()
        command = [sys.executable, "-m", "benchmarks.gpu_techniques", "--one", str(made), "--out", str(out)]
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **hidden}
        running[where] = subprocess.Popen(command, env=environment)
    limit = time.monotonic() + 60 * minutes
    sides: dict[str, dict[str, Any]] = {}
    for where, process in running.items():
        try:
            process.wait(max(1.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        file = scratch / where / "found.json"
        sides[where] = json.loads(file.read_text()) if file.is_file() else {}
    cases = {}
    for case in CASES:
        cpu, gpu = (sides[where].get(case.name, {"failed": "not reached in time"}) for where in ("cpu", "gpu"))
        cases[case.name] = compared(case, cpu, gpu, scratch)
    return {"cases": cases, "learning": {k: v for k, v in sides["gpu"].items() if k in LEARNING}}


def compared(case: Case, cpu: dict[str, Any], gpu: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """How far the two sides are apart, and what is wrong about it in a few words; nothing if all is well."""
    row: dict[str, Any] = {"allowed_numbers": case.numbers, "allowed_weights": case.weights, "wrong": []}
    for where, side in (("cpu", cpu), ("gpu", gpu)):
        row[where] = {key: side[key] for key in ("seconds", "peak_bytes", "held_bytes", "device") if key in side}
        if "failed" in side:
            row["wrong"].append(f"{where}: {side['failed']}")
    if row["wrong"]:
        return row
    apart = {name: distance(gpu["metrics"][name], number) for name, number in cpu["metrics"].items()}
    row["worst_number"] = max(apart, key=lambda name: apart[name])
    row["numbers_apart"] = apart[row["worst_number"]]
    if row["numbers_apart"] > case.numbers:
        row["wrong"].append(f"{row['worst_number']} differs by {row['numbers_apart']:.2g}")
    if not case.name.startswith(TEXTS_ONLY):
        row["weights_apart"], row["worst_weight"] = weights_apart(
            *(scratch / where / case.name for where in ("gpu", "cpu"))
        )
        if row["weights_apart"] > case.weights:
            row["wrong"].append(f"weights differ by {row['weights_apart']:.2g}, most {row['worst_weight']}")
    if gpu["device"] == "cuda":
        if not gpu["peak_bytes"] and case.name not in STORES_NOTHING:
            row["wrong"].append("did not use the GPU")
        if gpu["held_bytes"] > HELD:
            row["wrong"].append(f"{gpu['held_bytes'] / 1e6:.1f} MB of the GPU held afterwards")
    return row


def distance(one: float, other: float) -> float:
    """The difference as a fraction of the larger, of what is below 0.01 as a fraction of that."""
    return abs(one - other) / max(abs(one), abs(other), 0.01)


def weights_apart(one: Path, other: Path) -> tuple[float, str]:
    """(|one - other| / |other| over all weights, as floats; the name of the one that is furthest apart).

    Infinite if they have not the same names and shapes.
    """
    first, second = Weights(one), Weights(other)
    if set(first.floats()) != set(second.floats()):
        return float("inf"), "names"
    gone, whole = {}, 0.0
    for name in second.floats():
        a, b = first.read(name).double(), second.read(name).double()
        if a.shape != b.shape:
            return float("inf"), name
        gone[name], whole = float((a - b).square().sum()), whole + float(b.square().sum())
    return float((sum(gone.values()) / whole) ** 0.5), max(gone, key=lambda name: gone[name])


# One process


def work(made: Path, out: Path) -> None:
    """All cases on this process's device, and how it learns; found.json is written after each."""
    import torch

    device = hf.device()
    if device == "cuda":
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)  # what cuBLAS keeps is no technique's
        torch._C._cuda_clearCublasWorkspaces()
    found: dict[str, Any] = {}
    for case in CASES[:1]:  # what libraries set up once is not a technique's time
        one(case.name, case.options, made, made / "other", out / "warm", device)
    for case in CASES:
        found[case.name] = one(case.name, case.options, made, made / case.model, out / case.name, device)
        (out / "found.json").write_text(json.dumps(found))
    if device == "cuda":
        for name, options in LEARNING.items():
            found[name] = one("distill.tokens", options, made, made / "wide", out / name, device)
            (out / "found.json").write_text(json.dumps(found))


def one(name: str, options: dict[str, Any], made: Path, source: Path, out: Path, device: str) -> dict[str, Any]:
    """A technique's numbers, seconds, the most memory of the GPU that it held, and what is held after it."""
    import torch

    module = technique.find(name)
    texts = made / ("labelled.jsonl" if source.name == "classifier" else "documents.jsonl")
    # a teacher that is not the student: of one that is, nothing but rounding would be learned
    teacher = made / "other" if source.name == "decoder" else source
    others = {"data": str(texts), "teacher": str(teacher), "base": str(made / "other")}
    given = {key: value for key, value in others.items() if key in module.Config.model_fields}
    out.mkdir(parents=True)
    held = _settle(device)
    start = time.perf_counter()
    try:
        metrics = module.run(source, out, technique.configure(module, {**given, **options}))
    except Exception as error:  # each library has classes of its own, and one case must not cost all others
        import traceback

        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"}
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - held if device == "cuda" else 0
    print(f"{device}: {name}, {seconds:.1f} s", flush=True)
    return {
        "metrics": {k: v for k, v in metrics.items() if not k.endswith("_per_s")},
        "seconds": seconds, "peak_bytes": peak, "held_bytes": max(0, _settle(device) - held), "device": device,
    }  # fmt: skip


def _settle(device: str) -> int:
    """Bytes of the GPU that live objects hold, after what nobody holds was let go."""
    import torch

    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


# Models and texts


def make(made: Path) -> None:
    """Two decoders of one vocabulary, a wider one, a classifier, and texts for them in which words follow a rule."""
    made.mkdir(parents=True)
    for name, seed, size in (("decoder", 0, (3, 64, 96)), ("other", 1, (3, 64, 96)), ("wide", 2, (6, 512, 1024))):
        _decoder(made / name, seed, *size)
    _classifier(made / "classifier")
    draw = np.random.default_rng(0)
    split = ("train", "train", "train", "calibration", "validation", "test", "test")
    rows, labelled = [], []
    for i in range(280):
        at, said = int(draw.integers(WORDS)), []
        for _ in range(int(draw.integers(24, 60))):
            said.append(f"w{at}")
            at = (at * 5 + int(draw.integers(1, 4))) % WORDS
        rows.append({"id": str(i), "text": " ".join(said), "split": split[i % 7]})
        # a label that the first words decide: those of even numbers are good
        good = sum(int(word[1:]) % 2 == 0 for word in said[:9]) > 4
        labelled.append({"id": str(i), "text": " ".join(said[:9]), "label": LABELS[good], "split": split[i % 7]})
    for name, lines in (("documents", rows), ("labelled", labelled)):
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def _words(folder: Path, special: Sequence[str]) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    kept = [*special, *(f"w{i}" for i in range(WORDS))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(kept)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "[CLS]" in special:
        fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.save(str(folder / "tokenizer.json"))
    return len(kept)


def _decoder(folder: Path, seed: int, layers: int, width: int, feed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    size = _words(folder, ["[END]", "[UNK]"])
    config = AutoConfig.for_model(
        "llama", vocab_size=size, hidden_size=width, intermediate_size=feed, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():  # fresh models answer almost the same to everything
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.12 * (64 / width) ** 0.5)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.to_dict().items() if k[0] != "_"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "[END]", "eos_token": "[END]"}))
    artifact.seal(folder, format="hf", task=decoder.TASK, labels=(), base="random weights")


def _classifier(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder.mkdir()
    size = _words(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    config = AutoConfig.for_model(
        "bert", vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=66, pad_token_id=0, id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.to_dict().items() if k[0] != "_"}))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"mask_token": "[MASK]"}))
    artifact.seal(folder, format="hf", task="text-classification", labels=LABELS, base="random weights")


# The page


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value)
    on = found["machine"].get("gpu") or "a processor: a rehearsal"
    wrong = [name for name, row in found["cases"].items() if row["wrong"]]
    lines = [
        f"# Techniques on {on}",
        "",
        f"`python -m benchmarks.gpu_techniques`, {time.strftime('%Y-%m-%d')}. Machine: {machine}.",
        "",
        "Each technique on the same tiny models and texts, on the processor and on the GPU, in a fresh process each. "
        "Apart is the largest difference of a number that it returns, and that of all weights it wrote, "
        "|GPU - processor| / |processor|; in brackets what is allowed.",
        f"{len(found['cases']) - len(wrong)} of {len(found['cases'])} agree.",
        "",
        "| technique | processor s | GPU s | GPU peak MB | numbers apart | which | weights apart | |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- |",
        *(case_line(name, row) for name, row in found["cases"].items()),
        "",
        *learning_table(found["learning"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def case_line(name: str, row: dict[str, Any]) -> str:
    """One technique."""
    seconds = [f"{row[where]['seconds']:.2f}" if "seconds" in row[where] else "" for where in ("cpu", "gpu")]
    peak = f"{row['gpu']['peak_bytes'] / 1e6:.1f}" if row["gpu"].get("peak_bytes") else ""
    numbers = f"{row['numbers_apart']:.1e} ({row['allowed_numbers']:g})" if "numbers_apart" in row else ""
    weights = f"{row['weights_apart']:.1e} ({row['allowed_weights']:g})" if "weights_apart" in row else ""
    said = "; ".join(row["wrong"]) or "agrees"
    return (
        f"| {name} | {' | '.join(seconds)} | {peak} | {numbers} | {row.get('worst_number', '')} | {weights} | {said} |"
    )


def learning_table(found: dict[str, Any]) -> Iterator[str]:
    """How bf16 and recomputed layers learn."""
    if not found:
        return
    yield f"distill.tokens on a decoder of 6 layers, 512 wide, {LONGER['batch_tokens']} tokens a step, on the GPU:"
    yield ""
    yield "| precision | seconds | GPU peak MB | validation loss before | after |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, row in found.items():
        if "failed" in row:
            yield f"| {name} | {row['failed']} | | | |"
            continue
        told = row["metrics"]
        yield (
            f"| {name} | {row['seconds']:.2f} | {row['peak_bytes'] / 1e6:.0f} | "
            f"{told['validation_loss_before']:.4f} | {told['validation_loss']:.4f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
