"""The graph that ONNX Runtime GenAI's builder makes of floats, with whole numbers put in their place.

The weights stay on disk, where they are read from and written to a tensor at a time. Which rows of which packed matrix
a node multiplies with is read off the floats themselves, since the builder joins some matrices and splits others.

A matrix of whole numbers becomes a MatMulNBits, which takes floats. One whose inputs are to be int8, too, becomes a
MatMulIntegerToFloat behind what rounds them, and multiplies as processors do best: with AMX these products
take a sixth of the time. Behind a prompt only the last token's logits are asked for, and the head is a fifth of a small
model's work: it is given that token alone, unless the input `logits_to_keep` says otherwise.

Shapes: O = outputs, I = inputs, V = vocabulary, W = width, B = texts, T = tokens.
"""

# Long because a node is found, its numbers are told apart and another is put in its place with the same names.
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slimline import activations, graph, grid, nbits
from slimline.decoder import Family
from slimline.errors import ConfigError, ModelError
from slimline.language import KEPT
from slimline.nbits import Array, Blocked
from slimline.packed import INPUT_SCALE, Integers, Scheme
from slimline.shards import Weights
from slimline.technique import track

if TYPE_CHECKING:
    import onnx
    import torch

    Choose = Callable[[torch.Tensor, Scheme], Integers]
    """(rows [R, W] of a table, how they are stored) -> the numbers that they become."""

ROWS = 8192
"""Rows of a table that are rounded at once."""
TINY = 1e-30
"""The least scale of a token, so that one whose values are all 0 has one."""


class Part(NamedTuple):
    """A matrix of whole numbers, and what becomes of its inputs."""

    matrix: Blocked
    inputs: Inputs | None


class Inputs(NamedTuple):
    """Inputs that are rounded to int8."""

    scale: float | None
    """Of all of them, or None for one for each token, found while running."""


class Rewriting:
    """A built graph while its floats are replaced. `write` leaves the finished one; the built one is not touched."""

    def __init__(self, built: Path, accuracy_level: int) -> None:
        import onnx

        self.built, self.accuracy_level = built, accuracy_level
        self.model = onnx.load(str(built / graph.FILE), load_external_data=False)
        self.found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.new: dict[str, Array] = {}
        self.nodes = list(self.model.graph.node)
        self.rounded: dict[str, Inputs] = {}
        """Which inputs are there as whole numbers, too: maps that read the same do not round them again."""

    def array(self, name: str) -> Array:
        """One of the built graph's tensors, mapped and not read."""
        import onnx

        tensor = self.found[name]
        if not onnx.external_data_helper.uses_external_data(tensor):
            inside: Array = onnx.numpy_helper.to_array(tensor)
            return inside
        place = {entry.key: entry.value for entry in tensor.external_data}
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file, offset = self.built / place["location"], int(place.get("offset", 0))
        return np.memmap(file, dtype=kind, mode="r", offset=offset, shape=tuple(tensor.dims))

    def take_integers(self, weights: Weights, kind: Family, settings: dict[str, Any]) -> int:
        """Put every matrix that is stored as whole numbers into the graph as those. Returns how many there were.

        `settings` is the source's quantization_config. Raises ModelError unless each of their rows is found in the
        graph, once.
        """
        layers: dict[int, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            layer = graph.LAYER.search(node.name)
            if layer and node.op_type == "MatMul" and node.input[1] in self.found:
                layers.setdefault(int(layer.group(1)), []).append(node)
        taken = 0
        for i in track(sorted(layers), "placing whole numbers"):
            parts = _packed(weights, f"{kind.layers}.{i}", settings)
            if parts:
                self._take_layer(parts, layers[i], i)
            taken += len(parts)
            weights.close()
        return taken

    def _take_layer(self, parts: list[Part], nodes: list[onnx.NodeProto], layer: int) -> None:
        kind = self.array(nodes[0].input[1]).dtype
        free: dict[bytes, list[tuple[int, int]]] = {}
        for number, part in enumerate(parts):
            for row, values_I in enumerate(part.matrix.floats().astype(kind)):
                free.setdefault(_digest(values_I), []).append((number, row))
        for node in nodes:
            weight_OI = np.ascontiguousarray(self.array(node.input[1]).T)
            rows: list[tuple[int, int]] = []
            for values_I in weight_OI:
                if same := free.get(_digest(values_I)):
                    following = (rows[-1][0], rows[-1][1] + 1) if rows else same[0]
                    rows.append(same.pop(same.index(following) if following in same else 0))
            if not rows:
                continue  # a matrix that the source keeps as floats
            if len(rows) != len(weight_OI):
                raise ModelError(f"{node.name} of the built graph is only partly the source's. {AGAIN}")
            self._place(node, parts, rows)
        if left := sum(map(len, free.values())):
            raise ModelError(f"{left} rows of layer {layer}'s matrices are not in the built graph. {AGAIN}")

    def _place(self, node: onnx.NodeProto, parts: list[Part], rows: list[tuple[int, int]]) -> None:
        """Make the node multiply with these rows of these parts."""
        floats_IO = self.array(node.input[1])
        used = sorted({number for number, _ in rows})
        matrix = nbits.joined([parts[n].matrix for n in used], [(used.index(n), row) for n, row in rows])
        if not np.array_equal(matrix.floats().astype(floats_IO.dtype), floats_IO.T):
            raise ModelError(f"{node.name} of the built graph is only nearly the source's. {AGAIN}")
        inputs = {parts[n].inputs for n in used} | {self.rounded.get(node.input[0], parts[used[0]].inputs)}
        if len(inputs) > 1:
            raise ModelError(f"{node.name} reads inputs that are rounded in several ways. Give them one scale.")
        if rounded := inputs.pop():
            self._multiply_rounded(node, matrix, rounded)
        else:
            self._multiply(node, nbits.quick(matrix, self.accuracy_level), floats_IO.dtype)

    def round_tables(self, bits: int, choose: Choose | None = None) -> dict[str, Array]:
        """Round the head to so many bits, the embedding to 8. Returns `head` and `embedding` as they are then, float32.

        A head of 8 bits is the embedding, too, if they are tied. `choose` rounds rows of the head, if it is given.
        """
        head = self._only(HEAD, "MatMul", 1)
        lookup = next(n for n in self.nodes if n.op_type == "Gather" and n.input[1] == "input_ids")
        head_VW = self.array(head.input[1]).T
        kind, tied = head_VW.dtype, lookup.input[0] not in self.found
        table = _rounded(head_VW, bits, choose)
        names = self._multiply(head, table, kind)
        found = {"head": table.floats()}
        if tied:  # the table is the head's, turned
            self.nodes = [node for node in self.nodes if lookup.input[0] not in node.output]
        if not (tied and bits == EMBEDDING_BITS):
            table = _rounded(head_VW if tied else self.array(lookup.input[0]), EMBEDDING_BITS)
            names = self._store(lookup.input[0], table, kind)
        found["embedding"] = table.floats()
        self._look_up(lookup, table, names)
        return found

    def keep_last(self) -> None:
        """Give the head no more tokens than logits are asked for."""
        import onnx

        head = next(n for n in self.nodes if n.name == HEAD)
        least, last, axis = f"{HEAD}/from", f"{HEAD}/to", f"{HEAD}/axis"
        self.new |= {KEPT: np.array([1]), last: np.array([2**62]), axis: np.array([1])}
        self.model.graph.input.append(onnx.helper.make_tensor_value_info(KEPT, onnx.TensorProto.INT64, [1]))
        from_the_end = onnx.helper.make_node("Neg", [KEPT], [least], f"{HEAD}/Neg")
        kept = onnx.helper.make_node("Slice", [head.input[0], least, last, axis], [f"{HEAD}/kept"], f"{HEAD}/Slice")
        self._put_before(head, [from_the_end, kept])
        head.input[0] = f"{HEAD}/kept"
        logits = next(output for output in self.model.graph.output if output.name == "logits")
        tokens = logits.type.tensor_type.shape.dim[1]
        tokens.Clear()
        tokens.dim_value = 1  # by this ONNX Runtime GenAI knows

    def write(self, out: Path) -> None:
        """The graph, and its weights in a file beside it; equal graphs give equal bytes."""
        model = self.model
        graph.replace(model, self.nodes)
        read = {name for node in model.graph.node for name in node.input}
        kept = [name for name in (*self.found, *self.new) if name in read]
        del model.graph.initializer[:]
        with (out / graph.DATA).open("wb") as file:
            for name in kept:
                values = self.new[name] if name in self.new else self.array(name)
                model.graph.initializer.append(_put(name, values, file))
        model.doc_string, model.graph.doc_string, model.graph.name = "", "", "slimline"
        del model.metadata_props[:], model.graph.value_info[:]
        for node in model.graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        (out / graph.FILE).write_bytes(model.SerializeToString(deterministic=True))

    def _multiply(self, node: onnx.NodeProto, matrix: Blocked, kind: Any) -> list[str]:
        """Make the node multiply with these numbers. Returns the names of what it now reads."""
        import onnx

        names = self._store(node.input[1], matrix, kind)
        outputs, inputs = matrix.numbers_OI.shape
        numbers: dict[str, Any] = {"K": inputs, "N": outputs, "bits": matrix.bits, "block_size": matrix.block}
        numbers["accuracy_level"] = self.accuracy_level
        name, domain = node.name, "com.microsoft"
        made = onnx.helper.make_node(
            "MatMulNBits", [node.input[0], *names], list(node.output), name, domain=domain, **numbers
        )
        self._put_before(node, [made], instead=True)
        return names

    def _multiply_rounded(self, node: onnx.NodeProto, matrix: Blocked, inputs: Inputs) -> None:
        """Make the node multiply int8 inputs with these numbers, which have one scale an output."""
        import onnx

        numbers_BTI = f"{node.input[0]}/rounded"
        if node.input[0] not in self.rounded:
            self.rounded[node.input[0]] = inputs
            self._put_before(node, self._round_inputs(node.input[0], numbers_BTI, inputs))
        name, product = node.input[1], f"{node.output[0]}/steps"
        self.new |= {
            f"{name}_Q8": np.ascontiguousarray(matrix.numbers_OI.T),
            f"{name}_scales": matrix.scale_OB[:, 0].astype(np.float32),
        }
        multiply = onnx.helper.make_node(
            "MatMulIntegerToFloat",
            [numbers_BTI, f"{name}_Q8", f"{node.input[0]}/scale", f"{name}_scales", MIDDLE],
            [product if inputs.scale is None else node.output[0]], node.name, domain="com.microsoft",
        )  # fmt: skip
        made = [multiply]
        if inputs.scale is None:
            scales = f"{node.input[0]}/scales"
            made.append(onnx.helper.make_node("Mul", [product, scales], list(node.output), f"{node.name}/Mul"))
        self._put_before(node, made, instead=True)

    def _round_inputs(self, values: str, numbers: str, inputs: Inputs) -> list[onnx.NodeProto]:
        """Nodes that make int8 of [B, T, I], raised by 128: kernels take inputs from 0 up. As activations.rounded."""
        import onnx

        scale = np.array(1 if inputs.scale is None else inputs.scale, dtype=np.float32)
        self.new |= {MIDDLE: np.array(128, dtype=np.uint8), f"{values}/scale": scale}
        if inputs.scale is not None:
            return [onnx.helper.make_node("QuantizeLinear", [values, f"{values}/scale", MIDDLE], [numbers], numbers)]
        largest = np.array(activations.LARGEST["int"], dtype=np.float32)
        self.new |= {LARGEST: largest, LEAST: np.array(TINY, dtype=np.float32), LAST_AXIS: np.array([-1])}
        steps = [
            ("Abs", [values], "size"), ("ReduceMax", [f"{values}/size", LAST_AXIS], "largest"),
            ("Div", [f"{values}/largest", LARGEST], "step"), ("Max", [f"{values}/step", LEAST], "scales"),
            ("Div", [values, f"{values}/scales"], "steps"),
        ]  # fmt: skip
        made = [
            onnx.helper.make_node(kind, given, [f"{values}/{out}"], f"{values}/{out}") for kind, given, out in steps
        ]
        given = [f"{values}/steps", f"{values}/scale", MIDDLE]
        return [*made, onnx.helper.make_node("QuantizeLinear", given, [numbers], numbers)]

    def _put_before(self, node: onnx.NodeProto, made: list[onnx.NodeProto], instead: bool = False) -> None:
        at = self.nodes.index(node)
        self.nodes[at : at + instead] = made

    def _look_up(self, node: onnx.NodeProto, table: Blocked, names: list[str]) -> None:
        """Make the node look its rows up among these numbers."""
        import onnx

        flat = f"{node.name}/rows"
        self.new[f"{flat}/shape"] = np.array([len(table.numbers_OI), -1], dtype=np.int64)
        turn = onnx.helper.make_node("Reshape", [names[0], f"{flat}/shape"], [flat], f"{node.name}/Reshape")
        numbers: dict[str, Any] = {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 1}
        made = onnx.helper.make_node(
            "GatherBlockQuantized", [flat, node.input[1], names[1]], list(node.output), node.name,
            domain="com.microsoft", **numbers,
        )  # fmt: skip
        self._put_before(node, [turn, made], instead=True)

    def _store(self, name: str, matrix: Blocked, kind: Any) -> list[str]:
        """Keep a matrix for the file of weights. Returns the names of its parts."""
        parts = {f"{name}_Q{matrix.bits}": matrix.data(), f"{name}_scales": matrix.scale_OB.astype(kind)}
        if (zeros := matrix.zeros()) is not None:
            parts[f"{name}_zero_points"] = zeros
        self.new |= parts
        return list(parts)

    def _only(self, name: str, op_type: str, weight: int) -> onnx.NodeProto:
        fits = [n for n in self.nodes if n.name == name and n.op_type == op_type and n.input[weight] in self.found]
        if len(fits) != 1:
            raise ModelError(f"the built graph has no {name}. {AGAIN}")
        found: onnx.NodeProto = fits[0]
        return found


HEAD = "/lm_head/MatMul"
EMBEDDING_BITS = 8
MIDDLE, LARGEST, LEAST, LAST_AXIS = (f"/rounding/{name}" for name in ("middle", "largest", "least", "axis"))
AGAIN = "Is this version of onnxruntime-genai one that slimline was tested with?"


def levels(model: onnx.ModelProto, accuracy_level: int) -> bool:
    """Set how exactly the graph multiplies with whole numbers. Returns whether that changed anything."""
    changed = False
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "MatMulNBits" else ():
            if attribute.name == "accuracy_level" and attribute.i != accuracy_level:
                attribute.i, changed = accuracy_level, True
    return changed


def _packed(weights: Weights, layer: str, settings: dict[str, Any]) -> list[Part]:
    """A layer's matrices that are stored as whole numbers."""
    found = []
    for name in weights.below(layer):
        if (integers := weights.integers(name)) is not None:
            module = name.removesuffix(".weight")
            inputs = _inputs(weights, module, settings)
            if inputs and (integers[0].scale_OG.shape[1] > 1 or integers[0].zero_OG is not None or integers[1] != 8):
                raise ModelError(
                    f"{name} has inputs of int8, but is not itself of 8 bits with one scale an output, which ONNX "
                    "Runtime has no product for. Serve the model with vLLM."
                )
            found.append(Part(nbits.blocked(*integers, name), inputs))
    return found


def _inputs(weights: Weights, module: str, settings: dict[str, Any]) -> Inputs | None:
    how = activations.asked(settings, module, str(weights.folder))
    if how is None:
        return None
    return Inputs(None if how[1] else float(weights.raw(module + INPUT_SCALE)))


def _digest(values: Array) -> bytes:
    return hashlib.blake2b((values + 0).tobytes(), digest_size=16).digest()  # + 0: there is one zero, not two


def _rounded(table_VW: Array, bits: int, choose: Choose | None = None) -> Blocked:
    """A table in the blocks of its width, as it is chosen or each with the scale that errs least."""
    import torch

    width = table_VW.shape[1]
    block = next((size for size in (64, 32, 16) if width % size == 0), 0)
    if not block:
        raise ConfigError(f"head_bits {bits} needs a width that 16 divides, but it is {width}. Ask for head_bits=0.")
    scheme = Scheme(bits, block)
    parts = [(choose or _nearest)(torch.from_numpy(rows_RW), scheme) for rows_RW in _slices(table_VW)]
    zeros = [part.zero_OG for part in parts if part.zero_OG is not None]
    numbers_OI, scale_OG = (torch.cat(each) for each in zip(*(part[:2] for part in parts)))
    return nbits.blocked(Integers(numbers_OI, scale_OG, torch.cat(zeros) if zeros else None), bits, "the table")


def _nearest(weight_OI: torch.Tensor, scheme: Scheme) -> Integers:
    scale_OG, _ = grid.fit(weight_OI, scheme, search=scheme.bits < 8)
    return Integers(grid.nearest(weight_OI, scale_OG, None, scheme.bits), scale_OG, None)


def _slices(table_VW: Array) -> Iterator[Array]:
    for at in range(0, len(table_VW), ROWS):
        yield np.array(table_VW[at : at + ROWS], dtype=np.float32, order="C")


def _put(name: str, values: Array, file: Any) -> onnx.TensorProto:
    """The tensor, its bytes in the file of weights unless there are few."""
    import onnx

    tensor: onnx.TensorProto
    if values.nbytes <= graph.INLINE_BYTES:
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return tensor
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=kind)
    graph.put_beside(tensor, np.ascontiguousarray(values).view(np.uint8).reshape(-1).data, file)
    return tensor
