"""Dynamic int8: smaller, near its source, on pruned shapes too, and exact sums on every processor."""

import json

import numpy as np
import pytest

from slimline import artifact, graph, parity
from slimline.errors import ModelError
from slimline.export import onnx as export
from slimline.quantize import int8_dynamic
from tests.test_export import LAYERS, data, make_model  # noqa: F401


@pytest.fixture(scope="module", params=[(4, 4, 4), (1, 3, 2)], ids=["full", "pruned"])
def exported(request, data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("quantize")
    source = make_model(folder / "source", heads=request.param)
    export.run(source, folder / "onnx", export.Config(data=str(data)))
    artifact.seal(folder / "onnx", format="onnx", task="text-classification", labels=("bad", "good"), base="")
    return folder / "onnx"


def options(data, **more):  # noqa: F811
    """Loud random weights are harder on 8 bits than trained ones: the guard is set for them."""
    return int8_dynamic.Config(data=str(data), **({"agreement": 0.8, "kl": 0.5} | more))


def test_int8_is_smaller_and_near_and_leaves_its_source_alone(exported, data, tmp_path):  # noqa: F811
    before = artifact.digest(exported)
    metrics = int8_dynamic.run(exported, tmp_path, options(data))
    assert metrics["num_quantized_attention"] == LAYERS
    assert metrics["num_quantized_matmul"] == 3 * LAYERS + 1  # output, up, down in each layer; the pooler
    assert metrics["num_quantized_tables"] == 1
    assert metrics["size_bytes"] < metrics["size_before_bytes"]
    assert metrics["agreement"] >= 0.8
    assert artifact.digest(exported) == before
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in exported.iterdir()} - {"manifest.json"}
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}


def test_int8_twice_gives_the_same_bytes(exported, data, tmp_path):  # noqa: F811
    first, second = (int8_dynamic.run(exported, tmp_path / side, options(data)) for side in "ab")
    assert first == second
    assert artifact.digest(tmp_path / "a") == artifact.digest(tmp_path / "b")


def test_embeddings_stay_when_asked(exported, data, tmp_path):  # noqa: F811
    metrics = int8_dynamic.run(exported, tmp_path, options(data, embeddings=False))
    assert metrics["num_quantized_tables"] == 0
    assert graph.count(graph.read(tmp_path / graph.FILE))["EmbedLayerNormalization"] == 1


def test_a_quantized_graph_is_not_quantized_again(exported, data, tmp_path):  # noqa: F811
    int8_dynamic.run(exported, tmp_path / "once", options(data))
    with pytest.raises(ModelError, match="quantized already"):
        int8_dynamic.run(tmp_path / "once", tmp_path / "twice", options(data))


def test_a_quantized_model_that_strays_is_refused(exported, data, tmp_path):  # noqa: F811
    with pytest.raises(ModelError, match=r"with mean KL .* worst on 'word"):
        int8_dynamic.run(exported, tmp_path, options(data, kl=1e-12))


def test_seven_bits_never_overflow_where_eight_may(tmp_path):
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = np.ones((64, 8), np.float32)  # every weight is the largest: the worst sum there is
    inside = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="inner"),
            helper.make_node("Identity", ["h"], ["logits"], name="head"),
        ],
        "worst",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(inside, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    largest = {}
    for reduce_range in (True, False):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        config = int8_dynamic.Config(data="", reduce_range=reduce_range)
        quantized = int8_dynamic.quantize(copy, tmp_path / graph.FILE, config)
        stored = [numpy_helper.to_array(t) for t in quantized.graph.initializer if t.name == "w_quantized"]
        largest[reduce_range] = int(np.abs(stored[0].astype(int)).max())
        session = onnxruntime.InferenceSession(quantized.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, {"x": np.ones((4, 64), np.float32)})[0]
        if reduce_range:
            assert np.allclose(got, 64, rtol=0.02)
    assert 2 * 255 * largest[True] <= 2**15 - 1 < 2 * 255 * largest[False]


def test_the_guard_says_how_often_labels_changed():
    source = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]], np.float32)
    candidate = source.copy()
    candidate[0] = [0.0, 3.0]
    with pytest.raises(ModelError, match=r"agrees with its source on 75.0% of 4 texts .* worst on 'a'"):
        parity.require_close(
            parity.compare(source, candidate), ["a", "b", "c", "d"], int8_dynamic.Config(data="", agreement=0.97), ""
        )
