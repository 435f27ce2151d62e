"""Build a TensorRT engine: one graph compiled for the GPUs it will run on and the lengths that texts really have.

Takes the unfused graph (export.onnx with fuse=False; operators of ONNX Runtime's own are unknown to TensorRT). The
network is strongly typed: precision is what the graph says, in types and Q/DQ; the runtime rounds nothing by itself
but, with tf32, what float32 layers multiply. Layers that work in more bits than the narrowest are written down.

TensorRT for RTX builds ahead of time, without a GPU, for the compute capabilities it is told. TensorRT builds on the
GPU that it builds for. Inputs of token numbers stay int64, as in the graph. Ahead of time, MiniLM-L6 takes 2 to 9 s on
two cores; who times kernels on a GPU takes longer.
"""

# Long because it says, option by option, what each of the two runtimes cannot do, before it builds anything.
from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from slimline import data, engine, graph, hf, parity, precision, profiles
from slimline.engine import Gpu, Record
from slimline.errors import ConfigError, ModelError
from slimline.profiles import Profile, Span
from slimline.technique import BaseConfig, Metrics, Stored

if TYPE_CHECKING:
    import onnx

NEEDS, GIVES = "onnx", "tensorrt"

LOG = "build.log"
HINT = "Try tf32=False"
BITS = {
    "float": 32, "int32": 32, "int64": 64, "half": 16, "bf16": 16, "int8": 8, "uint8": 8, "fp8": 8, "int4": 4, "fp4": 4,
}  # fmt: skip
"""Width of the types that layers multiply in, by TensorRT's names."""
WATCHED = ("MATRIX_MULTIPLY", "CONVOLUTION", "EINSUM", "SOFTMAX", "NORMALIZATION")
"""Layers whose precision is reported: those that cost, and those that lose most when rounded."""
TOLERANCES = {"fp32": 0.02, "bf16": 0.1, "rounded": 0.2}
"""How far an engine may be from its graph, as a fraction of the largest logit, by what its activations are kept in.

Where they are rounded to 8 bits, a last bit that a kernel adds otherwise moves a number by a whole step: MiniLM-L6 in
int8 moves by 0.09 between float16 and float32 arithmetic around the same steps.
"""
PASSING = ("SHUFFLE", "IDENTITY", "SLICE", "CONCATENATION", "GATHER")
"""Layers that move numbers and leave them what they are."""


class Config(BaseConfig):
    data: Stored = Field(
        description="calibration texts: their lengths tune the profiles, and parity is checked on them"
    )
    runtime: Literal["auto", "tensorrt", "tensorrt_rtx"] = Field(
        "auto",
        description="who builds and later runs it; auto: tensorrt where there is a GPU for it, else tensorrt_rtx",
    )
    profiles: int = Field(
        0, ge=0, le=8, description="spans of lengths with kernels of their own; 0: as many as pay (decoders: 2)"
    )
    max_length: int | None = Field(None, ge=2, le=1 << 20, description="tokens of the longest text; none: the model's")
    opt_batch: int = Field(8, ge=1, le=4096, description="texts in a batch that kernels are tuned for")
    single: bool = Field(False, description="kernels of their own for one text alone, beside those for batches")
    max_batch: int = Field(32, ge=1, le=4096, description="texts in a batch at most")
    compute_capabilities: tuple[str, ...] = Field(
        (), description="GPUs to build for ahead of time, such as 8.9; none: this machine's, or (RTX) all from 8.0 on"
    )
    version_compatible: bool = Field(False, description="later versions of the runtime can load it too")
    hardware_compatible: bool = Field(False, description="later GPUs, from 8.0 on, can run it too")
    stripped: bool = Field(False, description="leave the weights out; they are put back from model.onnx when served")
    timing_cache: Stored = Field(
        "", description="an earlier engine of the same GPU and version, whose timings to reuse"
    )
    workspace_mib: int | None = Field(None, ge=1, le=1 << 20, description="scratch memory of a layer; none: no limit")
    optimization: int = Field(3, ge=0, le=5, description="how long to search for kernels: 5 is longest")
    tf32: bool = Field(True, description="round what float32 layers multiply to 10 bits of mantissa")
    texts: int = Field(64, ge=2, description="how many texts the parity guard compares, where this machine can run it")
    tolerance: float | None = Field(
        None, gt=0, le=0.5, description="allowed, as a fraction of the largest logit; none: as the types allow"
    )


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write model.engine, engine.json, build.log, config.json and the tokenizer. Raises where the runtime cannot."""
    name, gpu = choose(config)
    module = engine.module(name)
    check(config, name, gpu)
    model = graph.read(source / graph.FILE)
    limit = hf.max_length(source)
    longest = config.max_length or limit
    if longest > limit:
        raise ConfigError(f"max_length is {longest} but the model reads {limit} tokens at most. Lower it.")
    tokenizer = hf.tokenizer(source, limit)
    lengths = tokenizer.lengths(data.documents(Path(config.data), "calibration").texts)
    opens = {value.name: open_shape(value) for value in model.graph.input}
    decodes = any(name.startswith(profiles.PAST) for name in opens)
    wanted = profiles.of(opens, batches(config), profiles.spans(lengths, longest, 1 if decodes else config.profiles))

    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    record = build(module, source / graph.FILE, model, out, wanted, config, name, gpu)
    seconds = time.perf_counter() - start
    copy_rest(source, out, longest, record.stripped)
    return {
        "build_seconds": seconds,
        "profiles": float(len(record.profiles)),
        "layers": float(len(record.layers)),
        "layers_high_precision": float(len(record.high_precision)),
        "size_bytes": float((out / engine.FILE).stat().st_size),
        **parity_of(source, out, hf.tokenizer(out, longest), config, record, gpu),
    }


def batches(config: Config) -> list[Span]:
    """How many texts come together: in one span, or in one for a text alone and one for more."""
    least = 2 if config.single and config.max_batch > 1 else 1
    many = Span(least, max(least, min(config.opt_batch, config.max_batch)), config.max_batch)
    return [Span(1, 1, 1), many] if least > 1 else [many]


def choose(config: Config) -> tuple[engine.RuntimeName, Gpu | None]:
    """Which runtime builds, and this machine's GPU. Raises ConfigError if none is installed."""
    here = engine.installed()
    if config.runtime == "auto" and not here:
        packages = " or ".join(engine.PACKAGES.values())
        raise ConfigError(f"TensorRT is not installed here. Install it with pip: {packages}, and cuda-bindings.")
    gpu = engine.gpu()
    if config.runtime != "auto":
        return config.runtime, gpu
    return ("tensorrt" if "tensorrt_rtx" not in here or (gpu and "tensorrt" in here) else "tensorrt_rtx"), gpu


def check(config: Config, name: engine.RuntimeName, gpu: Gpu | None) -> None:
    """Raise ConfigError for the first option that this runtime has not, or has not on this machine."""
    title = engine.TITLES[name]
    if name == "tensorrt":
        if gpu is None:
            raise ConfigError(
                f"{title} builds on the GPU it builds for, and this machine has none. "
                "Build with runtime=tensorrt_rtx, which needs no GPU."
            )
        if config.compute_capabilities:
            raise ConfigError(
                f"{title} builds for this machine's GPU ({gpu.capability}), not for {config.compute_capabilities}. "
                "Leave compute_capabilities out, set hardware_compatible, or build with runtime=tensorrt_rtx."
            )
        return
    instead = {
        "version_compatible": "It ships no lean runtime for that. Build one engine for each version",
        "hardware_compatible": "Name the GPUs in compute_capabilities, or none for all from 8.0 on",
        "timing_cache": "It times nothing when it builds. Leave it out",
    }
    for option, hint in instead.items():
        if getattr(config, option):
            raise ConfigError(f"{title} knows no {option}. {hint}.")
    if config.stripped and gpu is None:
        raise ConfigError(
            f"{title} strips weights only on a machine with a GPU, and this one has none. Leave stripped out."
        )


def open_shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The shape of an input, -1 where it is open."""
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def build(
    module: Any,
    file: Path,
    model: onnx.ModelProto,
    out: Path,
    wanted: list[Profile],
    config: Config,
    name: engine.RuntimeName,
    gpu: Gpu | None,
) -> Record:
    """Parse, compile and write the engine with its record and log."""
    log = engine.log_of(module)
    builder = module.Builder(log)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parse(module, network, log, file, model)
    settings = builder.create_builder_config()
    cache_key = configure(module, builder, settings, config, wanted, name, gpu)
    serialized = builder.build_serialized_network(network, settings)
    inconsistent = [message for _, message in log.lines if "not self-consistent" in message]
    if serialized is None or inconsistent:
        raise failure(log.lines, inconsistent, file, config, name, wanted)
    layers = precisions(network)
    narrowest = min((bits(kind) for kind in layers.values()), default=0)
    record = Record(
        runtime=name,
        version=str(module.__version__),
        gpu=gpu.name if gpu else "",
        compute_capabilities=(gpu.capability,) if name == "tensorrt" and gpu else config.compute_capabilities,
        version_compatible=config.version_compatible,
        hardware_compatible=config.hardware_compatible,
        stripped=config.stripped,
        timing_cache=cache_key,
        inputs=tensors(network.num_inputs, network.get_input),
        outputs=tensors(network.num_outputs, network.get_output),
        profiles=tuple(wanted),
        high_precision=tuple(layer for layer, kind in layers.items() if bits(kind) > narrowest),
        layers=layers,
    )
    (out / engine.FILE).write_bytes(bytes(serialized))
    if cache_key:
        (out / engine.TIMING_CACHE).write_bytes(bytes(settings.get_timing_cache().serialize()))
    (out / engine.RECORD).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    (out / LOG).write_text(readable(log.lines), encoding="utf-8")
    return record


def parse(module: Any, network: Any, log: Any, file: Path, model: onnx.ModelProto) -> None:
    """Read the graph into the network. Raises ModelError naming the first node that cannot be, and its layer."""
    parser = module.OnnxParser(network, log)
    if parser.parse_from_file(str(file)):
        return
    error = parser.get_error(0)
    if not 0 <= error.node() < len(model.graph.node):
        raise ModelError(f"TensorRT cannot read {file}: {error.desc()}. Export it again: export.onnx with fuse=False.")
    node = model.graph.node[error.node()]
    foreign = node.domain not in ("", "ai.onnx")
    hint = (
        f"It is an operator of {node.domain}: export again with export.onnx and fuse=False"
        if foreign
        else "Put a quantization that TensorRT reads before this step: int8_static, fp8 or int4_weights"
        if node.op_type in graph.QUANTIZED
        else f"It says {error.desc()!r}: export with another opset"
    )
    raise ModelError(
        f"TensorRT cannot read the {node.op_type} node {node.name or node.output[0]!r}"
        f"{f' of {where}' if (where := graph.place(node)) else ''}. {hint}."
    )


def configure(
    module: Any,
    builder: Any,
    settings: Any,
    config: Config,
    wanted: list[Profile],
    name: engine.RuntimeName,
    gpu: Gpu | None,
) -> str:
    """Set everything that was asked for. Returns the key of the timing cache, empty for RTX, which has none."""
    flags = {"VERSION_COMPATIBLE": config.version_compatible, "STRIP_PLAN": config.stripped, "TF32": config.tf32}
    for flag, on in flags.items():
        (settings.set_flag if on else settings.clear_flag)(getattr(module.BuilderFlag, flag))
    settings.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    settings.builder_optimization_level = config.optimization
    if config.workspace_mib:
        settings.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, config.workspace_mib << 20)
    for profile in wanted:
        shapes = builder.create_optimization_profile()
        for input_name, shape in profile.items():
            shapes.set_shape(input_name, shape.min, shape.opt, shape.max)
        settings.add_optimization_profile(shapes)
    if name == "tensorrt_rtx":
        aim(module, settings, config.compute_capabilities)
        return ""
    if config.hardware_compatible:
        settings.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    key = f"{name} {module.__version__} {gpu}"
    settings.set_timing_cache(settings.create_timing_cache(timings(config, key)), False)
    return key


def aim(module: Any, settings: Any, capabilities: Sequence[str]) -> None:
    """Set what to build for ahead of time. Raises ConfigError for a capability that the runtime does not know."""
    known = {
        f"{int(value) // 10}.{int(value) % 10}": value
        for key, value in module.ComputeCapability.__members__.items()
        if key.startswith("SM")
    }
    settings.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if capability not in known:
            raise ConfigError(
                f"TensorRT for RTX {module.__version__} builds for no compute capability {capability!r}. "
                f"It has: {', '.join(sorted(known, key=float))}."
            )
        settings.set_compute_capability(known[capability], index)


def timings(config: Config, key: str) -> bytes:
    """The bytes of the earlier timing cache, if it was made under the same key; else none, to begin a new one."""
    if not config.timing_cache:
        return b""
    folder = Path(config.timing_cache)
    return (folder / engine.TIMING_CACHE).read_bytes() if engine.read(folder).timing_cache == key else b""


def failure(
    lines: Sequence[tuple[str, str]],
    inconsistent: list[str],
    file: Path,
    config: Config,
    name: engine.RuntimeName,
    wanted: list[Profile],
) -> ConfigError | ModelError:
    """Why nothing was built, in one sentence."""
    reason = inconsistent[0] if inconsistent else next((m for level, m in reversed(lines) if "ERROR" in level), "")
    reason = re.sub(r"\s+", " ", reason.split(" In compileGraph")[0])
    if "workspace" in reason:
        return ConfigError(
            f"{config.workspace_mib} MiB of workspace are too little for a layer of {file}. "
            "Raise workspace_mib, lower max_batch, or leave it out."
        )
    if inconsistent:
        largest = next(iter(wanted[-1].values())).max
        return ModelError(f"{file} cannot take inputs of {largest}: {reason} Lower max_length.")
    if "HW-specific datatypes" in reason or "Turing" in reason:
        return ModelError(
            f"{file} holds what {', '.join(config.compute_capabilities)} cannot run: {reason} "
            "Choose other compute_capabilities, or quantize in another way."
        )
    return ModelError(f"{engine.TITLES[name]} cannot build {file}: {reason} Export or quantize it in another way.")


def precisions(network: Any) -> dict[str, str]:
    """What each layer that multiplies or normalizes works in: 'int8', or 'half x int4' (activation x weight)."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    maker = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    found = {}
    for layer in layers:
        kind = layer.type.name
        if kind in WATCHED and not is_shape(layer):
            operands = 2 if kind in ("MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION") and layer.num_inputs > 1 else 1
            kinds = [stored_as(layer.get_input(i), maker) for i in range(operands)]
            found[layer.name] = " x ".join(dict.fromkeys(kinds))
    return found


def is_shape(layer: Any) -> bool:
    """Whether the layer computes with whole numbers: sizes and positions, not activations."""
    return layer.get_output(0).dtype.name in ("INT32", "INT64", "BOOL")


def stored_as(tensor: Any, maker: dict[str, Any]) -> str:
    """The type a tensor is kept in: of what was dequantized into it, else its own."""
    name = tensor.name
    while (layer := maker.get(name)) is not None:
        if layer.type.name == "DEQUANTIZE":
            return str(layer.get_input(0).dtype.name.lower())
        if layer.type.name not in PASSING:
            break
        name = layer.get_input(0).name
    return str(tensor.dtype.name.lower())


def bits(kind: str) -> int:
    """The bits of the narrowest operand."""
    return min(BITS[part] for part in kind.split(" x "))


def tensors(count: int, get: Any) -> dict[str, engine.Tensor]:
    """Name, type and shape of inputs or outputs."""
    found = [get(i) for i in range(count)]
    return {t.name: engine.Tensor(dtype=t.dtype.name.lower(), shape=tuple(t.shape)) for t in found}


def readable(lines: Sequence[tuple[str, str]]) -> str:
    """The log without times, paths and memory, so that the same build leaves the same bytes."""
    kept = [f"{level}: {message}" for level, message in lines if "Input filename" not in message]
    return re.sub(r"[\d.]+ ?(ms|seconds|MiB)\b", r"... \1", "\n".join(kept)) + "\n"


def copy_rest(source: Path, out: Path, longest: int, stripped: bool) -> None:
    """The tokenizer, the settings with the length that the engine ends at, and the graph if weights come from it."""
    for name in hf.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    settings = hf.read_config(source) | {"slimline_max_length": longest}
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if stripped:
        for name in (graph.FILE, graph.DATA):
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)


def activations(model: onnx.ModelProto) -> str:
    """What a graph's activations are kept in, as a key of TOLERANCES."""
    if graph.count(model)["QuantizeLinear"]:
        return "rounded"
    halves = any(tensor.data_type == precision.KINDS["bf16"].onnx for tensor in model.graph.initializer)
    return "bf16" if halves else "fp32"


def parity_of(
    source: Path, out: Path, tokenizer: hf.Tokenizer, config: Config, record: Record, gpu: Gpu | None
) -> Metrics:
    """How far the engine is from its graph, where this machine can run it; else that it was not checked."""
    if engine.refusal(record, engine.installed(), gpu) or set(record.inputs) - set(hf.INPUTS):
        return {"parity_checked": 0.0}
    texts = parity.texts(Path(config.data), config.texts)
    model = graph.read(source / graph.FILE)
    kept_in = activations(model)
    answers = engine.logits(out, tokenizer.encode, texts, min(parity.BATCH, config.max_batch))
    said = precision.rounding_twin(model, "bf16") if kept_in == "bf16" else model  # no processor runs bfloat16
    difference = parity.compare(parity.onnx_logits(said, tokenizer, texts), answers, f"{HINT}.")
    parity.require_equal(difference, texts, config.tolerance or TOLERANCES[kept_in], HINT)
    return {
        "parity_checked": 1.0,
        "parity_max_abs": difference.max_abs,
        "parity_agreement": difference.agreement,
    }
