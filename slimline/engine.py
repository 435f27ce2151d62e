"""TensorRT engines: find a runtime, read what an engine is, say whether this machine can run it, and run it.

Two runtimes share one Python API: TensorRT, which builds on the GPU that it builds for, and TensorRT for RTX, which
builds ahead of time for the GPUs it is told, with none at hand. What one of them lacks is asked of its module.

Running is thin: inputs go through pinned memory, and what was run once in a shape is afterwards launched as one CUDA
graph (TensorRT for RTX does the latter itself).

Shapes: B = texts, S = tokens.
"""

# Long because whether an engine can run here and how it runs must agree on one record.
from __future__ import annotations

import ctypes
import importlib
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from slimline import graph
from slimline.artifact import Frozen
from slimline.errors import ConfigError, ModelError
from slimline.profiles import Profile, fitting

FILE, RECORD, TIMING_CACHE = "model.engine", "engine.json", "timing.cache"

RuntimeName = Literal["tensorrt", "tensorrt_rtx"]
RUNTIMES: tuple[RuntimeName, ...] = ("tensorrt", "tensorrt_rtx")
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
PACKAGES = {"tensorrt": "tensorrt-cu12", "tensorrt_rtx": "tensorrt-rtx-cu12"}
DTYPES = {
    "float": np.float32, "half": np.float16, "int64": np.int64, "int32": np.int32, "int8": np.int8,
    "uint8": np.uint8, "bool": np.bool_,
}  # fmt: skip
"""TensorRT's names of the types that numpy has too."""
GRAPHS = 64
"""Shapes whose CUDA graphs are kept; the one that was not asked for longest goes first."""

Array = np.ndarray[Any, np.dtype[Any]]


class Tensor(Frozen):
    """An input or output: TensorRT's name of its type, and its shape with -1 where it is open."""

    dtype: str
    shape: tuple[int, ...]


class Record(Frozen):
    """What an engine is: engine.json beside it, and all but `layers` in the manifest."""

    runtime: RuntimeName
    version: str
    gpu: str = ""
    """The GPU it was built on; empty if it was built ahead of time."""
    compute_capabilities: tuple[str, ...]
    """What it runs on, such as 8.9. Empty: all that TensorRT for RTX knows, from 8.0 on."""
    version_compatible: bool = False
    hardware_compatible: bool = False
    stripped: bool = False
    timing_cache: str = ""
    """The key of the timing cache beside it; empty if there is none."""
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    profiles: tuple[Profile, ...]
    high_precision: tuple[str, ...] = ()
    """Layers of the graph that work in more bits than its narrowest ones."""
    layers: dict[str, str] = {}
    """What each layer that multiplies or normalizes works in, such as 'int8' or 'half x int4' (activation x weight)."""

    @property
    def built_by(self) -> str:
        return f"{TITLES[self.runtime]} {self.version}"

    @property
    def runs_on(self) -> str:
        if not self.compute_capabilities:
            return "compute capability 8.0 and later"
        later = " and later" if self.hardware_compatible else ""
        return f"compute capability {', '.join(self.compute_capabilities)}{later}"


class Gpu(NamedTuple):
    """The first NVIDIA GPU of this machine."""

    name: str
    capability: str


def facts(folder: Path) -> dict[str, Any]:
    """What the manifest keeps of engine.json; empty if there is no engine."""
    return read(folder).model_dump(mode="json", exclude={"layers"}) if (folder / RECORD).is_file() else {}


def read(folder: Path) -> Record:
    """The record of the engine in a folder. Raises ModelError if there is none."""
    file = folder / RECORD
    try:
        return Record.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise ModelError(f"{file} is no record of an engine. Build it again: export.tensorrt.") from None


def describe(facts: Mapping[str, Any]) -> str:
    """A manifest's facts about an engine in one line."""
    record = Record.model_validate(facts)
    shapes = [next(iter(profile.values())) for profile in record.profiles]
    ranges = ", ".join(f"{s.min} to {s.max} tuned for {s.opt}" for s in shapes)
    flags = [name for name in ("version_compatible", "hardware_compatible", "stripped") if getattr(record, name)]
    return "; ".join([record.built_by, record.runs_on, f"{next(iter(record.profiles[0]))} {ranges}", *flags])


def installed() -> dict[str, str]:
    """The runtimes that can be imported here, and their versions."""
    return {name: str(module.__version__) for name in RUNTIMES if (module := _import(name))}


def module(name: str) -> Any:
    """The module of a runtime. Raises ConfigError saying what to install."""
    found = _import(name)
    if found is None:
        raise ConfigError(f"{TITLES[name]} is not installed here. Install it with pip: {PACKAGES[name]}.")
    return found


def gpu() -> Gpu | None:
    """The first NVIDIA GPU, or None if this machine has none that works."""
    driver = cuda()
    try:
        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS or ask(driver.cuDeviceGetCount()) < 1:
            return None
    except RuntimeError:  # no libcuda.so.1: there is no driver
        return None
    device, attribute = ask(driver.cuDeviceGet(0)), driver.CUdevice_attribute
    name = ask(driver.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
    major, minor = (
        ask(driver.cuDeviceGetAttribute(a, device))
        for a in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return Gpu(name, f"{major}.{minor}")


def cuda() -> Any:
    """The CUDA driver's functions. Raises ConfigError saying what to install."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        raise ConfigError("cuda-bindings is not installed here. Install it with pip: cuda-bindings.") from None


def ask(answer: tuple[Any, ...]) -> Any:
    """What a call of the CUDA driver returns beside its status. Raises ModelError if it failed."""
    status, *values = answer
    if int(status) != 0:
        raise ModelError(f"the GPU refused: {status.name}. See whether another program uses it, or lower max_batch.")
    return values[0] if values else None


def refusal(record: Record, installed: Mapping[str, str], gpu: Gpu | None) -> str:
    """Why a machine with these runtimes and this GPU cannot run the engine, naming both; empty if it can."""
    built = f"this engine was built by {record.built_by} for {record.runs_on}"
    package = f"{PACKAGES[record.runtime]}=={record.version}"
    version = installed.get(record.runtime)
    if version is None:
        others = " and ".join(f"{TITLES[name]} {number}" for name, number in installed.items())
        return f"{built}, but this machine has {others or 'no TensorRT'}. Install {package}."
    if not _reads(record, version):
        return (
            f"{built}, but this machine has {TITLES[record.runtime]} {version}. Install {package}, or build it again."
        )
    if gpu is None:
        return f"{built}, but this machine has no NVIDIA GPU. Serve the ONNX model that it was built from instead."
    if not _runs_on(record, gpu.capability):
        return (
            f"{built}, but this machine's GPU, {gpu.name}, has {gpu.capability}. "
            "Build it again for that one: export.tensorrt."
        )
    return ""


def log_of(module: Any, most: int | None = None) -> Any:
    """A logger for a runtime that keeps all but the verbose messages, or the last `most` of them.

    They are `lines` of (severity, message).
    """

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.lines: deque[tuple[str, str]] = deque(maxlen=most)

        def log(self, severity: Any, message: str) -> None:
            if severity != module.ILogger.Severity.VERBOSE:
                self.lines.append((severity.name, message))

    return Log()


class Session:
    """An engine on this machine's GPU. Raises ModelError, naming both, if the two do not fit.

    Calls from several threads wait for each other. Memory on the GPU is kept until `close`.
    """

    def __init__(self, folder: Path) -> None:
        self.record = read(folder)
        here = installed()
        device = gpu() if self.record.runtime in here else None
        problem = refusal(self.record, here, device)
        if problem or device is None:
            raise ModelError(problem)
        self.gpu = device
        self.module, self.cuda, self.lock = module(self.record.runtime), cuda(), threading.Lock()
        self.context = ask(self.cuda.cuDevicePrimaryCtxRetain(ask(self.cuda.cuDeviceGet(0))))
        ask(self.cuda.cuCtxSetCurrent(self.context))
        self.stream = ask(self.cuda.cuStreamCreate(self.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))
        self.log = log_of(self.module, most=100)
        self.runtime = self.module.Runtime(self.log)
        self.runtime.engine_host_code_allowed = self.record.version_compatible  # it brings its own lean runtime
        self.engine = self.runtime.deserialize_cuda_engine((folder / FILE).read_bytes())
        if self.engine is None:
            reason = next(
                (message for level, message in reversed(self.log.lines) if "ERROR" in level), "no reason given"
            )
            raise ModelError(
                f"this engine was built by {self.record.built_by} for {self.record.runs_on}, but this machine's "
                f"{device.name} ({device.capability}) cannot load it: {reason}. Build it again here: export.tensorrt."
            )
        if self.record.stripped:
            self._refit(folder / graph.FILE)
        # TensorRT for RTX captures graphs itself, and compiles kernels for each context anew: one a profile
        self.captures_itself = hasattr(self.module, "CudaGraphStrategy")
        self.capturable = not self.captures_itself
        self.plans: dict[Any, _Plan] = {}
        self.scratch = None if self.captures_itself else self._allocate(int(self.engine.device_memory_size_v2))
        self.buffers = {name: Buffer(self, size) for name, size in self._sizes().items()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What the engine says to these inputs. Raises ModelError if no profile holds their shapes."""
        given: dict[str, Array] = {
            name: np.ascontiguousarray(inputs[name], DTYPES[tensor.dtype])
            for name, tensor in self.record.inputs.items()
        }
        shapes = {name: array.shape for name, array in given.items()}
        index = fitting(self.record.profiles, shapes)
        key = index if self.captures_itself else (index, tuple(shapes.values()))
        with self.lock:
            ask(self.cuda.cuCtxSetCurrent(self.context))  # of this thread
            if key in self.plans:
                self.plans[key] = self.plans.pop(key)  # in the order in which they were last asked for
            else:
                if len(self.plans) >= GRAPHS:
                    self.plans.pop(next(iter(self.plans))).close()
                self.plans[key] = _Plan(self, index)
            for name, array in given.items():
                self.buffers[name].host[: array.nbytes] = array.reshape(-1).view(np.uint8)
            return self.plans[key].run(shapes)

    def close(self) -> None:
        """Give the memory back. The session runs nothing afterwards."""
        with self.lock:
            ask(self.cuda.cuCtxSetCurrent(self.context))
            for plan in self.plans.values():
                plan.close()
            self.plans.clear()
            for buffer in self.buffers.values():
                ask(self.cuda.cuMemFreeHost(buffer.address))
                ask(self.cuda.cuMemFree(buffer.device))
            self.buffers.clear()
            if self.scratch is not None:
                ask(self.cuda.cuMemFree(self.scratch))
            self.engine = self.scratch = None

    def _refit(self, file: Path) -> None:
        refitter = self.module.Refitter(self.engine, self.log)
        parser = self.module.OnnxParserRefitter(refitter, self.log)
        if not (parser.refit_from_file(str(file)) and refitter.refit_cuda_engine()):
            reason = self.log.lines[-1][1] if self.log.lines else "no reason given"
            raise ModelError(f"{file} does not refit its stripped engine: {reason}. Build it again: export.tensorrt.")

    def _allocate(self, size: int) -> int:
        return int(ask(self.cuda.cuMemAlloc(max(1, size))))

    def _sizes(self) -> dict[str, int]:
        """Bytes of the largest that each input and output can be."""
        sizes = dict.fromkeys((*self.record.inputs, *self.record.outputs), 0)
        for index, profile in enumerate(self.record.profiles):
            plan = _Plan(self, index)
            context = plan.context
            if self.captures_itself:
                self.plans[index] = plan  # its kernels are compiled already
            for name, shapes in profile.items():
                context.set_input_shape(name, shapes.max)
            for name, tensor in (self.record.inputs | self.record.outputs).items():
                elements = int(np.prod(tuple(context.get_tensor_shape(name))))
                sizes[name] = max(sizes[name], elements * np.dtype(DTYPES[tensor.dtype]).itemsize)
        return sizes


def logits(
    folder: Path, encode: Callable[[Sequence[str]], Mapping[str, Array]], texts: Sequence[str], size: int
) -> Array:
    """float32 [N, L]: what an engine says on this machine's GPU, `size` texts at a time, in their order."""
    with closing(Session(folder)) as session:
        batches = [texts[at : at + size] for at in range(0, len(texts), size)]
        return np.concatenate([session.run(encode(batch))["logits"] for batch in batches]).astype(np.float32)


class Buffer:
    """One input or output: pinned memory here, and as much on the GPU."""

    def __init__(self, session: Session, size: int) -> None:
        size = max(1, size)
        self.address = int(ask(session.cuda.cuMemHostAlloc(size, 0)))
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        self.device = session._allocate(size)


class _Plan:
    """An execution context and, once it has run, the CUDA graph of that. One shape each, but for RTX one profile."""

    def __init__(self, session: Session, index: int) -> None:
        self.session = session
        self.graph: Any = None
        engine, rt = session.engine, session.module
        if session.captures_itself:
            options = engine.create_runtime_config()
            options.cuda_graph_strategy = rt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.context = engine.create_execution_context(options)
        else:  # a graph keeps its context's state, so each has one; the memory is shared, as they never run together
            self.context = engine.create_execution_context(rt.ExecutionContextAllocationStrategy.USER_MANAGED)
            self.context.set_device_memory(session.scratch, int(engine.device_memory_size_v2))
        self.context.set_optimization_profile_async(index, int(session.stream))
        ask(session.cuda.cuStreamSynchronize(session.stream))

    def run(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        session = self.session
        if self.graph is not None:
            ask(session.cuda.cuGraphLaunch(self.graph, session.stream))
        else:
            for name, shape in shapes.items():
                self.context.set_input_shape(name, shape)
            for name, buffer in session.buffers.items():
                self.context.set_tensor_address(name, buffer.device)
            self._enqueue()
            if session.capturable:
                ask(session.cuda.cuStreamSynchronize(session.stream))  # the first run may not be captured
                self.graph = self._capture()
                session.capturable = self.graph is not None
        ask(session.cuda.cuStreamSynchronize(session.stream))
        answers = {}
        for name, tensor in session.record.outputs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            flat: Array = session.buffers[name].host[: self._bytes(name)].view(DTYPES[tensor.dtype])
            answers[name] = flat.reshape(shape).copy()
        return answers

    def close(self) -> None:
        """Give back the CUDA graph, which Python does not, and the context."""
        if self.graph is not None:
            ask(self.session.cuda.cuGraphExecDestroy(self.graph))
        self.graph = self.context = None

    def _capture(self) -> Any:
        """The CUDA graph of one more run; None for an engine that cannot be captured, which is enqueued every time."""
        cuda, stream = self.session.cuda, self.session.stream
        ask(cuda.cuStreamBeginCapture(stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            self._enqueue()
            captured = True
        except ModelError:
            captured = False
        status, recorded = cuda.cuStreamEndCapture(stream)  # whatever happened, or the stream runs nothing any more
        if not captured or int(status) != 0:
            return None
        launchable = ask(cuda.cuGraphInstantiate(recorded, 0))
        ask(cuda.cuGraphDestroy(recorded))
        return launchable

    def _enqueue(self) -> None:
        session = self.session
        for name in session.record.inputs:
            buffer = session.buffers[name]
            ask(session.cuda.cuMemcpyHtoDAsync(buffer.device, buffer.address, self._bytes(name), session.stream))
        if not self.context.execute_async_v3(int(session.stream)):
            reason = session.log.lines[-1][1] if session.log.lines else "no reason given"
            raise ModelError(f"the engine did not run: {reason}. Build it again here: export.tensorrt.")
        for name in session.record.outputs:
            buffer = session.buffers[name]
            ask(session.cuda.cuMemcpyDtoHAsync(buffer.address, buffer.device, self._bytes(name), session.stream))

    def _bytes(self, name: str) -> int:
        tensor = (self.session.record.inputs | self.session.record.outputs)[name]
        return int(np.prod(tuple(self.context.get_tensor_shape(name)))) * np.dtype(DTYPES[tensor.dtype]).itemsize


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: the wheel is there but its libraries are not
        return None


def _reads(record: Record, version: str) -> bool:
    built, here = ([int(n) for n in v.split(".")[:4]] for v in (record.version, version))
    return built == here or (record.version_compatible and built[0] == here[0] and here >= built)


def _runs_on(record: Record, capability: str) -> bool:
    def number(text: str) -> tuple[int, ...]:
        return tuple(int(n) for n in text.split("."))

    if not record.compute_capabilities or record.hardware_compatible:
        return number(capability) >= (8, 0)
    return capability in record.compute_capabilities
