"""ONNX graphs: read safely, write the same bytes twice, count, and move work that nobody needs.

Shapes: B = texts, S = tokens, H = width.
"""

# Long because moving the head's pick up to the attention needs to know every operator that it passes.
from __future__ import annotations

import logging
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from slimline.artifact import MANIFEST
from slimline.errors import ModelError

if TYPE_CHECKING:
    import onnx

FILE = "model.onnx"
DATA = f"{FILE}.data"
"""Where the weights are that the file cannot hold."""
LARGEST = 2**31 - 2**20
"""Bytes of a file with everything inside: protobuf's limit, and some room."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph's own file."""
PAGE_BYTES = 4096
"""Where tensors begin in the file of weights, so that they can be mapped into memory."""
QUANTIZED = frozenset(
    {
        "QAttention",
        "QEmbedLayerNormalization",
        "MatMulInteger",
        "MatMulNBits",
        "QLinearMatMul",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QuantizeLinear",
        "DequantizeLinear",
    }
)
"""Operators that only a quantized graph has."""

PER_TOKEN = {
    "MatMul": (0,), "BiasGelu": (0,), "Gelu": (0,), "SkipLayerNormalization": (0, 1), "LayerNormalization": (0,),
    "Erf": (0,), "Add": (0, 1), "Mul": (0, 1), "Div": (0, 1),
}  # fmt: skip
"""Operators that treat every token alone, and which of their inputs [B, S, H] run over tokens if not constant."""

LAYER = re.compile(r"(?:^|[./])(?:layers?|h|blocks?)[./](\d+)(?=[./]|$)")
"""The number of a layer in the name of a node or a weight, such as /encoder/layer.3/output/dense/MatMul."""


def read(file: Path) -> onnx.ModelProto:
    """The graph with its weights. Raises ModelError for a broken file or weights kept outside its folder."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, OSError):
        raise ModelError(f"{file} is not a readable ONNX file. Run export.onnx again.") from None
    for tensor in _tensors(model.graph):
        if onnx.external_data_helper.uses_external_data(tensor):
            _check_contained(file, tensor)
    try:
        onnx.load_external_data_for_model(model, str(file.parent))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} lacks weights that it keeps beside it: {error}. Copy the whole folder.") from None
    return model


def write(model: onnx.ModelProto, file: Path) -> None:
    """One file with the weights inside, or beside it where that would be too large; equal graphs give equal bytes."""
    import onnx

    model.doc_string, model.graph.doc_string, model.graph.name = "", "", "slimline"
    del model.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.value_info[:]  # inner shapes: stale after a rewrite, and the runtime infers them
    _save(model, file)
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        for written in (file, file.parent / DATA):
            written.unlink(missing_ok=True)
        reason = " ".join(str(error).split())
        raise ModelError(f"the graph for {file.parent} is not valid ONNX: {reason} Export it again.") from None


def _save(model: onnx.ModelProto, file: Path) -> None:
    beside = file.parent / DATA
    if not too_large(model):
        beside.unlink(missing_ok=True)  # of a larger graph that was here before
        file.write_bytes(model.SerializeToString(deterministic=True))
        return
    with _light(model) as weights:
        with beside.open("wb") as handle:
            for tensor in (tensor for tensor in model.graph.initializer if tensor.name in weights):
                put_beside(tensor, weights[tensor.name], handle)
        file.write_bytes(model.SerializeToString(deterministic=True))


def too_large(model: onnx.ModelProto) -> bool:
    """Whether a graph is more than one file, or one message between libraries, can hold."""
    return int(model.ByteSize()) > LARGEST


def converted(model: onnx.ModelProto, convert: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """What code in C++ makes of a graph; one that is too large for it goes there without its large tensors' bytes."""
    if not too_large(model):
        return convert(model)
    with _light(model) as weights:
        made = convert(model)
    _give_back(made, weights)
    return made


@contextmanager
def _light(model: onnx.ModelProto) -> Iterator[dict[str, bytes]]:
    """The bytes of the graph's large tensors by name, which it lacks meanwhile."""
    weights = {t.name: t.raw_data for t in model.graph.initializer if len(t.raw_data) > INLINE_BYTES}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("raw_data")
    try:
        yield weights
    finally:
        _give_back(model, weights)


def _give_back(model: onnx.ModelProto, weights: dict[str, bytes]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = weights[tensor.name]


def put_beside(tensor: onnx.TensorProto, values: bytes | memoryview, handle: BinaryIO) -> None:
    """Write a tensor's bytes to the file of weights, which is named DATA, and say in the tensor where they are."""
    handle.write(b"\0" * (-handle.tell() % PAGE_BYTES))
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", DATA), ("offset", handle.tell()), ("length", len(values))):
        tensor.external_data.add(key=key, value=str(value))
    handle.write(values)


def session(model: Path | onnx.ModelProto, options: Any) -> Any:
    """ONNX Runtime's session for a graph, or for one in a file, on the processor."""
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if isinstance(model, Path):
        return onnxruntime.InferenceSession(str(model), options, providers=providers)
    if not too_large(model):
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as place:  # what a session has opened it keeps
        _save(model, Path(place) / FILE)
        return onnxruntime.InferenceSession(str(Path(place) / FILE), options, providers=providers)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph again, to be changed."""
    import onnx

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    return twin


def size_bytes(folder: Path) -> float:
    """Of a folder's graph and the weights beside it."""
    return float(sum((folder / name).stat().st_size for name in (FILE, DATA) if (folder / name).is_file()))


def copy_rest(source: Path, out: Path) -> None:
    """The tokenizer and the settings that lie beside a graph; the manifest is the step's to write."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt") and file.name != MANIFEST:
            shutil.copyfile(file, out / file.name)


def require_floats(model: onnx.ModelProto, source: Path) -> None:
    """Raise ModelError for a graph that is quantized already, or kept in half precision."""
    if already := QUANTIZED & count(model).keys():
        raise ModelError(f"{source} is quantized already ({', '.join(sorted(already))}). Quantize once.")
    if not any(tensor.data_type == tensor.FLOAT for tensor in model.graph.initializer):
        raise ModelError(f"{source} holds no float32 weights. Start from what export.onnx wrote.")


def require_plain(model: onnx.ModelProto, source: Path) -> None:
    """Raise ModelError for a fused graph: what is inside a fused node can be given no type of its own."""
    fused = next((node for node in model.graph.node if node.domain not in ("", "ai.onnx")), None)
    if fused is not None:
        raise ModelError(
            f"{source} has fused nodes ({fused.op_type}), whose insides cannot be typed. "
            "Export it without fusions: export.onnx with fuse=False."
        )


def count(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each kind."""
    return Counter(node.op_type for node in model.graph.node)


def place(node: onnx.NodeProto) -> str:
    """Where in the model a node comes from: 'layer 3', else the module that its names speak of, else ''."""
    names = [node.name, *node.output, *node.input]
    for name in names:
        if found := LAYER.search(name):
            return f"layer {found.group(1)}"
    paths = [name.strip("/").replace("/", ".").removeprefix("source.").split(".") for name in names]
    return next((".".join(path[:-1]) for path in paths if len(path) > 1), "")


def set_heads(model: onnx.ModelProto, head_width: int) -> None:
    """Give every fused Attention its own number of heads, which differs by layer after pruning."""
    width = {tensor.name: tensor.dims[1] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    for node in model.graph.node:
        if node.op_type == "Attention":
            heads = next(a for a in node.attribute if a.name == "num_heads")
            heads.i = width[node.input[1]] // 3 // head_width  # q, k and v lie side by side


def first_token_only(model: onnx.ModelProto) -> int:
    """Let the last layer work on the one token that the head reads: same numbers, less to compute.

    A classification head takes token 0 of [B, S, H]. What stands before it and treats tokens one by one (the
    last layer's output projection and feed-forward) need not see the rest: the pick moves up to the attention. Fused
    or not, it is the same tokens.
    Returns how many nodes now work on one token; 0 where the pattern is not there.
    """
    import numpy as np
    import onnx

    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    readers = users(model)
    picks = [node for node in graph.node if _picks_first_token(node, model)]
    if len(picks) != 1:
        return 0
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # and what is computed of them alone: the exporter shares equal biases by Identity
        if constants.issuperset(node.input):
            constants.update(node.output)
    cone, edge = _per_token_cone(picks[0], producer, readers, constants)
    if not cone:
        return 0
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), "first_token"))
    moved = {id(node) for node in cone}
    nodes = []
    for node in graph.node:
        if id(node) in moved:
            for index, name in enumerate(node.input):
                node.input[index] = edge.get(name, name)
        nodes.append(node)
        nodes += [
            onnx.helper.make_node("Gather", [name, "first_token"], [edge[name]], f"{edge[name]}_pick", axis=1)
            for name in node.output
            if name in edge
        ]
    replace(model, nodes)
    return len(cone)


def users(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, by its name."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def replace(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Put copies of these nodes in the place of all that the graph has."""
    import onnx

    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporter, optimizer and quantizer say about traces, deprecations and shapes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _per_token_cone(
    pick: onnx.NodeProto,
    producer: dict[str, onnx.NodeProto],
    users: dict[str, list[onnx.NodeProto]],
    constants: Collection[str],
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """The per-token nodes that only `pick` depends on, and new names for what enters them."""
    inside = {id(pick)}
    cone: list[onnx.NodeProto] = []
    while True:  # a residual is used twice: a node may qualify only after its other user did
        grown, edge, pending = False, {}, [pick.input[0]]
        while pending:
            name = pending.pop()
            node = producer.get(name)
            if node is None or name in edge or name in constants:
                continue
            fits = node.op_type in PER_TOKEN and len([o for o in node.output if o]) == 1
            fits = fits and (node.op_type != "MatMul" or node.input[1] in constants)  # not queries with keys
            if fits and all(id(user) in inside for user in users[name]):
                if id(node) not in inside:
                    inside.add(id(node))
                    cone.append(node)
                    grown = True
                pending += [node.input[index] for index in PER_TOKEN[node.op_type]]
            else:
                edge[name] = f"{name}_first"
        if not grown:
            return cone, edge


def _picks_first_token(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether the node is Gather(axis=1, index 0) of hidden states."""
    import onnx

    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if node.op_type != "Gather" or axis != 1:
        return False
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for other in model.graph.node:
        if other.op_type == "Constant" and other.attribute[0].name == "value":
            values[other.output[0]] = other.attribute[0].t
    index = values.get(node.input[1])
    return index is not None and onnx.numpy_helper.to_array(index).tolist() == 0


def _tensors(graph: onnx.GraphProto) -> Iterable[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _tensors(inner)


def _check_contained(file: Path, tensor: onnx.TensorProto) -> None:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    target = file.parent / location
    inside = target.resolve().is_relative_to(file.parent.resolve())
    if not location or not inside or target.is_symlink() or not target.is_file():
        raise ModelError(
            f"{file} keeps weights in {location!r}, which is no plain file of its folder. "
            "Put the weights into the file itself."
        )
