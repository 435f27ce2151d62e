"""A Triton model repository whose entry takes texts and gives label and score, like every model of slimline.

The entry is an ensemble with the model's name; its steps are <name>_tokenizer, <name>_model and <name>_labels. The
first and last run in Triton's Python backend, which needs nothing that its image lacks: the tokenizers library is
copied beside the first. It is a compiled one, so the server's processor must be of this machine's kind.

A request holds as many texts as may be answered together (see serve.batch_size). Requests are joined where their
texts are equally long.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slimline import artifact, engine, graph, hf, serve
from slimline.errors import ConfigError, ModelError
from slimline.package import Model, copy

TYPES = {"int64": "TYPE_INT64", "int32": "TYPE_INT32", "float": "TYPE_FP32", "half": "TYPE_FP16"}
"""Triton's names of the types that its Python backend can hold, by TensorRT's (see engine.DTYPES)."""
BESIDE = (".json", ".txt", ".log", ".cache")
"""What lies beside a graph or an engine that no runtime reads."""


class Tensor(NamedTuple):
    """An input or output: Triton's type, and its dimensions after the first, which counts texts. -1: any."""

    type: str
    dims: list[int]


class Step(NamedTuple):
    """One model in the repository. Its name, what runs it, and what goes in and out."""

    name: str
    kind: Literal["backend", "platform"]
    runs_in: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    group: str = ""
    """Where its instances run; empty: where Triton puts them."""
    joins: bool = False
    """Whether Triton may join the requests of several clients."""


def write(model: Model, out: Path) -> None:
    """Write the repository. Raises ModelError for what Triton cannot load."""
    check(model)
    inputs, outputs, batch = signature(model)
    entry, *parts = steps(model, inputs, outputs)
    for step in (entry, *parts):
        folder = out / step.name / str(model.version)
        folder.mkdir(parents=True)
        text = fill("config.pbtxt.j2", model=model, step=step, parts=parts if step is entry else [], batch=batch)
        (out / step.name / "config.pbtxt").write_text(text, encoding="utf-8")
    folders = [out / step.name / str(model.version) for step in (entry, *parts)]
    # object stores keep no empty folders, and an ensemble without one has no version
    shutil.copyfile(model.path / artifact.MANIFEST, folders[0] / artifact.MANIFEST)
    write_tokenizer(model, folders[1])
    write_model(model, folders[2])
    labels = fill("labels.py.j2", labels=repr(model.manifest.labels), logits=next(iter(outputs)))
    (folders[3] / "model.py").write_text(labels, encoding="utf-8")


def started(model: Model, out: Path) -> tuple[str, str]:
    """What to do first (nothing), and the command that starts a server on the repository."""
    gpus = "--gpus all " if model.manifest.format == "tensorrt" else ""
    mount = shlex.quote(f"{out.absolute()}:/models:ro")
    command = f'docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -v {mount} "$TRITON_IMAGE" tritonserver'
    return "", f"{command} --model-repository=/models{options(model)}"


def options(model: Model) -> str:
    """What tritonserver has to be told beside the repository, with a blank before it."""
    compatible = model.manifest.runtime.get("version_compatible", False)
    return " --backend-config=tensorrt,version-compatible=true" if compatible else ""


def check(model: Model) -> None:
    """Raise ModelError for a format or an engine that Triton does not load."""
    if model.manifest.format == "hf":
        raise ModelError(f"{model.ref} is an hf model, and Triton runs graphs and engines. Put export.onnx after it.")
    if model.manifest.format != "tensorrt":
        if any(stage.technique == "quantize.bf16" for stage in model.manifest.history):
            raise ModelError(
                f"{model.ref} is kept in bfloat16, which ONNX Runtime multiplies on no processor. "
                "Package an engine built of it, or what quantize.fp16 makes."
            )
        return
    record = engine.read(model.path)
    if record.runtime == "tensorrt_rtx":
        raise ModelError(
            f"{model.ref} was built by {record.built_by}, whose engines Triton does not load. "
            "Build it with export.tensorrt and runtime=tensorrt, or package the ONNX model that it was built from."
        )
    if record.stripped:
        raise ModelError(f"{model.ref} is an engine without its weights. Build it with export.tensorrt, not stripped.")


def signature(model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Inputs, the one output that is read, and how many texts a request may hold."""
    batch = serve.batch_size(model.manifest)
    if model.manifest.format == "tensorrt":
        record = engine.read(model.path)
        batch = min(batch, max(profile["input_ids"].max[0] for profile in record.profiles))
        inputs, outputs = record.inputs, record.outputs
    else:
        inputs, outputs = from_graph(model.path / graph.FILE)
    if unknown := sorted(inputs.keys() - set(hf.INPUTS)):
        raise ModelError(f"{model.ref} asks for the input {unknown[0]!r}, which no text has. Export it again.")
    output = "logits" if "logits" in outputs else next(iter(outputs))
    found = {name: tensor(model, name, value) for name, value in {**inputs, output: outputs[output]}.items()}
    return {name: found[name] for name in inputs}, {output: found[output]}, batch


def from_graph(file: Path) -> tuple[dict[str, engine.Tensor], dict[str, engine.Tensor]]:
    """Type and shape of what goes into an ONNX graph and comes out, in the words of an engine's record."""
    import onnx

    model = graph.read(file)
    kinds = {onnx.TensorProto.FLOAT16: "half"}
    weights = {weight.name for weight in model.graph.initializer}

    def read(values: Any) -> dict[str, engine.Tensor]:
        found = {}
        for value in (v for v in values if v.name not in weights):  # old graphs list their weights as inputs
            typed = value.type.tensor_type
            kind = kinds.get(typed.elem_type) or onnx.TensorProto.DataType.Name(typed.elem_type).lower()
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in typed.shape.dim)
            found[value.name] = engine.Tensor(dtype=kind, shape=shape)
        return found

    return read(model.graph.input), read(model.graph.output)


def tensor(model: Model, name: str, found: engine.Tensor) -> Tensor:
    """As Triton says it. Raises ModelError for a type it has not here, or a fixed number of texts."""
    if found.dtype not in TYPES:
        raise ModelError(
            f"{name} of {model.ref} is {found.dtype}, which Triton's Python steps cannot hold. Export it with one of "
            f"{', '.join(TYPES)}."
        )
    if len(found.shape) != 2 or found.shape[0] != -1:
        raise ModelError(f"{name} of {model.ref} is fixed at {found.shape}. Export it with an open batch: export.onnx.")
    return Tensor(TYPES[found.dtype], list(found.shape[1:]))


def steps(model: Model, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[Step, Step, Step, Step]:
    """The entry, and the three steps in their order."""
    text = {"text": Tensor("TYPE_STRING", [1])}
    answer = {"label": Tensor("TYPE_STRING", [1]), "score": Tensor("TYPE_FP32", [1])}
    name, runs_in, gpu = model.name, "onnxruntime_onnx", ""
    if model.manifest.format == "tensorrt":
        runs_in = "tensorrt_plan"
        numbers = ", ".join(f'"{index}"' for index in range(len(engine.read(model.path).profiles)))
        gpu = f"kind: KIND_GPU count: 1 profile: [ {numbers} ]"
    one = "kind: KIND_CPU count: 1"
    return (
        Step(name, "platform", "ensemble", text, answer),
        Step(f"{name}_tokenizer", "backend", "python", text, inputs, one),
        Step(f"{name}_model", "platform", runs_in, inputs, outputs, gpu, joins=True),
        Step(f"{name}_labels", "backend", "python", outputs, answer, one),
    )


def write_tokenizer(model: Model, folder: Path) -> None:
    """The first step: its code, tokenizer.json, and the library that reads it."""
    limit = hf.max_length(model.path)
    text = fill("tokenizer.py.j2", max_length=limit, pad=hf.tokenizer(model.path, limit).pad)
    (folder / "model.py").write_text(text, encoding="utf-8")
    copy(model, ["tokenizer.json"], folder)
    found = importlib.util.find_spec("tokenizers")
    library = Path(str(found.origin)).parent if found else Path()
    if not list(library.glob("*.abi3.so")):  # one for all Pythons from some version on
        raise ConfigError(
            f"the tokenizers library in {library} is built for one Python only, not for Triton's. "
            "Install PyPI's own: pip install --force-reinstall tokenizers."
        )
    shutil.copytree(library, folder / "tokenizers", ignore=shutil.ignore_patterns("__pycache__", "*.pyi", "py.typed"))


def write_model(model: Model, folder: Path) -> None:
    """The graph with the weights beside it, or the engine under Triton's name."""
    if model.manifest.format == "tensorrt":
        shutil.copyfile(model.path / engine.FILE, folder / "model.plan")
    else:
        copy(model, (name for name in model.manifest.files if Path(name).suffix not in BESIDE), folder)


def fill(template: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "quoted": lambda text: json.dumps(text, ensure_ascii=False),
        "oneline": lambda text: " ".join(text.split()),
    }
    text = (resources.files("slimline.package") / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)
