"""Precision, written into an ONNX graph: float types, and Q/DQ pairs around what is multiplied in 8 or 4 bits.

A strongly typed runtime (TensorRT) rounds nothing by itself: the graph says what every number is kept in. A number x
stands for round(x / scale), DequantizeLinear makes scale times that of it again, and the runtime multiplies what lies
between the two. Zero points are 0, as TensorRT needs. Scales are of the float type that the rest works in, and are
rounded to it before numbers are, so that nothing is rounded twice.

Ours, since ONNX Runtime's converter knows no bfloat16, its quantizer scales fp8 by a spread instead of the largest
number, and NVIDIA's ModelOpt asks for CUDA.

Shapes: K = rows of a matrix, which are summed over; N = columns, its outputs; G = groups of neighbouring rows.
"""

# Long because types, casts, weights and activations are edits of one graph, which has to stay in order.
from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from slimline import graph
from slimline.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, np.dtype[Any]]
Float = Literal["fp32", "fp16"]
"""What a quantized graph's other numbers may be kept in, and run on any processor."""

OPSET = 21
"""The first version of ONNX's operators with 4-bit numbers and with scales in half precision."""
CLIPS = np.linspace(1.0, 0.6, 17)
"""How much of a group's largest weight a 4-bit scale may cover."""
INDEXES = ("Range",)
"""Operators that count, and so stay in float32 where they do not count in whole numbers."""


class Kind(NamedTuple):
    """A type of numbers: ONNX's number for it, numpy's name, and the largest one."""

    onnx: int
    dtype: str
    largest: float

    @property
    def numpy(self) -> np.dtype[Any]:
        """The type itself, from ml_dtypes where numpy has none."""
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))


KINDS = {
    "fp32": Kind(1, "float32", 3.4028235e38),
    "fp16": Kind(10, "float16", 65504.0),
    "bf16": Kind(16, "bfloat16", 3.3895314e38),
    "int8": Kind(3, "int8", 127.0),
    "fp8": Kind(17, "float8_e4m3fn", 448.0),
    "int4": Kind(22, "int4", 7.0),
}


def plain(source: Path) -> onnx.ModelProto:
    """The float32 graph in a folder, in operators of OPSET. Raises ModelError for a fused or quantized one."""
    model = graph.read(source / graph.FILE)
    graph.require_floats(model, source)
    graph.require_plain(model, source)
    name_shared(model)
    return upgrade(model)


def name_shared(model: onnx.ModelProto) -> None:
    """Let nodes name a constant itself where they named a copy: the exporter shares equal weights by Identity.

    A matrix behind an Identity would count as an activation.
    """
    ends = {value.name for value in model.graph.output}
    copies: dict[str, str] = {tensor.name: tensor.name for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = copies.get(name, name)
        if node.op_type == "Identity" and node.input[0] in copies and node.output[0] not in ends:
            copies[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    graph.replace(model, kept)


def upgrade(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in operators of OPSET, or as it is if it is later. Raises ModelError where one has no such form."""
    from onnx import version_converter

    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version < OPSET:
        try:
            model = graph.converted(model, lambda light: version_converter.convert_version(light, OPSET))
        except (RuntimeError, version_converter.ConvertError) as error:
            reason = str(error).strip().split("\n")[0].rpartition("failed: ")[2]  # before it, a line of C++
            raise ModelError(
                f"the graph (opset {version}) does not become opset {OPSET}: {reason}. Export it again."
            ) from None
    model.ir_version = max(model.ir_version, 10)
    return model


def matrices(model: onnx.ModelProto, keep: Collection[str], block: int = 1) -> dict[str, list[str]]:
    """The products with a constant matrix [K, N] whose rows blocks fill, but for names that hold a part in `keep`.

    By the name of what a product makes, since nodes are copied whenever a graph is edited: the names of its operands.
    Heads are not among them: a pooler's or classifier's Gemm sees one token of each text and decides the answer.
    Raises ModelError if there are none, ConfigError for a part in `keep` that no product's name holds.
    """
    names = [node.name for node in _products(model, ())]
    if unknown := [part for part in keep if not any(part in name for name in names)]:
        such = f"They are called such as {names[0]}" if names else "It has none"
        raise ConfigError(f"keep names {unknown[0]!r}, but no product of this graph is called so. {such}.")
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    known = [node for node in _products(model, keep) if node.input[1] in rows]
    found = {node.output[0]: list(node.input) for node in known if rows[node.input[1]] % block == 0}
    if not found:
        few = (
            f"blocks of {block} rows fill none of its {len(known)} matrices: ask for smaller ones"
            if known
            else ("it multiplies with no matrix that may be quantized: name fewer in `keep`")
        )
        raise ModelError(f"nothing of this graph can be quantized, since {few}.")
    return found


def mixings(model: onnx.ModelProto, keep: Collection[str]) -> dict[str, list[str]]:
    """The products of two activations, as in attention, but for those whose name holds a part in `keep`."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return {node.output[0]: list(node.input) for node in _products(model, keep) if not constant & set(node.input)}


def entering(weighed: Mapping[str, Sequence[str]], mixed: Mapping[str, Sequence[str]]) -> list[str]:
    """The activations that go into these products."""
    return [operands[0] for operands in weighed.values()] + [name for pair in mixed.values() for name in pair]


def quantize_weights(
    model: onnx.ModelProto, products: Collection[str], kind: str, floats: Float, block: int = 0
) -> None:
    """Keep these products' matrices in int8 (a scale a column), fp8 (one scale) or int4 (one for `block` rows)."""
    import onnx

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    done: dict[str, str] = {}
    before: dict[str, list[onnx.NodeProto]] = {}
    for node in (node for node in model.graph.node if node.output[0] in products):
        name = node.input[1]
        if name not in done:
            weight_KN = onnx.numpy_helper.to_array(tensors[name])
            numbers, scale, how = rounded(weight_KN, kind, floats, block)
            done[name] = f"{name}_restored"
            model.graph.initializer.extend(
                [
                    onnx.numpy_helper.from_array(numbers.astype(KINDS[kind].numpy), f"{name}_{kind}"),
                    onnx.numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"),
                ]
            )
            parts = [f"{name}_{kind}", f"{name}_scale"]
            before[node.output[0]] = [
                onnx.helper.make_node(
                    "DequantizeLinear", parts, [done[name]], f"{node.name}/weight/DequantizeLinear", **how
                )
            ]
        node.input[1] = done[name]
    _insert(model, before)
    _drop_unused(model, done)


def quantize_activations(
    model: onnx.ModelProto, products: Collection[str], largest: Mapping[str, float], kind: str, floats: Float
) -> None:
    """Round what goes into these products to int8 or fp8, one scale a tensor: `largest` / the kind's largest."""
    import onnx

    zero = f"zero_{kind}"
    model.graph.initializer.append(onnx.helper.make_tensor(zero, KINDS[kind].onnx, [], [0]))
    before: dict[str, list[onnx.NodeProto]] = {}
    done: dict[str, str] = {}
    for node in (node for node in model.graph.node if node.output[0] in products):
        for at, name in enumerate(node.input):
            if name not in largest:
                continue
            if name not in done:
                scale, low, done[name] = f"{name}_step", f"{name}_{kind}", f"{name}_rounded"
                step = scale_for(np.float32(largest[name]), kind, floats)
                model.graph.initializer.append(onnx.numpy_helper.from_array(step, scale))
                before.setdefault(node.output[0], []).extend(_rounding_pair(name, scale, zero, low, done[name]))
            node.input[at] = done[name]
    _insert(model, before)


def scale_for(largest: Any, kind: str, floats: Float) -> Array:
    """The least scale of this float type by which numbers up to `largest` fit; 1 where all are (nearly) 0."""
    scale = np.asarray(largest, dtype=np.float32) / np.float32(KINDS[kind].largest)
    if floats == "fp16":
        half = scale.astype(np.float16)
        half = np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)
        scale = half.astype(np.float32)
    least = np.finfo(np.float32).tiny  # below it, float32 itself rounds
    return np.where(scale >= least, scale, np.float32(1)).astype(np.float32)


def rounded(weight_KN: Array, kind: str, floats: Float, block: int) -> tuple[Array, Array, dict[str, Any]]:
    """Numbers, scales, and how DequantizeLinear lays the scales along the matrix."""
    if kind == "int8":
        return *rounded_columns(weight_KN, floats), {"axis": 1}
    if kind == "fp8":
        return *rounded_whole(weight_KN, floats), {}
    return *rounded_blocks(weight_KN, block, floats), {"axis": 0, "block_size": block}


def rounded_columns(weight_KN: Array, floats: Float) -> tuple[Array, Array]:
    """Whole numbers from -127 to 127 [K, N], and a scale for each column [N]."""
    scale_N = scale_for(np.abs(weight_KN).max(axis=0), "int8", floats)
    return np.clip(np.rint(weight_KN / scale_N), -127, 127), scale_N


def rounded_whole(weight_KN: Array, floats: Float) -> tuple[Array, Array]:
    """Numbers from -448 to 448 [K, N], and their one scale []; what is left is for fp8 to round."""
    scale = scale_for(np.abs(weight_KN).max(), "fp8", floats)
    return np.clip(weight_KN / scale, -448, 448), scale


def rounded_blocks(weight_KN: Array, block: int, floats: Float) -> tuple[Array, Array]:
    """Whole numbers from -8 to 7 [K, N], and a scale for each block of rows of each column [G, N].

    Of CLIPS, each scale is the one with the least squared error: cutting off a block's largest weight makes all others
    finer. Blocks have to fill the rows.
    """
    rows, columns = weight_KN.shape
    weight_GBN = weight_KN.reshape(rows // block, block, columns)
    largest_GN = np.abs(weight_GBN).max(axis=1)
    best_GBN, best_GN = np.zeros_like(weight_GBN), np.ones_like(largest_GN)
    least_GN = np.full_like(largest_GN, np.inf)
    for clip in CLIPS:
        scale_GN = scale_for(largest_GN * clip, "int4", floats)
        numbers_GBN = np.clip(np.rint(weight_GBN / scale_GN[:, None]), -8, 7)
        error_GN = np.square(numbers_GBN * scale_GN[:, None] - weight_GBN).sum(axis=1)
        better_GN = error_GN < least_GN
        best_GBN = np.where(better_GN[:, None], numbers_GBN, best_GBN)
        best_GN, least_GN = np.where(better_GN, scale_GN, best_GN), np.minimum(error_GN, least_GN)
    return best_GBN.reshape(rows, columns), best_GN


def lower(model: onnx.ModelProto, kind: str, keep: Collection[str] = ()) -> None:
    """Turn the float32 numbers of a graph into fp16 or bf16, in place; its inputs and outputs stay what they are.

    Operators of the kinds in `keep` work in float32 between casts, as those do that count (INDEXES). A number beyond
    the type's range becomes its largest: masks add the least of all float32, which would be infinite. Raises
    ModelError for a graph within the graph, ConfigError for a kind in `keep` that the graph has not.
    """
    kinds = graph.count(model)
    if unknown := [name for name in keep if name not in kinds]:
        raise ConfigError(f"keep names {unknown[0]!r}, but this graph has only {', '.join(sorted(kinds))}. Name those.")
    if kind == "fp32":
        return
    types = _types(model)
    kept = {n.output[0] for n in model.graph.node if n.op_type in (*keep, *INDEXES)}
    users = graph.users(model)
    for tensor in model.graph.initializer:
        if tensor.data_type != KINDS["fp32"].onnx:
            continue
        if {n.output[0] for n in users.get(tensor.name, [])} <= kept:
            types.pop(tensor.name)  # float32, for those who want it so
        else:
            tensor.CopyFrom(_converted(tensor, kind))
    for node in model.graph.node:
        _convert_attributes(node, kind)
    floats = {name for name, number in types.items() if number == KINDS["fp32"].onnx}
    _cast_around(model, kept, floats, kind)
    _cast_ends(model, kind)


def rounding_twin(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """What a lowered graph computes, in float32 with every number rounded as `kind` keeps it.

    For types that no processor multiplies in: products are summed in float32, as on a GPU.
    """
    twin = graph.copied(model)
    low, types = KINDS[kind].onnx, _types(model)
    for tensor in twin.graph.initializer:
        if tensor.data_type == low:
            tensor.CopyFrom(_converted(tensor, "fp32"))
    nodes = []
    for node in twin.graph.node:
        _convert_attributes(node, "fp32", low)
        nodes.append(node)
        for at, name in enumerate(node.output):
            if types.get(name) == low:
                node.output[at] = f"{name}_exact"
                nodes += _cast_pair(f"{name}_exact", name, kind)
    graph.replace(twin, nodes)
    return twin


def _products(model: onnx.ModelProto, keep: Collection[str]) -> Iterable[onnx.NodeProto]:
    ends = {value.name for value in model.graph.output}
    for node in model.graph.node:
        wanted = node.op_type == "MatMul" and not ends & set(node.output)
        if wanted and not any(part in node.name for part in keep):
            yield node


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's number of the type of every tensor. A fused operator's first output counts as float32."""
    import onnx

    for node in model.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ModelError(
                f"the {node.op_type} node {node.name!r} holds a graph of its own. Export without branches."
            )
    inferred = graph.converted(model, onnx.shape_inference.infer_shapes).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        types.setdefault(node.output[0], KINDS["fp32"].onnx)
    return types


def _converted(tensor: onnx.TensorProto, kind: str) -> onnx.TensorProto:
    """The same numbers in another float type, none of them infinite."""
    import onnx

    values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    largest = np.float32(KINDS[kind].largest)
    return onnx.numpy_helper.from_array(np.clip(values, -largest, largest).astype(KINDS[kind].numpy), tensor.name)


def _convert_attributes(node: onnx.NodeProto, kind: str, old: int = 1) -> None:
    """Change the type of a node that says its own: Constant, ConstantOfShape and Cast."""
    for attribute in node.attribute:
        if node.op_type in ("Constant", "ConstantOfShape") and attribute.t.data_type == old:
            attribute.t.CopyFrom(_converted(attribute.t, kind))
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == old:
            attribute.i = KINDS[kind].onnx
    if node.op_type == "ConstantOfShape" and not node.attribute and old == KINDS["fp32"].onnx:
        import onnx

        value = onnx.helper.make_tensor("value", KINDS[kind].onnx, [1], [0.0])
        node.attribute.append(onnx.helper.make_attribute("value", value))


def _cast_around(model: onnx.ModelProto, kept: Collection[str], floats: Collection[str], kind: str) -> None:
    """Give these nodes float32, and what they make the others' type."""
    whole: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.output[0] not in kept:
            nodes.append(node)
            continue
        for at, name in enumerate(node.input):
            if name in floats:
                if name not in whole:
                    whole[name] = f"{name}_fp32"
                    nodes.append(_cast(name, whole[name], "fp32"))
                node.input[at] = whole[name]
        nodes.append(node)
        for at, name in enumerate(node.output):
            if name in floats:
                node.output[at] = f"{name}_made"
                nodes.append(_cast(f"{name}_made", name, kind))
    graph.replace(model, nodes)


def _cast_ends(model: onnx.ModelProto, kind: str) -> None:
    """Casts behind float32 inputs and before float32 outputs."""

    def is_float(value: Any) -> bool:
        return bool(value.type.tensor_type.elem_type == KINDS["fp32"].onnx)

    enter = {value.name: f"{value.name}_{kind}" for value in model.graph.input if is_float(value)}
    leave = {value.name: f"{value.name}_{kind}" for value in model.graph.output if is_float(value)}
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = enter.get(name) or leave.get(name, name)
        for at, name in enumerate(node.output):
            node.output[at] = leave.get(name, name)
    first = [_cast(name, low, kind) for name, low in enter.items()]
    last = [_cast(low, name, "fp32") for name, low in leave.items()]
    graph.replace(model, [*first, *model.graph.node, *last])


def _rounding_pair(name: str, scale: str, zero: str, low: str, out: str) -> list[onnx.NodeProto]:
    import onnx

    return [
        onnx.helper.make_node("QuantizeLinear", [name, scale, zero], [low], f"{name}/QuantizeLinear"),
        onnx.helper.make_node("DequantizeLinear", [low, scale, zero], [out], f"{name}/DequantizeLinear"),
    ]


def _cast(source: str, out: str, kind: str) -> onnx.NodeProto:
    import onnx

    return onnx.helper.make_node("Cast", [source], [out], f"{source}/{out}/Cast", to=KINDS[kind].onnx)


def _cast_pair(source: str, out: str, kind: str) -> list[onnx.NodeProto]:
    return [_cast(source, f"{out}_{kind}", kind), _cast(f"{out}_{kind}", out, "fp32")]


def _insert(model: onnx.ModelProto, before: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Put new nodes before others, which are known by their first output."""
    graph.replace(model, [new for node in model.graph.node for new in (*before.get(node.output[0], ()), node)])


def _drop_unused(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Remove initializers that nothing reads any more."""
    used = graph.users(model)
    for tensor in [t for t in model.graph.initializer if t.name in set(names) and t.name not in used]:
        model.graph.initializer.remove(tensor)
