"""Typed graphs, from model to engine: near their source, the same bytes twice, and read by TensorRT as meant."""

import json
from collections import Counter

import numpy as np
import pytest

from slimline import artifact, engine, graph, hf, parity, serve, step, technique
from slimline.errors import ConfigError, ModelError
from slimline.export import onnx as export_onnx
from tests.test_export import FAMILIES, LAYERS, WORDS, data, make_model  # noqa: F401

MATRICES = 6 * LAYERS  # query, key, value, mixed, up, down
MIXINGS = 2 * LAYERS
LOUD = {"agreement": 0.6, "kl": 1.0}  # random weights as loud as these are hard on few bits
TYPED = {
    "fp16": ({}, {"half": MATRICES + MIXINGS}),
    "bf16": ({"tolerance": 0.3}, {"bf16": MATRICES + MIXINGS}),
    "int8_static": (LOUD, {"int8": MATRICES, "half": MIXINGS}),
    "fp8": (LOUD, {"fp8": MATRICES, "half": MIXINGS}),
    "int4_weights": (LOUD | {"block_size": 16}, {"half x int4": MATRICES, "half": MIXINGS}),
}


def perform(name, source, out, **options):
    module = technique.find(name)
    out.mkdir(parents=True, exist_ok=True)
    return module.run(source, out, technique.configure(module, options))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):  # noqa: F811
    """The unfused graph of a tiny BERT, sealed."""
    folder = tmp_path_factory.mktemp("typed")
    perform("export.onnx", make_model(folder / "hf"), folder / "onnx", data=str(data), fuse=False)
    artifact.seal(folder / "onnx", format="onnx", task="text-classification", labels=("bad", "good"), base="")
    return folder / "onnx"


def layers_of(folder):
    """What the products of an engine's encoder layers work in, counted."""
    record = engine.read(folder)
    return Counter(kind for name, kind in record.layers.items() if "/encoder/" in name and "MatMul" in name)


@pytest.mark.parametrize("name", TYPED)
def test_a_typed_graph_is_smaller_repeats_itself_and_leaves_its_source_alone(name, plain, data, tmp_path):  # noqa: F811
    before = artifact.digest(plain)
    options = TYPED[name][0]
    first, second = (perform(f"quantize.{name}", plain, tmp_path / side, data=str(data), **options) for side in "ab")
    assert first == second and artifact.digest(tmp_path / "a") == artifact.digest(tmp_path / "b")
    assert first["size_bytes"] < 0.75 * first["size_before_bytes"]
    assert artifact.digest(plain) == before
    assert {f.name for f in (tmp_path / "a").iterdir()} == {f.name for f in plain.iterdir()} - {"manifest.json"}
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["id2label"] == {"0": "bad", "1": "good"}


@pytest.mark.parametrize("name", TYPED)
def test_an_engine_works_in_the_types_that_were_written(name, plain, data, tmp_path):  # noqa: F811
    pytest.importorskip("tensorrt_rtx")
    options, expected = TYPED[name]
    perform(f"quantize.{name}", plain, tmp_path / "graph", data=str(data), **options)
    perform(
        "export.tensorrt", tmp_path / "graph", tmp_path / "engine", data=str(data), compute_capabilities=["8.9"],
        profiles=1, runtime="tensorrt_rtx",
    )  # fmt: skip
    assert layers_of(tmp_path / "engine") == expected
    record = engine.read(tmp_path / "engine")
    assert {t.dtype for t in record.inputs.values()} == {"int64"} and record.outputs["logits"].dtype == "float"


@pytest.mark.parametrize("name", ["int8_static", "fp8"])
def test_attention_is_rounded_when_asked_and_matrices_named_in_keep_are_not(name, plain, data, tmp_path):  # noqa: F811
    options = LOUD | {"attention": True, "keep": ["layer.0/"]}
    metrics = perform(f"quantize.{name}", plain, tmp_path / "graph", data=str(data), **options)
    assert metrics["num_quantized_matmul"] == 6 * (LAYERS - 1)
    assert metrics["num_quantized_mixings"] == 2 * (LAYERS - 1)
    pytest.importorskip("tensorrt_rtx")
    perform(
        "export.tensorrt", tmp_path / "graph", tmp_path / "engine", data=str(data), compute_capabilities=["8.9"],
        profiles=1, runtime="tensorrt_rtx",
    )  # fmt: skip
    kind = {"int8_static": "int8"}.get(name, name)
    assert layers_of(tmp_path / "engine") == {kind: 8 * (LAYERS - 1), "half": 8}
    stayed = engine.read(tmp_path / "engine").high_precision
    assert any("layer.0/" in layer for layer in stayed)
    assert not any("layer.1/" in layer and "MatMul" in layer for layer in stayed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["fp16", "int8_static"])
def test_every_family_can_be_typed(name, family, data, tmp_path):  # noqa: F811
    source = make_model(tmp_path / "hf", family)
    perform("export.onnx", source, tmp_path / "onnx", data=str(data), fuse=False)
    metrics = perform(f"quantize.{name}", tmp_path / "onnx", tmp_path / "out", data=str(data), **TYPED[name][0])
    assert metrics.get("num_quantized_matmul", MATRICES) == MATRICES


def test_matrices_that_blocks_do_not_fill_stay(data, tmp_path):  # noqa: F811
    source = make_model(tmp_path / "hf", heads=(1, 3, 2))  # 8, 24 and 16 rows behind the attention
    perform("export.onnx", source, tmp_path / "onnx", data=str(data), fuse=False)
    options = LOUD | {"block_size": 16}
    metrics = perform("quantize.int4_weights", tmp_path / "onnx", tmp_path / "out", data=str(data), **options)
    assert (metrics["num_quantized_matmul"], metrics["num_unfilled_matmul"]) == (MATRICES - 2, 2)


def test_a_fused_graph_goes_into_half_precision_and_nowhere_else(data, tmp_path):  # noqa: F811
    source = make_model(tmp_path / "hf")
    export_onnx.run(source, tmp_path / "fused", export_onnx.Config(data=str(data)))
    assert perform("quantize.fp16", tmp_path / "fused", tmp_path / "half", data=str(data))["parity_agreement"] == 1
    assert graph.count(graph.read(tmp_path / "half" / graph.FILE))["Attention"] == LAYERS
    for name in TYPED.keys() - {"fp16"}:
        with pytest.raises(ModelError, match=r"has fused nodes \(.*\).* export.onnx with fuse=False"):
            perform(f"quantize.{name}", tmp_path / "fused", tmp_path / name, data=str(data))


@pytest.mark.parametrize("name", ["int8_static", "fp8"])
def test_what_is_served_is_what_the_guard_has_compared(name, plain, data, tmp_path):  # noqa: F811
    step.run_on_folder(f"quantize.{name}", plain, tmp_path / "out", {"data": str(data), **LOUD}, print)
    texts = [" ".join(WORDS[:length]) for length in range(1, 9)]
    tokenizer = hf.tokenizer(tmp_path / "out", 48)
    expected = parity.onnx_logits(tmp_path / "out" / graph.FILE, tokenizer, texts)
    predictor = serve.load(tmp_path / "out")
    assert np.array_equal(predictor.logits(texts), expected)
    options = predictor.session.get_session_options()
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"


def test_one_name_where_a_list_is_needed_is_told_so():
    module = technique.find("quantize.fp8")
    with pytest.raises(
        ConfigError, match=r"option 'keep' is 'layer.0', but input should be a list, as in \['layer.0'\]"
    ):
        technique.configure(module, {"data": "texts", "keep": "layer.0"})


@pytest.mark.parametrize("first", ["fp16", "int8_static"])
def test_what_is_typed_is_not_typed_again(first, plain, data, tmp_path):  # noqa: F811
    perform(f"quantize.{first}", plain, tmp_path / "once", data=str(data), **TYPED[first][0])
    with pytest.raises(ModelError, match="holds no float32 weights|is quantized already"):
        perform("quantize.fp8", tmp_path / "once", tmp_path / "twice", data=str(data))


@pytest.mark.parametrize("name", TYPED)
def test_one_that_strays_is_refused_with_what_to_try(name, plain, data, tmp_path):  # noqa: F811
    limit = {"tolerance": 1e-9} if name in ("fp16", "bf16") else {"kl": 1e-12}
    with pytest.raises(ModelError, match=r"worst on 'word.* (Try|name in `keep`)"):
        perform(f"quantize.{name}", plain, tmp_path, data=str(data), **(TYPED[name][0] | limit))


def test_numbers_that_outgrow_half_precision_are_said_and_bf16_holds_them(data, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    source = make_model(tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    for name in ("intermediate.dense.weight", "intermediate.dense.bias"):
        weights[f"bert.encoder.layer.0.{name}"] *= 1e5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    perform("export.onnx", source, tmp_path / "onnx", data=str(data), fuse=False, tolerance=0.1)
    with pytest.raises(ModelError, match="not finite. Try quantize.bf16, which holds larger numbers"):
        perform("quantize.fp16", tmp_path / "onnx", tmp_path / "half", data=str(data))
    perform("quantize.bf16", tmp_path / "onnx", tmp_path / "brain", data=str(data), tolerance=0.5)


def test_bfloat16_is_not_served_on_a_processor_and_says_why(plain, data, tmp_path):  # noqa: F811
    from slimline import serve

    perform("quantize.bf16", plain, tmp_path / "graph", data=str(data), tolerance=0.3)
    artifact.seal(tmp_path / "graph", format="onnx", task="text-classification", labels=("bad", "good"), base="")
    with pytest.raises(ModelError, match=r"no such arithmetic here: serve an engine built of it, or quantize.fp16"):
        serve.load(tmp_path / "graph")
