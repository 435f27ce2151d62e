"""ONNX graphs made by hand for what only a runtime of compiled engines cares about: types, Q/DQ and a KV cache.

Shapes: B = texts, S = tokens, W = width, H = heads, P = tokens before, D = width of a head.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, WORDS, BLOCK = 64, 32, 32
FLOATS = {"float": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
WHOLE = {"int8": (TensorProto.INT8, 127), "fp8": (TensorProto.FLOAT8E4M3FN, 448), "int4": (TensorProto.INT4, 7)}


class Graph:
    """Nodes and constants, written down in order."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.draw = np.random.default_rng(0)

    def const(self, name: str, value, kind: int | None = None) -> str:
        value = np.asarray(value)
        made = numpy_helper.from_array(value, name)
        if kind is not None:
            made = helper.make_tensor(name, kind, value.shape, value.ravel().tolist())
        self.constants.append(made)
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.const(name, self.draw.normal(scale=0.2, size=shape).astype(np.float32))

    def add(self, op: str, name: str, *inputs: str, out: str = "", **attributes) -> str:
        out = out or name.strip("/").replace("/", "_")
        self.nodes.append(helper.make_node(op, inputs, [out], name, **attributes))
        return out

    def save(self, file: Path, inputs: list, outputs: list, opset: int = 21) -> Path:
        whole = helper.make_graph(self.nodes, "made for a test", inputs, outputs, self.constants)
        model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(model)
        file.write_bytes(model.SerializeToString())
        return file


def encoder(file: Path, kind: str = "float", shape: tuple = ("batch", "length"), odd: str = "") -> Path:
    """Two layers of [W, W] in a kind of numbers, and a head in float. `odd` puts such an operator into layer 1."""
    g = Graph()
    base = FLOATS.get(kind, TensorProto.FLOAT)
    g.const("table", g.draw.normal(size=(WORDS, WIDTH)), base)
    x = g.add("Gather", "/embeddings/Gather", "table", "input_ids")
    for i in range(2):
        scope = f"/encoder/layer.{i}/dense"
        if odd and i == 1:
            x = g.add(odd, f"/encoder/layer.{i}/odd/{odd}", x)
        weight = g.draw.normal(scale=0.1, size=(WIDTH, WIDTH)).astype(np.float32)
        if kind in FLOATS:
            entering, stored = x, g.const(f"weight{i}", weight, base)
        else:
            entering, stored = quantized(g, x, weight, scope, kind, i)
        x = g.add("MatMul", f"{scope}/MatMul", entering, stored)
        x = g.add("Relu", f"{scope}/Relu", x)
    mask = g.add("Cast", "/Cast", "attention_mask", to=base)
    column = g.add("Unsqueeze", "/Unsqueeze", mask, g.const("last", np.array([2])))
    pooled = g.add(
        "ReduceSum", "/ReduceSum", g.add("Mul", "/Mul", x, column), g.const("one", np.array([1])), keepdims=0
    )
    head = g.const("head", g.draw.normal(size=(WIDTH, 2)), base)
    answer = g.add("MatMul", "/classifier/MatMul", pooled, head, out="" if base != TensorProto.FLOAT else "logits")
    if base != TensorProto.FLOAT:
        g.add("Cast", "/classifier/Cast", answer, out="logits", to=TensorProto.FLOAT)
    names = ("input_ids", "attention_mask")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in names]
    return g.save(file, inputs, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], 2])])


def quantized(g: Graph, x: str, weight: np.ndarray, scope: str, kind: str, i: int) -> tuple[str, str]:
    """The names of activation and weight behind Q/DQ; int4 leaves the activation as it is and scales by blocks."""
    stored, top = WHOLE[kind]
    size, how = np.abs(weight), {}
    if kind == "int4":  # a scale for each block of a column
        scale, how = size.reshape(-1, BLOCK, WIDTH).max(axis=1) / top, {"axis": 0, "block_size": BLOCK}
    elif kind == "int8":  # for each column
        scale, how = size.max(axis=0) / top, {"axis": 1}
    else:
        scale = size.max() / top
    numbers = weight / (np.repeat(scale, BLOCK, axis=0) if kind == "int4" else scale)
    g.const(f"weight{i}", numbers if kind == "fp8" else np.round(numbers).astype(int), stored)
    g.const(f"scale{i}", np.asarray(scale, dtype=np.float32))
    restored = g.add("DequantizeLinear", f"{scope}/weight/DequantizeLinear", f"weight{i}", f"scale{i}", **how)
    if kind == "int4":
        return x, restored
    step = g.const(f"step{i}", np.float32(4 / top))
    zero = g.const(f"zero{i}", np.float32(0), stored)
    rounded = g.add("QuantizeLinear", f"{scope}/QuantizeLinear", x, step, zero)
    return g.add("DequantizeLinear", f"{scope}/DequantizeLinear", rounded, step, zero), restored


def decoder(file: Path, layers: int = 2, heads: int = 2, width: int = 8) -> Path:
    """A causal model with a KV cache: input_ids [B, S], attention_mask [B, P + S], past_key_values.* [B, H, P, D]."""
    g, whole = Graph(), heads * width
    g.const("apart", np.array([0, 0, heads, width]))
    g.const("joined", np.array([0, 0, whole]))
    g.const("one", np.float32(1))
    g.const("far", np.float32(-1e4))
    g.const("shrink", np.float32(width**-0.5))
    x = g.add("Gather", "/embed/Gather", g.weight("table", WORDS, whole), "input_ids")
    seen = g.add("Cast", "/mask/Cast", "attention_mask", to=TensorProto.FLOAT)
    seen = g.add("Unsqueeze", "/mask/Unsqueeze", seen, g.const("middle", np.array([1, 2])))
    hidden = g.add("Mul", "/mask/Mul", g.add("Sub", "/mask/Sub", "one", seen), "far")
    sizes = {"input_ids": ["batch", "new"], "attention_mask": ["batch", "total"]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in sizes.items()]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "new", WORDS])]
    for i in range(layers):
        scope, part = f"/model/layers.{i}/attn", {}
        for name in ("query", "key", "value"):
            y = g.add("MatMul", f"{scope}/{name}/MatMul", x, g.weight(f"{name}{i}", whole, whole))
            y = g.add("Reshape", f"{scope}/{name}/Reshape", y, "apart")
            part[name] = g.add("Transpose", f"{scope}/{name}/Transpose", y, perm=[0, 2, 1, 3])
        for name in ("key", "value"):
            past, present = f"past_key_values.{i}.{name}", f"present.{i}.{name}"
            part[name] = g.add("Concat", f"{scope}/{name}/Concat", past, part[name], out=present, axis=2)
            inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, ["batch", heads, "past", width]))
            outputs.append(helper.make_tensor_value_info(present, TensorProto.FLOAT, ["batch", heads, "total", width]))
        turned = g.add("Transpose", f"{scope}/turn/Transpose", part["key"], perm=[0, 1, 3, 2])
        scores = g.add(
            "Mul", f"{scope}/Mul", g.add("MatMul", f"{scope}/scores/MatMul", part["query"], turned), "shrink"
        )
        share = g.add("Softmax", f"{scope}/Softmax", g.add("Add", f"{scope}/Add", scores, hidden), axis=-1)
        y = g.add("MatMul", f"{scope}/mix/MatMul", share, part["value"])
        y = g.add(
            "Reshape",
            f"{scope}/mix/Reshape",
            g.add("Transpose", f"{scope}/mix/Transpose", y, perm=[0, 2, 1, 3]),
            "joined",
        )
        y = g.add("MatMul", f"{scope}/out/MatMul", y, g.weight(f"out{i}", whole, whole))
        x = g.add("Add", f"/model/layers.{i}/Add", x, y)
    g.add("MatMul", "/head/MatMul", x, g.weight("head", whole, WORDS), out="logits")
    return g.save(file, inputs, outputs, opset=17)
