import numpy as np
import pytest
import torch

from slimline import grid, nbits
from slimline.errors import ModelError
from slimline.packed import Integers, Scheme


def make(bits, group_size, symmetric=True, outputs=24, inputs=192, seed=0):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    scale, zero = grid.fit(weight, Scheme(bits, group_size, symmetric), search=False)
    return Integers(grid.nearest(weight, scale, zero, bits), scale, zero)


def multiply(matrix, inputs_TI, accuracy_level=1):
    """What ONNX Runtime's MatMulNBits makes of some inputs."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = matrix.numbers_OI.shape
    given = {"q": matrix.data(), "s": matrix.scale_OB.astype(np.float32), "z": matrix.zeros()}
    weights = [numpy_helper.from_array(values, name) for name, values in given.items() if values is not None]
    node = helper.make_node(
        "MatMulNBits", ["x", *(w.name for w in weights)], ["y"], domain="com.microsoft", K=inputs, N=outputs,
        bits=matrix.bits, block_size=matrix.block, accuracy_level=accuracy_level,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", w]) for n, w in (("x", inputs), ("y", outputs))]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": inputs_TI})[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16, 48, 64, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_runtime_multiplies_with_the_very_numbers(bits, group_size, symmetric):
    whole = make(bits, group_size, symmetric)
    matrix = nbits.blocked(whole, bits, "a matrix")
    np.testing.assert_array_equal(matrix.floats(), whole.floats().numpy())
    inputs = np.random.default_rng(0).standard_normal((3, 192), dtype=np.float32)
    expected = inputs.astype(np.float64) @ whole.floats().numpy().astype(np.float64).T
    np.testing.assert_allclose(multiply(matrix, inputs), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_numbers_lie_in_bytes_the_first_in_the_lowest_bits():
    whole = Integers(torch.tensor([[-8, 7] + [0] * 14], dtype=torch.int8), torch.ones(1, 1, dtype=torch.half), None)
    data = nbits.blocked(whole, 4, "a matrix").data()
    assert data.shape == (1, 1, 8)
    assert data[0, 0].tolist() == [0xF0] + [0x88] * 7


def test_bits_that_no_kernel_has_are_carried_in_wider_ones():
    assert [nbits.blocked(make(b, 64), b, "a matrix").bits for b in (2, 3, 4, 5, 6, 7, 8)] == [2, 4, 4, 8, 8, 8, 8]


def test_inputs_that_no_block_divides_fill_up_the_last():
    whole = make(4, None, inputs=100)
    matrix = nbits.blocked(whole, 4, "a matrix")
    assert matrix.data().shape == (24, 4, 16)
    inputs = np.eye(100, dtype=np.float32)
    np.testing.assert_allclose(multiply(matrix, inputs), whole.floats().numpy().T, rtol=0, atol=1e-6)


def test_groups_that_no_block_divides_are_refused_by_name():
    with pytest.raises(ModelError, match="up_proj has a scale for every 24 inputs"):
        nbits.blocked(make(4, 24), 4, "up_proj")


def test_matrices_of_other_bits_and_groups_are_joined_row_by_row():
    parts = [nbits.blocked(make(4, 64), 4, "a"), nbits.blocked(make(8, 32, symmetric=False, seed=1), 8, "b")]
    rows = [(1, 3), (0, 5), (1, 0), (0, 23)]
    whole = nbits.joined(parts, rows)
    assert (whole.bits, whole.block) == (8, 32)
    np.testing.assert_array_equal(whole.floats(), np.stack([parts[n].floats()[row] for n, row in rows]))
    assert parts[0].zero_OB is None and whole.zero_OB is not None


def test_two_bits_stay_two_only_where_they_are_fast():
    assert nbits.quick(nbits.blocked(make(2, 64), 2, "a"), 4).bits == 2
    assert nbits.quick(nbits.blocked(make(2, 64), 2, "a"), 1).bits == 4
    assert nbits.quick(nbits.blocked(make(2, 16), 2, "a"), 4).bits == 4
