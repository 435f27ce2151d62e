"""The graph that ONNX Runtime GenAI's builder makes of floats, with whole numbers put in their place.

The weights stay on disk, where they are read from and written to a tensor at a time. Which rows of which packed matrix
a node multiplies with is read off the floats themselves, since the builder joins some matrices and splits others.

Shapes: O = outputs, I = inputs, V = vocabulary, W = width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline import graph, grid, nbits
from slimline.decoder import Family
from slimline.errors import ConfigError, ModelError
from slimline.nbits import Array, Blocked
from slimline.packed import Integers, Scheme
from slimline.shards import Weights
from slimline.technique import track

if TYPE_CHECKING:
    import onnx

DATA = f"{graph.FILE}.data"
ROWS = 8192
"""Rows of a table that are rounded at once."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph's own file."""
PAGE_BYTES = 4096
"""Where tensors begin in the file of weights, so that they can be mapped into memory."""


class Rewriting:
    """A built graph while its floats are replaced. `write` leaves the finished one; the built one is not touched."""

    def __init__(self, built: Path, accuracy_level: int) -> None:
        import onnx

        self.built, self.accuracy_level = built, accuracy_level
        self.model = onnx.load(str(built / graph.FILE), load_external_data=False)
        self.found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.new: dict[str, Array] = {}
        self.nodes = list(self.model.graph.node)

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

    def take_integers(self, weights: Weights, kind: Family) -> int:
        """Put every matrix that is stored as whole numbers into the graph as those. Returns how many there were.

        Raises ModelError unless each of their rows is found in the graph, once.
        """
        layers: dict[int, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            layer = graph.LAYER.search(node.name)
            if layer and node.op_type == "MatMul" and node.input[1] in self.found:
                layers.setdefault(int(layer.group(1)), []).append(node)
        taken = 0
        for i in track(sorted(layers), "placing whole numbers"):
            parts = _packed(weights, f"{kind.layers}.{i}")
            if parts:
                self._take_layer(parts, layers[i], i)
            taken += len(parts)
            weights.close()
        return taken

    def _take_layer(self, parts: list[Blocked], nodes: list[onnx.NodeProto], layer: int) -> None:
        kind = self.array(nodes[0].input[1]).dtype
        free: dict[bytes, list[tuple[int, int]]] = {}
        for number, part in enumerate(parts):
            for row, values_I in enumerate(part.floats().astype(kind)):
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
            used = sorted({number for number, _ in rows})
            matrix = nbits.joined([parts[n] for n in used], [(used.index(n), row) for n, row in rows])
            if len(rows) != len(weight_OI) or not np.array_equal(matrix.floats().astype(kind), weight_OI):
                raise ModelError(f"{node.name} of the built graph is only partly the source's. {AGAIN}")
            self._multiply(node, nbits.quick(matrix, self.accuracy_level), kind)
        if left := sum(map(len, free.values())):
            raise ModelError(f"{left} rows of layer {layer}'s matrices are not in the built graph. {AGAIN}")

    def round_tables(self, bits: int) -> dict[str, Array]:
        """Round embedding and head. Returns what they are now, float32 [V, W], as `embedding` and `head`."""
        head = self._only("/lm_head/MatMul", "MatMul", 1)
        lookup = next(n for n in self.nodes if n.op_type == "Gather" and n.input[1] == "input_ids")
        head_VW = self.array(head.input[1]).T
        kind, tied = head_VW.dtype, lookup.input[0] not in self.found
        table = _rounded(head_VW, bits)
        names = self._multiply(head, table, kind)
        found = {"head": table.floats()}
        found["embedding"] = found["head"]
        if tied:  # the table is the head's, turned
            self.nodes = [node for node in self.nodes if lookup.input[0] not in node.output]
        else:
            table = _rounded(self.array(lookup.input[0]), bits)
            names = self._store(lookup.input[0], table, kind)
            found["embedding"] = table.floats()
        self._look_up(lookup, table, names)
        return found

    def write(self, out: Path) -> None:
        """The graph, and its weights in a file beside it; equal graphs give equal bytes."""
        model = self.model
        graph.replace(model, self.nodes)
        read = {name for node in model.graph.node for name in node.input}
        kept = [name for name in (*self.found, *self.new) if name in read]
        del model.graph.initializer[:]
        with (out / DATA).open("wb") as file:
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
        self.nodes[self.nodes.index(node)] = made
        return names

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
        at = self.nodes.index(node)
        self.nodes[at : at + 1] = [turn, made]

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


AGAIN = "Is this version of onnxruntime-genai one that slimline was tested with?"


def levels(model: onnx.ModelProto, accuracy_level: int) -> bool:
    """Set how exactly the graph multiplies with whole numbers. Returns whether that changed anything."""
    changed = False
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "MatMulNBits" else ():
            if attribute.name == "accuracy_level" and attribute.i != accuracy_level:
                attribute.i, changed = accuracy_level, True
    return changed


def _packed(weights: Weights, layer: str) -> list[Blocked]:
    """A layer's matrices that are stored as whole numbers."""
    found = ((name, weights.integers(name)) for name in weights.below(layer))
    return [nbits.blocked(*integers, name) for name, integers in found if integers is not None]


def _digest(values: Array) -> bytes:
    return hashlib.blake2b((values + 0).tobytes(), digest_size=16).digest()  # + 0: there is one zero, not two


def _rounded(table_VW: Array, bits: int) -> Blocked:
    """A table in the blocks of its width, each with the scale that errs least."""
    import torch

    width = table_VW.shape[1]
    block = next((size for size in (64, 32, 16) if width % size == 0), 0)
    if not block:
        raise ConfigError(f"head_bits {bits} needs a width that 16 divides, but it is {width}. Ask for head_bits=0.")
    numbers, scales = [], []
    for rows_RW in _slices(table_VW):
        weight = torch.from_numpy(rows_RW)
        scale, _ = grid.fit(weight, Scheme(bits, block), search=bits < 8)
        numbers.append(grid.nearest(weight, scale, None, bits))
        scales.append(scale)
    return nbits.blocked(Integers(torch.cat(numbers), torch.cat(scales), None), bits, "the table")


def _slices(table_VW: Array) -> Iterator[Array]:
    for at in range(0, len(table_VW), ROWS):
        yield np.array(table_VW[at : at + ROWS], dtype=np.float32, order="C")


def _put(name: str, values: Array, file: Any) -> onnx.TensorProto:
    """The tensor, its bytes in the file of weights unless there are few."""
    import onnx

    tensor: onnx.TensorProto
    if values.nbytes <= INLINE_BYTES:
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return tensor
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    file.write(b"\0" * (-file.tell() % PAGE_BYTES))
    tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=kind, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", file.tell()), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    values.tofile(file)
    return tensor
