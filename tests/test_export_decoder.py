"""A language model's graph says what the model says, with and without a past, and becomes an engine."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from slimline import artifact, decoder, decoder_graph, engine, graph, parity, precision, step, technique
from slimline.errors import ConfigError, ModelError
from slimline.export import onnx as export
from slimline.export import tensorrt
from tests.decoders import KINDS, make_decoder, make_documents, seal_decoder
from tests.test_decoder import configure, tokens

LAYERS = 2
QUICK = ("llama", "gpt2")
"""Exported in every test run; the exporter takes seconds for each."""
MORE = {"mistral": {"sliding_window": 6}, "gemma2": {"sliding_window": 6}, "gemma3_text": {"sliding_window": 6}}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, documents):
    """(source, graph, metrics) of a family, exported once."""
    done = {}

    def of(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            source = seal_decoder(make_decoder(kind, folder / "hf", layers=LAYERS, **MORE.get(kind, {})))
            options = {"data": str(documents), "texts": 20, "max_length": 64}
            metrics = step.run_on_folder("export.onnx", source, folder / "onnx", options, lambda event: None)
            done[kind] = source, folder / "onnx", metrics
        return done[kind]

    return of


def session(folder):
    return onnxruntime.InferenceSession(str(folder / graph.FILE), providers=["CPUExecutionProvider"])


def ask(folder, ids_BS, mask_BT, past=None):
    """The graph's logits, and its cache as the next call's inputs."""
    runtime = session(folder)
    given = past or {
        value.name: np.zeros((len(ids_BS), value.shape[1], 0, value.shape[3]), np.float32)
        for value in runtime.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in runtime.get_outputs()]
    answers = runtime.run(names, {"input_ids": ids_BS, "attention_mask": mask_BT, **given})
    cache = {name.replace("present.", "past_key_values."): value for name, value in zip(names[1:], answers[1:])}
    return answers[0], cache


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_token_by_token_the_graph_says_what_the_model_says_of_the_whole(kind, exported):
    source, folder, metrics = exported(kind)
    assert metrics["parity_max_abs"] < 1e-4 and metrics["parity_agreement"] == 1 and metrics["layers"] == LAYERS
    whole = tokens(3, 14).numpy()
    with torch.no_grad():
        expected = decoder.load(source)(input_ids=torch.from_numpy(whole), use_cache=False).logits.numpy()
    found, past = ask(folder, whole[:, :9], np.ones((3, 9), np.int64))
    steps = [found]
    for at in range(9, 14):
        found, past = ask(folder, whole[:, at : at + 1], np.ones((3, at + 1), np.int64), past)
        steps.append(found)
    assert np.abs(np.concatenate(steps, axis=1) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", QUICK)
def test_padding_on_either_side_changes_nothing(kind, exported):
    _, folder, _ = exported(kind)
    ids = tokens(1, 6).numpy()
    alone, past = ask(folder, ids, np.ones_like(ids))
    after, _ = ask(folder, ids[:, :1], np.ones((1, 7), np.int64), past)
    for left in (True, False):
        padded, mask = np.full((2, 2, 9), 7)
        where = slice(3, 9) if left else slice(0, 6)
        padded[0, where], mask[:] = ids, 0
        mask[0, where], mask[1] = 1, 1
        found, cache = ask(folder, padded, mask)
        assert np.abs(found[0, where] - alone[0]).max() < 1e-5
        more = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
        found, _ = ask(folder, np.repeat(ids[:, :1], 2, axis=0), more, cache)
        assert np.abs(found[0] - after[0]).max() < 1e-5


def test_inputs_and_outputs_are_named_and_open_as_runtimes_of_decoders_expect(exported):
    _, folder, _ = exported("llama")
    model = graph.read(folder / graph.FILE)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    parts = [(i, part) for i in range(LAYERS) for part in ("key", "value")]
    assert shapes == {
        "input_ids": ["batch", "new"],
        "attention_mask": ["batch", "total"],
        "logits": ["batch", "new", 29],
        **{f"past_key_values.{i}.{part}": ["batch", 2, "past", 16] for i, part in parts},
        **{f"present.{i}.{part}": ["batch", 2, "total", 16] for i, part in parts},
    }
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_products_bear_the_names_of_their_maps_so_that_each_can_be_kept(exported):
    _, folder, _ = exported("llama")
    model = precision.plain(folder)
    names = {f"/model/layers.{i}/{name.replace('.', '/')}/MatMul" for i in range(LAYERS) for name in _maps("llama")}
    products = {node.name for node in model.graph.node if node.op_type == "MatMul"}
    assert names < products
    assert {graph.place(node) for node in model.graph.node if node.name in names} == {"layer 0", "layer 1"}
    assert len(precision.matrices(model, ("layers.0/mlp",))) == len(names) - 3


def _maps(kind):
    return decoder.FAMILIES[kind].maps


def test_a_head_that_is_the_embedding_is_stored_once(exported):
    _, folder, _ = exported("gpt2")
    sizes = [list(t.dims) for t in graph.read(folder / graph.FILE).graph.initializer]
    assert sizes.count([29, 64]) == 1 and [64, 29] not in sizes


def test_what_lies_beside_the_graph_is_what_a_server_needs(exported):
    source, folder, _ = exported("llama")
    manifest = artifact.read(folder)
    assert (manifest.format, manifest.task) == ("onnx", decoder.TASK)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["slimline_max_length"] == 64 and settings["model_type"] == "llama"
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_cache_in_the_wrong_place_is_caught(exported, tmp_path, documents):
    source, folder, _ = exported("llama")
    model = graph.read(folder / graph.FILE)
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == "past_key_values.1.value":
                node.input[at] = "past_key_values.1.key"
    onnx.save(model, tmp_path / "swapped.onnx")
    prompts = [[1, 2, 3, 4], [5, 6]]
    found = decoder_graph.difference(decoder.load(source), tmp_path / "swapped.onnx", prompts, "")
    with pytest.raises(ModelError, match="the converted graph differs from its source by"):
        parity.require_equal(found, ["one", "two"], 1e-3)


def test_a_model_that_rotates_by_the_length_of_the_text_is_refused(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "llama")
    configure(source, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(ModelError, match=r"rotates by dynamic, which depends on how long a text is"):
        export.run(source, tmp_path / "out", export.Config(data=str(documents)))


def test_more_tokens_than_the_model_has_places_are_refused(tmp_path, documents):
    source = make_decoder("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"max_length is 200 but the model reads 128 tokens at most. Lower it"):
        export.run(source, tmp_path / "out", export.Config(data=str(documents), max_length=200))


def test_what_the_exporter_cannot_is_one_sentence(tmp_path, documents, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Failed to\n  decompose")

    monkeypatch.setattr(torch.onnx, "export", fails)
    source = make_decoder("llama", tmp_path / "llama")
    with pytest.raises(ModelError, match=r"a llama model of this form cannot be exported by PyTorch .*: Failed to dec"):
        export.run(source, tmp_path / "out", export.Config(data=str(documents)))


def _only_small(function):
    """The function, which does what it does in C++ with a graph of 2 GB: it fails."""

    def small(model, *more, **others):
        assert not graph.too_large(model)
        return function(model, *more, **others)

    return small


@pytest.mark.skipif(engine.gpu() is not None, reason="builds ahead of time")
def test_a_graph_that_one_file_cannot_hold_keeps_its_weights_beside_it(exported, documents, tmp_path, monkeypatch):
    source, small, _ = exported("llama")
    monkeypatch.setattr(graph, "LARGEST", 60_000)
    for place, name in ((onnx.shape_inference, "infer_shapes"), (onnx.version_converter, "convert_version")):
        monkeypatch.setattr(place, name, _only_small(getattr(place, name)))
    place, options = {"small": small}, {"data": str(documents), "texts": 20}
    steps = {
        "export.onnx": (source, {"max_length": 64}),
        "quantize.fp16": ("export.onnx", {"tolerance": 0.1}),
        "quantize.bf16": ("export.onnx", {}),
        "quantize.int8_static": ("export.onnx", {"agreement": 0.0, "kl": 1.0}),
    }
    for name, (before, more) in steps.items():
        place[name] = tmp_path / name
        step.run_on_folder(name, place.get(before, before), place[name], options | more, lambda event: None)
        files = {path: file.size_bytes for path, file in artifact.read(place[name]).files.items()}
        assert files[graph.FILE] < files[graph.DATA]
        assert artifact.read(place[name]).history[-1].metrics["size_bytes"] == files[graph.FILE] + files[graph.DATA]
    there, here = (onnx.load(str(place[name] / graph.FILE)) for name in ("small", "export.onnx"))
    weights = [{t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer} for model in (there, here)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    pytest.importorskip("tensorrt_rtx")
    config = tensorrt.Config(data=str(documents), max_batch=2, opt_batch=1, compute_capabilities=("8.9",))
    tensorrt.run(place["quantize.fp16"], tmp_path / "engine", config)
    assert engine.read(tmp_path / "engine").layers
    with pytest.raises(ModelError, match="is too large for ONNX Runtime's quantizer"):
        step.run_on_folder("quantize.int8_dynamic", place["export.onnx"], tmp_path / "no", options, lambda event: None)


TYPED = {
    "fp16": ({"tolerance": 0.1}, "half", "half"),
    "int8_static": ({"agreement": 0.0, "kl": 1.0}, "int8", "half"),
    "int4_weights": ({"agreement": 0.0, "kl": 1.0, "block_size": 32}, "half x int4", "half"),
}


@pytest.mark.skipif(engine.gpu() is not None, reason="builds ahead of time")
@pytest.mark.parametrize("method", TYPED)
def test_it_is_typed_and_built_into_an_engine_with_a_profile_for_prompts_and_one_for_tokens(
    method, exported, documents, tmp_path
):
    pytest.importorskip("tensorrt_rtx")
    _, folder, _ = exported("llama")
    options, weighed, rest = TYPED[method]
    (tmp_path / "typed").mkdir()
    module = technique.find(f"quantize.{method}")
    metrics = module.run(folder, tmp_path / "typed", module.Config(data=str(documents), **options))
    assert metrics["size_bytes"] < 0.75 * metrics["size_before_bytes"]
    config = tensorrt.Config(data=str(documents), max_batch=4, opt_batch=1, compute_capabilities=("8.9",))
    tensorrt.run(tmp_path / "typed", tmp_path / "engine", config)
    record = engine.read(tmp_path / "engine")
    products = {name: kind for name, kind in record.layers.items() if "MatMul" in name}
    assert {kind for name, kind in products.items() if "_proj" in name} == {weighed}
    assert {kind for name, kind in products.items() if "_proj" not in name} == {rest}
    prompt, token = record.profiles
    assert prompt["input_ids"].max == (4, 64) and prompt["past_key_values.0.key"].max == (4, 2, 0, 16)
    assert token["input_ids"].max == (4, 1) and token["past_key_values.1.value"].max == (4, 2, 63, 16)
    assert set(record.outputs) == {"logits"} | {f"present.{i}.{k}" for i in range(LAYERS) for k in ("key", "value")}
