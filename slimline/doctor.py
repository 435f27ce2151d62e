"""What this machine has, and what follows from it for compressing and serving models here.

Looks only: nothing is installed, changed or sent. Costs under a second, for torch is imported only where there is a
GPU to ask it about. What cannot be found out (no /proc, no nvidia-smi) is left empty and is no error.
"""

# Long because it is a list of small looks, and what follows from each.
from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

from slimline import processor
from slimline.errors import SlimlineError

GIB = 2**30

ISA = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "amx": ("amx_int8", "amx_bf16"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "neon": ("asimd",),
    "dot": ("asimddp",),
    "i8mm": ("i8mm",),
    "sve": ("sve",),
}
"""What counts for a model, and the kernel's names for it; any one of them will do."""

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "kfp", "mlflow", "boto3")

TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12")

EXTRAS = {
    "train": (("torch", "transformers"), "train, distill and prune cannot run"),
    "onnx": (("onnx", "onnxruntime", "onnxscript"), "export and quantize cannot run, nor can an ONNX model be served"),
    "launch": (("kfp",), "`slimline run` and `slimline compile` cannot run; single steps can"),
}
"""Extra -> (modules it brings, what cannot be done without it)."""


class Findings(BaseModel):
    """What was found. Sizes in bytes; a version of None means not installed."""

    model_config = ConfigDict(frozen=True)

    slimline: str = ""
    python: str = ""
    system: str = ""
    processor: str = ""
    machine: str = Field("", description="x86_64, aarch64, ...")
    isa: tuple[str, ...] = Field((), description="of ISA, what the processor has")
    cores: int = Field(1, description="cores that this process may use")
    memory_bytes: int = Field(0, description="memory that this process may use")
    disk_free_bytes: int = Field(0, description="where the command was given")
    gpus: tuple[str, ...] = ()
    gpu_in_torch: bool = False
    versions: dict[str, str | None] = {}
    providers: tuple[str, ...] = Field((), description="execution providers of ONNX Runtime")
    tensorrt: tuple[str, ...] = Field((), description="runtimes that build and run engines, with versions")
    containers: str = Field("", description="the engine that `slimline run --docker` would use, with its version")
    missing: dict[str, str] = Field({}, description="extra that is not installed -> what cannot be done")
    store: str = Field("", description="the tracking store, if it answered")
    store_problem: str = ""
    consequences: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The findings as a page of text: facts, then what follows from them."""
        facts = {
            "slimline": f"{self.slimline}, Python {self.python}, {self.system}",
            "processor": f"{self.processor or self.machine}, {_count(self.cores, 'core')}, "
            f"{' '.join(self.isa) or 'instruction set unknown'}",
            "memory": f"{self.memory_bytes / GIB:.1f} GiB, {self.disk_free_bytes / GIB:.0f} GiB of disk free here",
            "gpu": "; ".join(self.gpus) or "none",
            "versions": ", ".join(f"{name} {version or 'missing'}" for name, version in self.versions.items()),
            "providers": ", ".join(self.providers) or "none",
            "tensorrt": ", ".join(self.tensorrt) or "none",
            "containers": self.containers or "none",
            "store": self.store or self.store_problem or "not asked",
        }
        return [f"{name:<10} {value}" for name, value in facts.items()] + [
            "",
            "What follows from it",
            *(f"- {sentence}" for sentence in self.consequences),
        ]


def examine(store: Callable[[], str] | None = None) -> Findings:
    """Look at this machine. `store` says where the store is once it has answered, or raises a SlimlineError."""
    known = processor.this()
    where, problem = _ask(store)
    gpus = _gpus()
    found = Findings(
        slimline=version("slimline") or "from source",
        python=platform.python_version(),
        system=platform.platform(terse=True),
        processor=known.name or platform.processor(),
        machine=platform.machine(),
        isa=tuple(name for name, any_of in ISA.items() if known.has(*any_of)),
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=gpus,
        gpu_in_torch=bool(gpus) and _torch_sees_gpu(),
        versions={name: version(name) for name in PACKAGES},
        providers=_providers(),
        tensorrt=tuple(f"{name} {found}" for name in TENSORRT if (found := version(name))),
        containers=_container_engine(),
        missing={extra: loss for extra, (modules, loss) in EXTRAS.items() if not all(map(_installed, modules))},
        store=where,
        store_problem=problem,
    )
    return found.model_copy(update={"consequences": consequences(found)})


def consequences(found: Findings) -> tuple[str, ...]:
    """What follows from the findings, one sentence each, most far-reaching first. Pure."""
    said = [
        f"Without the extra {extra}, {loss}: pip install 'slimline[{extra}]'." for extra, loss in found.missing.items()
    ]
    if found.store_problem:
        said.append("Nothing can be stored or reused until the store answers.")
    if not found.containers:
        said.append("No container engine answers: `slimline run --docker` needs Docker, or podman.")
    if not found.tensorrt:
        said.append("Without TensorRT no engine is built or served here: pip install 'slimline[tensorrt]'.")
    return (*said, *_on_gpu(found), *_on_cpu(found), *_on_room(found))


def _on_gpu(found: Findings) -> list[str]:
    if not found.gpus:
        return ["There is no GPU: training and measuring run on the processor."]
    said = ["torch trains on the GPU."] if found.gpu_in_torch else []
    if not found.gpu_in_torch and found.versions.get("torch"):
        said.append(f"There is a GPU but torch {found.versions['torch']} cannot use it: make clean run TORCH=cuda.")
    if "CUDAExecutionProvider" not in found.providers and "onnx" not in found.missing:
        said.append("ONNX Runtime runs on the processor: its GPU build is the extra gpu.")
    return said


def _on_cpu(found: Findings) -> list[str]:
    if not found.isa:
        return []
    said = []
    if "vnni" in found.isa or "i8mm" in found.isa or "dot" in found.isa:
        said.append("int8 has its own instructions here: quantized models gain the most.")
    else:
        said.append(
            "int8 has no instructions of its own here (VNNI): sums of full 8-bit products would be cut off, so keep "
            "weights at 7 bits (reduce_range, the default); int8 gains less than on newer processors."
        )
    if "bf16" in found.isa:
        said.append("bf16 has its own instructions: training uses it where it measures faster.")
    elif not found.gpu_in_torch:
        said.append("Training runs in fp32: this processor has no bf16 instructions.")
    if found.machine == "x86_64" and "avx2" not in found.isa:
        said.append("Without AVX2 everything is slow; latencies say nothing about other machines.")
    return said


def _on_room(found: Findings) -> list[str]:
    said = []
    if found.cores == 1:
        said.append(
            "One core: what else runs here disturbs every latency. Ratios are measured interleaved for that reason."
        )
    if 0 < found.memory_bytes < 4 * GIB:
        said.append("Less than 4 GiB of memory: training the example needs about 3; lower the batch size.")
    if found.disk_free_bytes < 2 * GIB:
        said.append("Less than 2 GiB of disk free: a run of the example stores about 1; free some first.")
    return said


def version(package: str) -> str | None:
    """The installed version, read without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _ask(store: Callable[[], str] | None) -> tuple[str, str]:
    try:
        return (store() if store else ""), ""
    except SlimlineError as error:
        return "", str(error)


def _providers() -> tuple[str, ...]:
    if not _installed("onnxruntime"):
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def _container_engine() -> str:
    for tool, asked in (("docker", "{{.Server.Version}}"), ("podman", "{{.Client.Version}}")):
        try:
            done = subprocess.run([tool, "version", "--format", asked], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return f"{tool} {done.stdout.strip()}"
    return ""


def _torch_sees_gpu() -> bool:
    if not _installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _gpus() -> tuple[str, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.splitlines() if line.strip())


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.fullmatch(r"(\d+) (\d+)\s*", _text("/sys/fs/cgroup/cpu.max"))
    return max(1, min(allowed, int(quota[1]) // int(quota[2]))) if quota else allowed


def _memory_bytes() -> int:
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    total = int(psutil.virtual_memory().total)
    return min(total, int(limit)) if limit.isdigit() else total


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
