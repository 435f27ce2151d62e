"""Engines built for real, ahead of time, on a machine without a GPU: what is in the file is what was asked for."""

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from slimline import artifact, cli, engine, graph, hf, parity, precision, probe, profiles, serve, step
from slimline.errors import ConfigError, ModelError
from slimline.evaluate import latency
from slimline.export import onnx as export_onnx
from slimline.export import tensorrt as export
from tests import graphs, plan
from tests.tiny import make_data, make_tiny, make_tokenizer, seal_tiny

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(engine.gpu() is not None, reason="says what a machine without a GPU can and cannot do")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data.parquet")


@pytest.fixture(scope="module")
def bert(tmp_path_factory, data):
    """A sealed tiny BERT as export.onnx leaves it, unfused."""
    folder = tmp_path_factory.mktemp("bert")
    source = seal_tiny(make_tiny("bert", folder / "hf", layers=2))
    step.run_on_folder("export.onnx", source, folder / "onnx", {"data": str(data), "fuse": False}, print)
    return folder / "onnx"


@pytest.fixture(scope="module")
def built(tmp_path_factory, bert, data):
    """A sealed engine of it for two kinds of GPU, with two profiles."""
    out = tmp_path_factory.mktemp("built") / "engine"
    options = {"data": str(data), "compute_capabilities": ["8.6", "12.0"], "profiles": 2, "max_length": 40}
    step.run_on_folder("export.tensorrt", bert, out, options, print)
    return out


@pytest.fixture
def folder(tmp_path):
    """A folder for a graph made by hand, with tokenizer and settings."""
    folder = tmp_path / "graph"
    folder.mkdir()
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64}))
    return folder


def build(source: Path, data: Path, **options):
    out = source.parent / "engine"
    metrics = export.run(source, out, export.Config(data=str(data), **options))
    return metrics, engine.read(out), (out / engine.FILE).read_bytes()


def test_the_file_holds_the_profiles_inputs_and_outputs_that_were_asked_for(built):
    record, bytes_ = engine.read(built), (built / engine.FILE).read_bytes()
    names = list(record.inputs)
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    asked = [[(p[n].min, p[n].opt, p[n].max) for n in names] for p in record.profiles]
    found = iter(plan.profiles(bytes_))
    assert [list(islice(found, 3)) for _ in asked] == asked and not list(found)
    assert [p["input_ids"].max for p in record.profiles][-1] == (32, 40)
    assert record.outputs == {"logits": engine.Tensor(dtype="float", shape=(-1, 2))}
    assert plan.types(bytes_)["logits.1"] == "float"
    assert plan.version(bytes_) == record.version


def test_token_numbers_stay_int64_in_the_engine(built):
    found = plan.types((built / engine.FILE).read_bytes())
    for name, tensor in engine.read(built).inputs.items():
        assert (tensor.dtype, found[f"{name}.1"]) == ("int64", "int64")


def test_the_file_is_for_the_gpus_that_were_asked_for(built, folder, data):
    assert plan.capabilities((built / engine.FILE).read_bytes()) == {"8.6", "12.0"}
    graphs.encoder(folder / graph.FILE)
    _, record, unasked = build(folder, data, profiles=1)
    assert plan.capabilities(unasked) == set(plan.CAPABILITIES), "all from 8.0 on"
    assert record.runs_on == "compute capability 8.0 and later"


@pytest.mark.parametrize("kind", ["float", "half", "bf16", "int8", "fp8", "int4"])
def test_layers_work_in_the_precision_that_the_graph_says(kind, folder, data):
    graphs.encoder(folder / graph.FILE, kind)
    metrics, record, bytes_ = build(folder, data, compute_capabilities=("8.9",), profiles=1)
    layers = [f"/encoder/layer.{i}/dense/MatMul" for i in range(2)]
    said = {"int4": "float x int4"}.get(kind, kind)
    head = kind if kind in graphs.FLOATS else "float"
    assert record.layers == {layers[0]: said, layers[1]: said, "/classifier/MatMul": head}
    stayed = () if kind in graphs.FLOATS else ("/classifier/MatMul",)
    assert record.high_precision == stayed and metrics["layers_high_precision"] == len(stayed)
    compiled = {"fp8": "fp8_e4m3"}.get(kind, kind)
    assert all(compiled in plan.operands(bytes_, layer) for layer in layers)
    if stayed:
        assert plan.operands(bytes_, "/classifier/MatMul") == {"float"}


def test_a_decoder_takes_a_prompt_at_once_and_then_a_token_at_a_time(folder, data):
    graphs.decoder(folder / graph.FILE)
    _, record, bytes_ = build(folder, data, max_batch=4, opt_batch=1, max_length=32)
    prompt, next_token = record.profiles
    assert prompt["input_ids"].max == prompt["attention_mask"].max == (4, 32)
    assert prompt["past_key_values.1.value"].max == (4, 2, 0, 8)
    assert next_token["input_ids"].max == (4, 1)
    assert next_token["attention_mask"].min == (1, 2) and next_token["attention_mask"].max == (4, 32)
    assert next_token["past_key_values.0.key"].min == (1, 2, 1, 8)
    asked = [(s.min, s.opt, s.max) for p in record.profiles for s in p.values()]
    assert sorted(plan.profiles(bytes_)) == sorted(asked)
    assert set(record.outputs) == {"logits"} | {f"present.{i}.{k}" for i in range(2) for k in ("key", "value")}
    assert record.outputs["present.0.key"].shape == (-1, 2, -1, 8)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "fp8", "int4"])
def test_a_decoder_works_in_the_types_that_precision_writes(kind, folder, data):
    file = graphs.decoder(folder / graph.FILE)
    model = precision.upgrade(graph.read(file))
    floats = kind if kind in ("fp16", "bf16") else "fp16"
    if kind != floats:
        weighed = precision.matrices(model, ())
        if kind != "int4":
            entering = dict.fromkeys(precision.entering(weighed, {}), 4.0)
            precision.quantize_activations(model, weighed, entering, kind, floats)
        precision.quantize_weights(model, weighed, kind, floats, 16)
    precision.lower(model, floats)
    graph.write(model, file)
    _, record, _ = build(folder, data, max_batch=4, opt_batch=1, max_length=32, compute_capabilities=("8.9",))
    rest = {"fp16": "half", "bf16": "bf16"}[floats]
    said = {"fp16": "half", "int4": "half x int4"}.get(kind, kind)
    for i in range(2):
        scope = f"/model/layers.{i}/attn"
        assert {record.layers[f"{scope}/{name}/MatMul"] for name in ("query", "key", "value", "out")} == {said}
        assert {record.layers[f"{scope}/{name}/MatMul"] for name in ("scores", "mix")} == {rest}
    assert record.layers["/head/MatMul"] == rest  # what makes the answer stays
    assert record.inputs["past_key_values.0.key"].dtype == record.outputs["present.1.value"].dtype == "float"
    assert len(record.profiles) == 2


def test_the_same_build_leaves_the_same_bytes(folder, data):
    graphs.encoder(folder / graph.FILE)
    digests = []
    for _ in range(2):
        build(folder, data, profiles=1)
        digests.append(artifact.digest(folder.parent / "engine"))
        shutil.rmtree(folder.parent / "engine")
    assert digests[0] == digests[1]


def test_nothing_is_claimed_about_parity_where_it_was_not_checked(built):
    numbers = artifact.read(built).history[-1].metrics
    assert numbers["parity_checked"] == 0 and not {"parity_max_abs", "parity_agreement"} & numbers.keys()


@pytest.mark.parametrize("method", ["none", "bf16", "int8_static"])
def test_parity_is_asked_within_the_profiles_whatever_the_types(method, bert, data, tmp_path, monkeypatch):
    source, out, asked = bert, tmp_path / "engine", []
    if method != "none":
        source, options = tmp_path / "graph", {"data": str(data)} | ({} if method == "bf16" else {"kl": 1.0})
        step.run_on_folder(f"quantize.{method}", bert, source, options, print)

    def answers(folder, encode, texts, size):
        """What an engine would say: the graph's own answers, in other arithmetic."""
        for text in texts:
            profiles.fitting(engine.read(folder).profiles, {k: v.shape for k, v in encode([text]).items()})
            asked.append(text)
        return parity.onnx_logits(bert / graph.FILE, hf.tokenizer(folder, hf.max_length(folder)), texts)

    monkeypatch.setattr(engine, "refusal", lambda *_: "")
    monkeypatch.setattr(engine, "logits", answers)
    config = export.Config(data=str(data), compute_capabilities=("8.9",), max_length=40)
    found = export.run(source, out, config)
    assert found["parity_checked"] == 1 and found["parity_agreement"] > 0.9 and len(asked) == 65


def test_the_log_of_the_build_is_kept(built):
    assert "Engine generation completed" in (built / export.LOG).read_text()


def test_the_manifest_says_what_built_it_and_for_what(built):
    manifest = artifact.verify(built)
    assert (manifest.format, manifest.labels) == ("tensorrt", ("negative", "positive"))
    assert manifest.runtime["version"] == engine.installed()["tensorrt_rtx"]
    assert manifest.runtime["compute_capabilities"] == ["8.6", "12.0"]
    assert manifest.runtime["profiles"][1]["input_ids"]["max"] == [32, 40]
    assert manifest.weights_bytes == (built / engine.FILE).stat().st_size


def test_a_manifest_from_before_there_were_engines_still_reads(bert, tmp_path):
    old = json.loads((bert / artifact.MANIFEST).read_text())
    del old["runtime"]
    (tmp_path / artifact.MANIFEST).write_text(json.dumps(old))
    assert artifact.read(tmp_path).runtime == {}


def test_show_says_which_runtime_and_which_gpus(built):
    shown = CliRunner().invoke(cli.app, ["show", str(built)])
    assert shown.exit_code == 0, shown.output
    assert "  version " not in shown.output, "nothing is registered"
    version = engine.installed()["tensorrt_rtx"]
    assert f"TensorRT for RTX {version}; compute capability 8.6, 12.0; input_ids (1, 1) to (32," in shown.output


def test_what_is_served_ends_where_the_profiles_end(built):
    assert json.loads((built / "config.json").read_text())["slimline_max_length"] == 40


NO_GPU = r"built by TensorRT for RTX [\d.]+ for compute capability 8.6, 12.0, but this machine has no NVIDIA GPU"


def test_serving_an_engine_without_a_gpu_names_both(built):
    with pytest.raises(ModelError, match=NO_GPU):
        serve.load(built)


def test_timing_an_engine_without_a_gpu_names_both(built, data, tmp_path):
    with pytest.raises(ModelError, match=NO_GPU):
        latency.run(built, tmp_path, latency.Config(data=str(data)))


def test_the_mechanical_blessing_says_why_it_cannot_be_given(built):
    found = probe.probe(built)
    assert not found["ok"] and "but this machine has no NVIDIA GPU" in found["problem"]


def test_a_step_after_the_engine_is_told_where_it_belongs(built, data, tmp_path):
    with pytest.raises(ModelError, match=r"needs onnx but .* is tensorrt. Put this step before export.tensorrt"):
        step.run_on_folder("quantize.int8_dynamic", built, tmp_path / "x", {"data": str(data)}, print)


def test_a_fused_graph_is_refused_with_its_first_foreign_node(tmp_path, data):
    source = seal_tiny(make_tiny("bert", tmp_path / "hf", layers=1))
    export_onnx.run(source, tmp_path / "graph", export_onnx.Config(data=str(data)))
    with pytest.raises(
        ModelError,
        match=r"EmbedLayerNormalization node '.*' of bert.embeddings.word_embeddings. .* com.microsoft: .* fuse=False",
    ):
        build(tmp_path / "graph", data)


def test_an_operator_that_cannot_be_read_is_named_with_its_layer(folder, data):
    graphs.encoder(folder / graph.FILE, odd="Det")
    with pytest.raises(ModelError, match=r"the Det node '/encoder/layer.1/odd/Det' of layer 1\."):
        build(folder, data)
    assert not list((folder.parent / "engine").iterdir())


def test_profiles_that_leave_out_texts_are_refused(bert, data, tmp_path):
    with pytest.raises(ConfigError, match=r"end at 8 tokens but \d+ of \d+ texts are longer, up to (\d+). Raise .* \1"):
        export.run(bert, tmp_path, export.Config(data=str(data), max_length=8))


def test_profiles_beyond_the_model_are_refused(bert, data, tmp_path):
    with pytest.raises(ConfigError, match=r"max_length is 67 but the model reads 66 tokens at most"):
        export.run(bert, tmp_path, export.Config(data=str(data), max_length=67))


def test_a_graph_that_ends_before_its_settings_say_is_refused(bert, data, tmp_path):
    source = tmp_path / "graph"
    shutil.copytree(bert, source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"slimline_max_length": 99}))
    with pytest.raises(ModelError, match=r"cannot take inputs of \(32, 99\): .* 99 != 66.*Lower max_length"):
        build(source, data, profiles=1)


def test_a_graph_of_one_fixed_shape_is_refused(folder, data):
    graphs.encoder(folder / graph.FILE, shape=(1, 16))
    with pytest.raises(ModelError, match=r"the input input_ids \(1, 16\) is fixed where texts differ"):
        build(folder, data)


def test_weights_that_are_not_there_are_refused(folder, data):
    model = onnx.load(graphs.encoder(folder / graph.FILE))
    onnx.save(model, folder / graph.FILE, save_as_external_data=True, location="weights.data", size_threshold=0)
    build(folder, data, profiles=1)
    (folder / "weights.data").unlink()
    with pytest.raises(ModelError, match=r"keeps weights in 'weights.data', which is no plain file of its folder"):
        build(folder, data)


def test_too_little_workspace_is_said(bert, data, tmp_path):
    with pytest.raises(ConfigError, match=r"1 MiB of workspace are too little .* Raise workspace_mib"):
        export.run(bert, tmp_path, export.Config(data=str(data), workspace_mib=1, profiles=1))


@pytest.mark.parametrize(("kind", "old"), [("fp8", "8.0"), ("float", "7.5")])
def test_what_a_gpu_cannot_run_is_not_built_for_it(kind, old, folder, data):
    graphs.encoder(folder / graph.FILE, kind)
    with pytest.raises(ModelError, match=rf"holds what {old} cannot run: .* Choose other compute_capabilities"):
        build(folder, data, compute_capabilities=(old,), profiles=1)


def test_a_gpu_that_the_runtime_does_not_know_is_refused(bert, data, tmp_path):
    with pytest.raises(ConfigError, match=r"no compute capability '9.0'. It has: 7.5, 8.0, 8.6, 8.9, 12.0"):
        export.run(bert, tmp_path, export.Config(data=str(data), compute_capabilities=("9.0",)))


@pytest.mark.parametrize(
    ("option", "value"),
    [("version_compatible", True), ("hardware_compatible", True), ("timing_cache", "an earlier engine")],
)
def test_what_tensorrt_for_rtx_lacks_is_refused(option, value, bert, tmp_path):
    config = export.Config(data="texts", runtime="tensorrt_rtx", **{option: value})
    with pytest.raises(ConfigError, match=rf"TensorRT for RTX knows no {option}\. "):
        export.run(bert, tmp_path, config)


def test_stripping_weights_needs_a_gpu(bert, tmp_path):
    with pytest.raises(ConfigError, match=r"strips weights only on a machine with a GPU, and this one has none"):
        export.run(bert, tmp_path, export.Config(data="texts", stripped=True))


def test_data_centre_tensorrt_cannot_build_without_a_gpu():
    with pytest.raises(ConfigError, match=r"TensorRT builds on the GPU it builds for, and this machine has none"):
        export.check(export.Config(data="texts"), "tensorrt", None)


def test_data_centre_tensorrt_builds_for_no_other_gpu():
    with pytest.raises(ConfigError, match=r"this machine's GPU \(8.0\), not for \('8.9',\)"):
        export.check(
            export.Config(data="texts", compute_capabilities=("8.9",)), "tensorrt", engine.Gpu("NVIDIA A100", "8.0")
        )


def test_without_tensorrt_it_is_said_what_to_install(bert, tmp_path, monkeypatch):
    for name in engine.RUNTIMES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"TensorRT is not installed here. .* tensorrt-cu12 or tensorrt-rtx-cu12"):
        export.run(bert, tmp_path, export.Config(data="texts"))
    with pytest.raises(ConfigError, match=r"TensorRT for RTX is not installed here. .* tensorrt-rtx-cu12\."):
        export.run(bert, tmp_path, export.Config(data="texts", runtime="tensorrt_rtx"))


def test_serving_other_formats_needs_no_tensorrt(bert, monkeypatch):
    for name in (*engine.RUNTIMES, "cuda", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    assert serve.load(bert).runtime.endswith("(CPUExecutionProvider)")
