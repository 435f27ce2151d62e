"""What llama.cpp makes of GGUF files: tokens per second and perplexity, as JSON.

    PYTHON benchmarks/llamacpp.py windows.json model.gguf [more.gguf ...] [--quantize q4_0 q8_0] [--threads 1]

PYTHON is one that has llama-cpp-python and numpy, in an environment of its own: slimline is not needed. `windows.json`
has the tokens of every window (ids), the positions that are scored (at) and the token behind each (target), so that
every runtime is asked about the very same. With --quantize each model
is first quantized by llama.cpp itself, into files beside windows.json.

Built for this machine's processor: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python. On one Xeon that build
(0.3.36) crashed at the first token, in ggml's AMX code; with --without-amx the kernel refuses AMX to it, and it runs.

Timings of all models are interleaved, repeat by repeat: what slows the machine slows them all.
"""

import argparse
import ctypes
import errno
import json
import math
import os
import statistics
import struct
import sys
import time
from pathlib import Path

import numpy as np

Window = dict[str, list[int]]


def main() -> None:
    asked = arguments()
    if asked.without_amx:
        refuse_amx()
    import llama_cpp

    windows = json.loads(asked.windows.read_text(encoding="utf-8"))
    models = [
        *asked.models,
        *(quantize(m, kind, asked.windows.parent) for m in asked.models for kind in asked.quantize),
    ]
    found = {model.name: {"size_bytes": model.stat().st_size} for model in models}
    for model, numbers in timings(models, windows, asked).items():
        found[model.name] |= numbers
    for model in models if asked.scored != 0 else []:
        print(f"scoring {model.name}", file=sys.stderr)
        found[model.name] |= score(model, windows[: asked.scored], asked)
    about = {
        "llama_cpp_python": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        "without_amx": asked.without_amx,
        "threads": asked.threads,
        "prefill_tokens": asked.prefill,
        "decode_tokens": asked.decode,
        "cache": asked.cache,
        "repeats": asked.repeats,
    }
    print(json.dumps({**about, "models": found}, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("windows", type=Path, help="JSON: a list of windows, each scored by itself")
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files")
    parser.add_argument(
        "--quantize", nargs="*", default=[], help="and what llama.cpp makes of each: q4_0, q8_0, q4_k_m"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-amx", action="store_true", help="let the kernel refuse AMX, on x86 under Linux")
    parser.add_argument("--prefill", type=int, default=512, help="tokens read at once")
    parser.add_argument("--decode", type=int, default=128, help="tokens read one by one, as when generating")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scored", type=int, help="windows that perplexity is measured on; 0 for none")
    parser.add_argument("--cache", choices=("f16", "f32"), default="f16", help="what keys and values are kept in")
    parser.add_argument("--logits", type=Path, help="a folder for the first window's logits, MODEL.npy [tokens, words]")
    return parser.parse_args()


def refuse_amx() -> None:
    """From here on the kernel denies arch_prctl(ARCH_REQ_XCOMP_PERM), which asks for AMX's tiles: a seccomp filter."""
    arch_prctl, request, permit, deny = 158, 0x1023, 0x7FFF0000, 0x00050000 | errno.EPERM
    load, jump_if_equal, answer = 0x20, 0x15, 0x06  # of BPF; it sees the call at 0 and arguments from 16 on
    steps = [
        (load, 0, 0, 0), (jump_if_equal, 0, 3, arch_prctl), (load, 0, 0, 16), (jump_if_equal, 0, 1, request),
        (answer, 0, 0, deny), (answer, 0, 0, permit),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    kernel = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    if kernel.prctl(no_new_privileges, 1, 0, 0, 0) or kernel.prctl(seccomp, filter_mode, program, 0, 0):
        sys.exit(f"the kernel takes no filter: {os.strerror(ctypes.get_errno())}.")


def quantize(model: Path, kind: str, folder: Path) -> Path:
    """The model as llama.cpp itself quantizes it."""
    import llama_cpp

    out = folder / f"{model.stem}-{kind}.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    if llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), settings):
        sys.exit(f"llama.cpp could not quantize {model} to {kind}.")
    return out


def timings(models: list[Path], windows: list[Window], asked: argparse.Namespace) -> dict[Path, dict[str, object]]:
    """Median tokens per second of reading at once and of one by one, and every repeat's."""
    whole = [token for window in windows for token in window["ids"]]
    while len(whole) < asked.prefill + asked.decode:
        whole += whole
    running = {model: load(model, asked.prefill + asked.decode, asked) for model in models}
    rates: dict[Path, dict[str, list[float]]] = {model: {"prefill": [], "decode": []} for model in models}
    for repeat in range(asked.repeats + 1):
        for model in models if repeat % 2 else reversed(models):
            llama = running[model]
            llama.reset()
            start = time.perf_counter()
            llama.eval(whole[: asked.prefill])
            middle = time.perf_counter()
            for token in whole[asked.prefill : asked.prefill + asked.decode]:
                llama.eval([token])
            end = time.perf_counter()
            if repeat:  # the first one warms up
                rates[model]["prefill"].append(asked.prefill / (middle - start))
                rates[model]["decode"].append(asked.decode / (end - middle))
    return {
        model: {f"{what}_tokens_per_s": statistics.median(values) for what, values in found.items()}
        | {"repeats": found}
        for model, found in rates.items()
    }


def load(model: Path, context: int, asked: argparse.Namespace, every_logit: bool = False):
    import llama_cpp

    kind = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32}[asked.cache]
    return llama_cpp.Llama(
        str(model), n_ctx=context, n_batch=512, n_ubatch=512, n_threads=asked.threads, n_threads_batch=asked.threads,
        type_k=kind, type_v=kind, logits_all=every_logit, verbose=False,
    )  # fmt: skip


def score(model: Path, windows: list[Window], asked: argparse.Namespace) -> dict[str, object]:
    """Perplexity over the windows' scored tokens, and each window's sum of negative logarithms."""
    llama = load(model, max(len(window["ids"]) for window in windows), asked, every_logit=True)
    losses = []
    for number, window in enumerate(windows):
        llama.reset()
        llama.eval(window["ids"])
        scores_SW = np.array(llama.scores[window["at"]], dtype=np.float64)
        if asked.logits and not number:
            np.save(asked.logits / f"{model.stem}.npy", scores_SW.astype(np.float32))
        top_S = scores_SW.max(axis=1)
        sums_S = top_S + np.log(np.exp(scores_SW - top_S[:, None]).sum(axis=1))
        losses.append(float((sums_S - scores_SW[np.arange(len(top_S)), window["target"]]).sum()))
    tokens = sum(len(window["at"]) for window in windows)
    return {"perplexity": math.exp(sum(losses) / tokens), "tokens_scored": tokens, "nll": losses}


if __name__ == "__main__":
    main()
