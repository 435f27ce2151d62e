"""Types in a graph: what is rounded is rounded as the type says, once, and what is not named stays what it was."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from slimline import graph, precision
from slimline.errors import ConfigError, ModelError

FLOAT = TensorProto.FLOAT
MATRICES = arrays.arrays(np.float32, (32, 3), elements=st.floats(-8, 8, width=32))


def model_of(nodes, inputs, outputs, constants=(), opset=21):
    whole = helper.make_graph(
        nodes, "made for a test",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )  # fmt: skip
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def answer(model, **inputs):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def two_layers(seed=0, width=32):
    """[B, W] -> two matrices with a softmax between them -> logits."""
    draw = np.random.default_rng(seed)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"], "/layer.0/MatMul"),
        helper.make_node("Softmax", ["h"], ["s"], "/layer.0/Softmax", axis=-1),
        helper.make_node("MatMul", ["s", "w1"], ["y"], "/layer.1/MatMul"),
        helper.make_node("Add", ["y", "bias"], ["logits"], "/head/Add"),
    ]
    weights = {f"w{i}": draw.normal(size=(width, width)).astype(np.float32) for i in range(2)}
    weights["bias"] = draw.normal(size=width).astype(np.float32)
    ends = [("x", FLOAT, ["batch", width])], [("logits", FLOAT, ["batch", width])]
    return model_of(nodes, *ends, weights.items()), draw.normal(size=(5, width)).astype(np.float32)


def kinds_of(model):
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


# Scales and numbers


def test_a_column_worked_by_hand():
    numbers, scale = precision.rounded_columns(np.array([[127.0, 1.0], [-64.0, 0.5]], np.float32), "fp32")
    assert scale.tolist() == [1.0, np.float32(1 / 127)]
    assert numbers.tolist() == [[127, 127], [-64, 64]]  # 63.5 goes to the even one


@given(MATRICES, st.sampled_from(["fp32", "fp16"]))
def test_a_restored_column_is_off_by_half_a_step_at_most(weight, floats):
    numbers, scale = precision.rounded_columns(weight, floats)
    assert np.abs(numbers).max() <= 127
    assert (np.abs(numbers * scale - weight) <= 0.5001 * scale).all()


@given(MATRICES, st.sampled_from(["fp32", "fp16"]))
def test_no_scale_is_below_what_its_numbers_need_and_half_precision_holds_it(weight, floats):
    scale = precision.scale_for(np.abs(weight).max(axis=0), "int8", floats)
    assert (scale * np.float32(127) >= np.abs(weight).max(axis=0) * (1 - 1e-6)).all() and (scale > 0).all()
    if floats == "fp16":
        assert (scale.astype(np.float16).astype(np.float32) == scale).all()


def test_what_is_all_zero_has_scale_one():
    assert precision.scale_for(np.zeros(2), "fp8", "fp16").tolist() == [1, 1]


@settings(max_examples=30)
@given(MATRICES, st.sampled_from([8, 16, 32]))
def test_a_block_is_no_worse_than_with_a_scale_that_covers_its_largest_weight(weight, block):
    numbers, scale = precision.rounded_blocks(weight, block, "fp32")
    assert scale.shape == (32 // block, 3) and numbers.min() >= -8 and numbers.max() <= 7
    wide = np.repeat(scale, block, axis=0)
    plain = np.repeat(
        precision.scale_for(np.abs(weight).reshape(-1, block, 3).max(axis=1), "int4", "fp32"), block, axis=0
    )
    naive = np.clip(np.rint(weight / plain), -8, 7) * plain
    assert np.square(numbers * wide - weight).sum() <= np.square(naive - weight).sum() * (1 + 1e-5) + 1e-9


def test_fp8_keeps_small_weights_as_finely_as_large_ones():
    import ml_dtypes

    weight = np.array([[448.0, 3.5, 0.02]], np.float32)
    numbers, scale = precision.rounded_whole(weight, "fp32")
    assert scale == 1.0
    assert (numbers.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) == [[448.0, 3.5, 0.01953125]]).all()


# Q/DQ in a graph


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("fp8", 0.08), ("int4", 0.3)])
def test_a_graph_with_rounded_weights_says_nearly_the_same(kind, tolerance):
    model, x = two_layers()
    before = answer(model, x=x)
    precision.quantize_weights(model, precision.matrices(model, ()), kind, "fp32", 16)
    onnx.checker.check_model(model)
    after = answer(model, x=x)
    assert 0 < np.abs(after - before).max() < tolerance * np.abs(before).max()
    kept = {"w0_int8", "w0_fp8", "w0_int4"} & kinds_of(model).keys()
    assert kept == {f"w0_{kind}"} and "w0" not in kinds_of(model)
    assert kinds_of(model)[f"w0_{kind}"] == precision.KINDS[kind].onnx


def test_rounded_activations_are_those_of_the_operators_definition():
    model, x = two_layers()
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    products = precision.matrices(model, ("layer.1",))
    precision.quantize_activations(model, products, {"x": 2.0, "s": 1.0}, "int8", "fp32")
    step = np.float32(2 / 127)
    h = np.clip(np.rint(x / step), -128, 127) * step @ weights["w0"]
    s = np.exp(h - h.max(axis=1, keepdims=True))
    expected = s / s.sum(axis=1, keepdims=True) @ weights["w1"] + weights["bias"]
    assert np.allclose(answer(model, x=x), expected, atol=1e-5)


def test_what_several_products_read_is_rounded_once():
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], f"/{i}") for i in range(2)]
    nodes.append(helper.make_node("Add", ["y0", "y1"], ["logits"]))
    eye = np.eye(4, dtype=np.float32)
    model = model_of(nodes, [("x", FLOAT, [1, 4])], [("logits", FLOAT, [1, 4])], [("w0", eye), ("w1", 2 * eye)])
    precision.quantize_activations(model, precision.matrices(model, ()), {"x": 127.0}, "int8", "fp32")
    assert graph.count(model)["QuantizeLinear"] == 1
    assert answer(model, x=np.array([[1.4, 2.6, -3.0, 500.0]], np.float32)).tolist() == [[3, 9, -9, 381]]


def test_a_matrix_that_an_embedding_shares_stays_for_the_embedding():
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], "/tied"),
        helper.make_node("Identity", ["y"], ["logits"]),
    ]
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    model = model_of(nodes, [("ids", TensorProto.INT64, [2])], [("logits", FLOAT, [2, 8])], [("w", weight)])
    precision.quantize_weights(model, precision.matrices(model, ()), "int8", "fp32")
    assert {"w", "w_int8"} <= kinds_of(model).keys()
    ids = np.array([1, 5])
    assert np.allclose(answer(model, ids=ids), weight[ids] @ weight, atol=0.1)


def test_a_matrix_that_another_layer_shares_through_a_copy_is_quantized_in_both_and_is_no_activation():
    nodes = [
        helper.make_node("Identity", ["w"], ["copy"]),
        helper.make_node("MatMul", ["x", "copy"], ["h"], "/0"),
        helper.make_node("MatMul", ["h", "w"], ["y"], "/1"),
        helper.make_node("Identity", ["y"], ["logits"]),
    ]
    weight, x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    model = model_of(nodes, [("x", FLOAT, [8, 8])], [("logits", FLOAT, [8, 8])], [("w", weight)])
    precision.name_shared(model)
    assert precision.matrices(model, ()) == {"h": ["x", "w"], "y": ["h", "w"]} and not precision.mixings(model, ())
    precision.quantize_weights(model, ["h", "y"], "int8", "fp32")
    onnx.checker.check_model(model)
    assert graph.count(model) == {"DequantizeLinear": 1, "MatMul": 2, "Identity": 1}
    exact = x @ weight @ weight
    assert np.abs(answer(model, x=x) - exact).max() < 0.03 * np.abs(exact).max()


def test_a_name_in_keep_that_nothing_has_is_refused():
    model, _ = two_layers()
    with pytest.raises(ConfigError, match=r"keep names 'layers\.0', but no .* such as /layer\.0/MatMul\."):
        precision.matrices(model, ["layer.1", "layers.0"])
    with pytest.raises(ConfigError, match=r"keep names 'Sofmax', but this graph has only Add, MatMul, Softmax\."):
        precision.lower(model, "fp16", ["Sofmax"])


def test_what_is_named_in_keep_the_head_and_unfilled_matrices_stay():
    model, _ = two_layers()
    assert list(precision.matrices(model, ("layer.1",))) == ["h"]
    assert list(precision.matrices(model, (), block=32)) == ["h", "y"]
    with pytest.raises(ModelError, match="blocks of 64 rows fill none of its 2 matrices: ask for smaller ones"):
        precision.matrices(model, (), block=64)
    with pytest.raises(ModelError, match="no matrix that may be quantized: name fewer in `keep`"):
        precision.matrices(model, ("layer",))


# Float types


def test_half_precision_is_what_onnx_runtimes_own_converter_makes():
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model, x = two_layers()
    theirs = convert_float_to_float16(onnx.ModelProto.FromString(model.SerializeToString()), keep_io_types=True)
    precision.lower(model, "fp16")
    assert (answer(model, x=x) == answer(theirs, x=x)).all()
    assert set(kinds_of(model).values()) == {TensorProto.FLOAT16}


def test_bfloat16_answers_as_its_rounding_twin():
    model, x = two_layers(width=8)
    precision.lower(model, "bf16")
    (exact,) = ReferenceEvaluator(model).run(None, {"x": x[:, :8]})
    twin = answer(precision.rounding_twin(model, "bf16"), x=x[:, :8])
    assert np.abs(twin - exact).max() <= 2**-7 * np.abs(exact).max()  # the reference sums in bfloat16 itself
    assert np.array_equal(twin.view(np.uint32) & 0xFFFF, np.zeros_like(twin, np.uint32))  # each is a bfloat16


def test_operators_that_are_kept_work_in_float32():
    model, x = two_layers()
    precision.lower(model, "fp16", ["Softmax"])
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred}
    (node,) = [n for n in model.graph.node if n.op_type == "Softmax"]
    assert kinds[node.input[0]] == kinds[node.output[0]] == FLOAT
    assert kinds["h"] == kinds["s"] == kinds["y"] == TensorProto.FLOAT16
    assert np.abs(answer(model, x=x) - answer(two_layers()[0], x=x)).max() < 0.02


def test_numbers_beyond_the_type_become_its_largest_not_infinity():
    nodes = [
        helper.make_node("Constant", [], ["least"], value=numpy_helper.from_array(np.float32(np.finfo("f4").min))),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Where", ["seen", "zeros", "least"], ["mask"]),
        helper.make_node("Add", ["mask", "x"], ["sum"]),
        helper.make_node("Softmax", ["sum"], ["logits"], axis=-1),
    ]
    inputs = [("x", FLOAT, [1, 3]), ("seen", TensorProto.BOOL, [1, 3])]
    given = {"x": np.array([[-5.0, 2.0, 1.0]], np.float32), "seen": np.array([[True, False, False]])}
    for kind in ("fp16", "bf16"):
        model = model_of(nodes, inputs, [("logits", FLOAT, [1, 3])], [("shape", np.array([1, 3]))])
        precision.lower(model, kind)
        run = precision.rounding_twin(model, kind) if kind == "bf16" else model
        assert answer(run, **given).tolist() == [[1, 0, 0]]


def test_whole_numbers_stay_and_counting_stays_exact():
    nodes = [
        helper.make_node("Cast", ["n"], ["end"], to=FLOAT),
        helper.make_node("Range", ["zero", "end", "one"], ["places"]),
        helper.make_node("Cast", ["places"], ["indexes"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "indexes"], ["logits"]),
    ]
    table = np.arange(300, dtype=np.float32)
    constants = [("zero", np.float32(0)), ("one", np.float32(1)), ("table", table)]
    model = model_of(nodes, [("n", TensorProto.INT64, [])], [("logits", FLOAT, ["n"])], constants)
    precision.lower(model, "fp16")
    assert answer(model, n=np.array(300)).tolist() == table.tolist()


def test_a_graph_within_a_graph_is_refused():
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "inner", [], [
        helper.make_tensor_value_info("y", FLOAT, [1])
    ])  # fmt: skip
    node = helper.make_node("If", ["yes"], ["logits"], "/branch", then_branch=inner, else_branch=inner)
    model = model_of([node], [("yes", TensorProto.BOOL, []), ("x", FLOAT, [1])], [("logits", FLOAT, [1])])
    with pytest.raises(ModelError, match="the If node '/branch' holds a graph of its own"):
        precision.lower(model, "fp16")


def test_an_operator_without_a_form_in_a_later_version_is_said():
    node = helper.make_node("TopK", ["x"], ["logits", "places"], "/top")  # without its attribute k
    whole = helper.make_graph([node], "broken", [helper.make_tensor_value_info("x", FLOAT, [4])], [
        helper.make_tensor_value_info("logits", FLOAT, [2])
    ])  # fmt: skip
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 9)])
    with pytest.raises(
        ModelError, match=r"^the graph \(opset 9\) does not become opset 21: required .*'k'\. Export it"
    ):
        precision.upgrade(model)
