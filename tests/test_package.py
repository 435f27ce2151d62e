"""Packages are what their systems' own schemas allow, and answer as the model does in slimline."""

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from google.protobuf import json_format, text_format
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from slimline import artifact, cli, engine, hf, package, serve, step, store
from slimline.errors import ConfigError, ModelError, StoreError
from tests import words
from tests.tiny import KINDS, LABELS, make_data, make_tiny, make_tokenizer, seal_tiny

TEXTS = ["good film", "a superb film and a moving story", "bad " * 100, "", " \n", "🙂\u200d", "\x00", "مرحبا", "dull"]
URI = "s3://models/words"


@pytest.fixture(scope="module")
def simple(tmp_path_factory):
    """Two inputs, and answers that can be worked out in the head."""
    return words.onnx_model(tmp_path_factory.mktemp("simple") / "words")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A sealed tiny BERT as export.onnx leaves it, with token types and fused."""
    folder = tmp_path_factory.mktemp("bert")
    source = seal_tiny(make_tiny("bert", folder / "hf", layers=2))
    data = make_data(folder / "data.parquet", rows=240)
    step.run_on_folder("export.onnx", source, folder / "tiny", {"data": str(data)}, print)
    return folder / "tiny"


def tiny(folder, kind="bert", **config):
    """A sealed hf model, with a word more in its config."""
    made = make_tiny(kind, folder / kind)
    told = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(told | config))
    return seal_tiny(made)


def pruned(folder):
    """A tiny BERT whose layer 1 has lost one of four heads."""
    made = make_tiny("bert", folder / "pruned")
    weights = load_file(made / "model.safetensors")
    for name in list(weights):
        if "layer.1.attention.self" in name:
            weights[name] = weights[name][:24].copy()
        if name.endswith("layer.1.attention.output.dense.weight"):
            weights[name] = weights[name][:, :24].copy()
    save_file(weights, made / "model.safetensors")
    return seal_tiny(made)


def built(folder, **changed):
    """What export.tensorrt leaves of a model with two inputs, but for the engine itself."""
    folder.mkdir()
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "slimline_max_length": 40}))
    (folder / engine.FILE).write_bytes(b"an engine")
    shape = {"min": (1, 1), "opt": (1, 9), "max": (16, 40)}
    names = ("input_ids", "attention_mask")
    record = {
        "runtime": "tensorrt", "version": "10.9.0.34", "compute_capabilities": ("8.9",),
        "inputs": {name: {"dtype": "int32", "shape": (-1, -1)} for name in names},
        "outputs": {"logits": {"dtype": "half", "shape": (-1, 2)}},
        "profiles": [dict.fromkeys(names, shape)] * 2,
    } | changed  # fmt: skip
    (folder / engine.RECORD).write_text(engine.Record.model_validate(record).model_dump_json())
    artifact.seal(
        folder, format="tensorrt", task="text-classification", labels=LABELS, base="", runtime=engine.facts(folder)
    )
    return folder


def beside(package_name, file):
    """A file of an installed package, found without running the package."""
    return Path(importlib.util.find_spec(package_name).submodule_search_locations[0]) / file


@pytest.fixture(scope="module")
def schema():
    """Triton's own ModelConfig, without the gRPC client around it."""
    spec = importlib.util.spec_from_file_location(
        "model_config_pb2", beside("tritonclient", "grpc/model_config_pb2.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


class Triton:
    """A repository, its configs read by Triton's schema, whose steps run here instead of in a server."""

    def __init__(self, root, schema, monkeypatch):
        self.root, self.patch = root, monkeypatch
        self.configs = {
            file.parent.name: text_format.Parse(file.read_text(encoding="utf-8"), schema())
            for file in root.glob("*/config.pbtxt")
        }

    def python(self, name):
        """The Python step of this name, as Triton's stub loads it."""
        backend = types.ModuleType("triton_python_backend_utils")
        backend.triton_string_to_numpy = {"TYPE_INT64": np.int64, "TYPE_INT32": np.int32}.get
        backend.get_input_tensor_by_name = lambda request, key: request[key]
        backend.Tensor = lambda key, value: types.SimpleNamespace(name=key, as_numpy=lambda: value)
        backend.TritonError = RuntimeError
        backend.InferenceResponse = lambda output_tensors, error=None: (output_tensors, error)
        self.patch.setitem(sys.modules, backend.__name__, backend)
        self.patch.setattr(sys, "path", sys.path[:])
        (file,) = (self.root / name).glob("*/model.py")
        spec = importlib.util.spec_from_file_location(f"step_{name}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        if hasattr(model, "initialize"):
            config = json_format.MessageToDict(self.configs[name], preserving_proto_field_name=True)
            model.initialize({"model_config": json.dumps(config)})

        def run(arrays):
            request = {key: backend.Tensor(key, value) for key, value in arrays.items()}
            ((tensors, error),) = model.execute([request])
            if error:
                raise error
            return {tensor.name: tensor.as_numpy() for tensor in tensors}

        return run

    def graph(self, name):
        (file,) = (self.root / name).glob("*/model.onnx")
        session = onnxruntime.InferenceSession(str(file))
        outputs = [output.name for output in self.configs[name].output]
        return lambda arrays: dict(zip(outputs, session.run(outputs, arrays), strict=True))

    def answer(self, name, texts):
        """What the ensemble says, wired as its config says."""
        pool = {"text": np.array([[text.encode()] for text in texts], dtype=object)}
        for part in self.configs[name].ensemble_scheduling.step:
            kind = self.configs[part.model_name]
            run = self.python(part.model_name) if kind.backend == "python" else self.graph(part.model_name)
            found = run({inner: pool[outer] for inner, outer in part.input_map.items()})
            pool |= {outer: found[inner] for inner, outer in part.output_map.items()}
        return pool


@pytest.fixture
def repository(schema, monkeypatch, tmp_path):
    def make(source, **options):
        return Triton(package.write(str(source), "triton", tmp_path / "out", **options).folder, schema, monkeypatch)

    return make


# Triton


def test_the_entry_takes_text_and_gives_label_and_score(repository, simple):
    configs = repository(simple, name="reviews").configs
    assert sorted(configs) == ["reviews", "reviews_labels", "reviews_model", "reviews_tokenizer"]
    entry = configs["reviews"]
    told = [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in (*entry.input, *entry.output)]
    types_ = type(entry.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    text, score = types_["TYPE_STRING"].number, types_["TYPE_FP32"].number
    assert told == [("text", text, [1]), ("label", text, [1]), ("score", score, [1])]
    assert entry.platform == "ensemble" and entry.max_batch_size == 32


def test_every_config_names_its_folder_the_ref_and_the_digest(repository, simple):
    digest = artifact.read(simple).digest
    made = repository(simple)
    for name, config in made.configs.items():
        assert config.name == name
        assert config.parameters["slimline.ref"].string_value == str(simple)
        assert config.parameters["slimline.digest"].string_value == digest
        assert [p.name for p in (made.root / name).iterdir() if p.is_dir()] == ["1"]
        assert list((made.root / name / "1").iterdir()), "object stores keep no empty folder"


@pytest.mark.parametrize("which", ["simple", "bert"])
def test_the_steps_answer_as_slimline_does(which, repository, request):
    source = request.getfixturevalue(which)
    predictor = serve.load(source)
    made = repository(source, name="m")
    tokens = hf.tokenizer(source, hf.max_length(source)).encode(TEXTS)
    found = made.answer("m", TEXTS)
    assert set(predictor.inputs) == {tensor.name for tensor in made.configs["m_model"].input}
    for name in predictor.inputs:
        np.testing.assert_array_equal(found[name], tokens[name])
        assert found[name].dtype == tokens[name].dtype
    told = [predictor.predict([text])[0] for text in TEXTS]
    assert [label.decode() for (label,) in found["label"]] == [one["label"] for one in told]
    np.testing.assert_allclose(found["score"][:, 0], [one["score"] for one in told], atol=1e-6)
    assert found["score"].shape == (len(TEXTS), 1) and found["score"].dtype == np.float32


def test_bytes_that_are_no_text_are_answered(repository, simple):
    run = repository(simple, name="m").python("m_tokenizer")
    assert run({"text": np.array([[b"good \xff\xfe"]], dtype=object)})["input_ids"][0, 1] == words.WORDS.index("good")


def test_answers_that_are_not_finite_are_an_error(repository, tmp_path):
    made = repository(words.onnx_model(tmp_path / "m", unknown=float("nan")))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        made.answer("m", ["unheard of"])


def test_the_tokenizer_step_brings_its_library_which_needs_nothing_else(repository, simple):
    folder = repository(simple, name="m").root / "m_tokenizer" / "1"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tokenizers;"
        "print(tokenizers.__file__, tokenizers.Tokenizer.from_file(sys.argv[1] + '/tokenizer.json').encode('good').ids)"
    )
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code, str(folder)]  # -S: no installed packages
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [str(folder / "tokenizers" / "__init__.py"), "[2, 4, 3]\n"]


def test_a_tokenizers_library_for_one_python_only_is_not_copied(simple, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    found = types.SimpleNamespace(origin=str(tmp_path / "here" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ConfigError, match="built for one Python only, not for Triton's. Install PyPI's own"):
        package.write(str(simple), "triton", tmp_path / "out")


def test_what_must_be_answered_alone_is_sent_alone(repository, tmp_path):
    source = words.onnx_model(tmp_path / "m", history=("quantize.int8_dynamic",))
    configs = repository(source).configs
    assert {config.max_batch_size for config in configs.values()} == {1}
    assert not configs["m_model"].HasField("dynamic_batching")


def test_requests_are_joined_at_the_model_where_that_changes_nothing(repository, simple):
    joined = {name for name, c in repository(simple, name="m").configs.items() if c.HasField("dynamic_batching")}
    assert joined == {"m_model"}


def test_an_engine_is_a_plan_with_its_profiles_and_its_own_types(repository, tmp_path):
    made = repository(built(tmp_path / "m"))
    config = made.configs["m_model"]
    assert config.platform == "tensorrt_plan" and config.max_batch_size == 16
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert (made.root / "m_model" / "1" / "model.plan").read_bytes() == b"an engine"
    found = made.python("m_tokenizer")({"text": np.array([[b"a fine film"]], dtype=object)})
    assert {array.dtype for array in found.values()} == {np.dtype(np.int32)}
    logits = np.array([[0, 2], [3, -1]], dtype=np.float16)
    assert made.python("m_labels")({"logits": logits})["label"].tolist() == [[b"positive"], [b"negative"]]


def test_an_engine_for_later_versions_is_started_as_one(tmp_path):
    made = package.write(str(built(tmp_path / "m", version_compatible=True)), "triton", tmp_path / "out")
    assert made.start.endswith(" --model-repository=/models --backend-config=tensorrt,version-compatible=true")
    assert "--gpus all" in made.start


def test_weights_beside_a_graph_come_along(tmp_path):
    import onnx

    source = words.onnx_model(tmp_path / "m")
    model = onnx.load(source / "model.onnx")
    for tensor in model.graph.initializer:  # only raw bytes are kept outside
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    where = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(model, source / "model.onnx", **where)
    artifact.seal(source, format="onnx", task="text-classification", labels=words.LABELS, base="")
    package.write(str(source), "triton", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out" / "m_model" / "1").iterdir()}
    assert names == {"model.onnx", "w.bin"}


def test_a_registered_version_is_the_version_that_triton_serves(fresh_store, schema, monkeypatch, tmp_path):
    manifest = artifact.read(words.onnx_model(tmp_path / "model"))
    with store.step_run("made", {store.PREFIX + "key": "k"}, {}) as run_id:
        ref = store.save(run_id, tmp_path / "model", manifest)
    for key in ("first", "second"):
        store.register("reviews", ref, key, {}, "")
    store.set_alias("reviews", "champion", 2)
    shown = CliRunner().invoke(cli.app, ["package", "models:/reviews@champion", "--for", "triton", "--json"])
    told = json.loads(shown.output)
    assert (told["folder"], told["name"], told["version"]) == ("reviews-triton", "reviews", 2)
    made = Triton(tmp_path / "reviews-triton", schema, monkeypatch)
    assert {p.parent.name for p in made.root.glob("*/2")} == set(made.configs)
    assert {part.model_version for part in made.configs["reviews"].ensemble_scheduling.step} == {2}
    assert made.configs["reviews"].parameters["slimline.ref"].string_value == "models:/reviews/2"
    assert made.answer("reviews", ["good film"])["label"] == b"good"


# KServe


@pytest.fixture
def kserve(monkeypatch):
    """KServe's own classes, without its server, which its __init__ would import."""
    bare = types.ModuleType("kserve")
    bare.__path__ = [str(beside("kserve", ""))]
    monkeypatch.setitem(sys.modules, "kserve", bare)
    return importlib.import_module("kserve.models")


def typed(value, kind, models):
    """What KServe's and Kubernetes' classes make of YAML. AssertionError for a key or a value that they do not take."""
    import kubernetes.client

    if kind.startswith("list["):
        return [typed(item, kind[5:-1], models) for item in value]
    if kind.startswith("dict("):
        return {key: typed(item, kind[5:-1].partition(", ")[2], models) for key, item in value.items()}
    if plain := {"str": str, "bool": bool, "int": int, "object": object}.get(kind):
        assert isinstance(value, plain), f"{value!r} is no {kind}"
        return value
    model = getattr(models, kind, None) or getattr(kubernetes.client, kind)
    attributes = {key: name for name, key in model.attribute_map.items()}
    assert value.keys() <= attributes.keys(), f"{kind} has no {sorted(value.keys() - attributes.keys())}"
    given = {attributes[k]: typed(v, model.openapi_types[attributes[k]], models) for k, v in value.items()}
    return model(**given)  # which raises for what is required and missing


def service(folder, models):
    content = yaml.safe_load((folder / "inferenceservice.yaml").read_text(encoding="utf-8"))
    return typed(content, "V1beta1InferenceService", models)


def test_a_graph_is_a_service_on_triton(kserve, simple, schema, monkeypatch, tmp_path):
    made = package.write(str(simple), "kserve", tmp_path / "out", storage_uri=URI)
    found = service(made.folder, kserve)
    assert (found.api_version, found.metadata.name) == ("serving.kserve.io/v1beta1", "words")
    notes = found.metadata.annotations
    assert (notes["slimline/ref"], notes["slimline/digest"]) == (str(simple), artifact.read(simple).digest)
    predictor = found.spec.predictor
    model = predictor.model
    assert (model.model_format.name, model.protocol_version, model.storage_uri) == ("triton", "v2", URI)
    assert predictor.security_context.run_as_non_root and not model.security_context.allow_privilege_escalation
    assert model.resources.limits == {"memory": "3Gi"}
    assert Triton(made.folder / "repository", schema, monkeypatch).answer("words", ["good"])["label"] == b"good"
    assert made.before == f"Copy what is in {made.folder}/repository to {URI}."
    assert made.start == f"kubectl apply -f {made.folder}/inferenceservice.yaml"


def test_a_schema_without_a_key_would_say_so(kserve):
    with pytest.raises(AssertionError, match="V1beta1ModelFormat has no"):
        typed({"name": "triton", "versoin": "2"}, "V1beta1ModelFormat", kserve)


def test_an_engine_asks_for_a_gpu_and_the_image_that_has_its_tensorrt(kserve, tmp_path):
    source = built(tmp_path / "m", version_compatible=True)
    package.write(str(source), "kserve", tmp_path / "out", storage_uri=URI, runtime_version="25.03-py3")
    model = service(tmp_path / "out", kserve).spec.predictor.model
    assert model.runtime_version == "25.03-py3"
    assert model.resources.limits["nvidia.com/gpu"] == model.resources.requests["nvidia.com/gpu"] == "1"
    assert model.args == ["--backend-config=tensorrt,version-compatible=true"]


def test_memory_grows_with_the_weights(simple):
    from slimline.package import kserve as target

    model = package.read(str(simple))
    files = {"model.onnx": artifact.File(size_bytes=2 << 30, sha256="")}
    large = model._replace(manifest=model.manifest.model_copy(update={"files": files}))
    assert target.resources(large)["requests"]["memory"] == "8Gi"  # 2 + 3 x 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_hf_model_answers_in_plain_transformers_as_in_slimline(kind, kserve, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = tiny(tmp_path, kind)
    package.write(str(source), "kserve", tmp_path / "out", storage_uri=URI)
    spec = service(tmp_path / "out", kserve).spec.predictor.model
    assert spec.model_format.name == "huggingface" and "--task=sequence_classification" in spec.args
    folder = tmp_path / "out" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert type(model).__name__ == model.config.architectures[0]
    assert model.config.id2label == dict(enumerate(LABELS))
    predictor = serve.load(source)
    for lower in (False, True):  # KServe always says one of the two
        tokenizer = AutoTokenizer.from_pretrained(folder, do_lower_case=lower)
        given = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
        logits = model(**given).logits.detach().numpy()
        np.testing.assert_allclose(logits, predictor.logits(TEXTS), atol=1e-4)


# vLLM

# Of vLLM 0.33.0, vllm/engine/arg_utils.py and vllm/utils/argparse_utils.py, which take them from the file of --config.
VLLM_ARGUMENTS = {"model", "served-model-name", "runner", "max-model-len", "dtype", "quantization"}
# As quantize.llmcompressor leaves it, written by compressed-tensors 0.20.
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": [],
    "kv_cache_scheme": None, "global_compression_ratio": None,
    "config_groups": {
        "layers": {
            "targets": ["re:.*encoder[.]layer[.].*"], "format": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"},
            "input_activations": None, "output_activations": None,
        }
    },
}  # fmt: skip


def vllm_arguments(folder):
    return yaml.safe_load((folder / "vllm.yaml").read_text(encoding="utf-8"))


def test_vllm_gets_a_plain_folder_and_its_arguments(tmp_path):
    from transformers import AutoModelForSequenceClassification

    source = tiny(tmp_path, "roberta", slimline_max_length=24)
    made = package.write(str(source), "vllm", tmp_path / "out", name="reviews")
    assert vllm_arguments(made.folder) == {
        "model": "model", "served-model-name": "reviews", "runner": "pooling", "max-model-len": 24, "dtype": "float32",
    }  # fmt: skip
    assert made.start == f"cd {tmp_path / 'out'} && vllm serve --config vllm.yaml"
    assert artifact.read(made.folder) == artifact.read(source)
    config = json.loads((made.folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["RobertaForSequenceClassification"]
    _, report = AutoModelForSequenceClassification.from_pretrained(made.folder / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]


def test_packed_weights_are_served_in_half_precision_and_described_as_they_were(tmp_path):
    made = package.write(str(tiny(tmp_path, "roberta", quantization_config=PACKED)), "vllm", tmp_path / "out")
    found = vllm_arguments(made.folder)
    assert (found["quantization"], found["dtype"]) == ("compressed-tensors", "float16")
    assert found.keys() <= VLLM_ARGUMENTS
    assert json.loads((made.folder / "model" / "config.json").read_text())["quantization_config"] == PACKED


def test_packed_weights_in_groups_that_vllm_has_no_kernel_for_are_refused(tmp_path):
    groups = {"layers": {"targets": [], "weights": {"group_size": 16}}}
    source = tiny(tmp_path, quantization_config=PACKED | {"config_groups": groups})
    with pytest.raises(ModelError, match=r"scales for 16 columns each, .* 32, 64, 128\. Quantize it again"):
        package.write(str(source), "vllm", tmp_path / "out")


def test_weights_packed_in_another_way_are_refused(tmp_path):
    source = tiny(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"packed as gptq None, not by quantize\.llmcompressor"):
        package.write(str(source), "vllm", tmp_path / "out")


def test_packed_weights_are_not_for_plain_transformers(tmp_path):
    source = tiny(tmp_path, quantization_config=PACKED)
    with pytest.raises(ModelError, match="packed weights, which transformers alone does not load. Package it for vllm"):
        package.write(str(source), "kserve", tmp_path / "out", storage_uri=URI)


@pytest.mark.parametrize("kind", ["electra", "distilbert"])
def test_a_family_that_vllm_does_not_serve_is_refused(kind, tmp_path):
    with pytest.raises(ModelError, match=rf"is a {kind} model, and of those vLLM .* bert, roberta, xlm-roberta"):
        package.write(str(tiny(tmp_path, kind)), "vllm", tmp_path / "out")


@pytest.mark.parametrize("target", ["vllm", "kserve"])
def test_a_pruned_model_is_refused_where_layers_are_built_from_the_config(target, tmp_path):
    uri = URI if target == "kserve" else ""
    with pytest.raises(
        ModelError,
        match=r"is pruned \(layer 1 has 24 rows in attention.self.key, not 32\), and .* Put export.onnx after it",
    ):
        package.write(str(pruned(tmp_path)), target, tmp_path / "out", storage_uri=uri)


# What is refused, and what is left


def refused(source, target="triton", **options):
    out = Path(source).parent / "out"
    with pytest.raises((ConfigError, ModelError, StoreError)) as error:
        package.write(str(source), target, out, **options)
    assert not out.exists() and not [p.name for p in out.parent.iterdir() if p.name.startswith(".")]
    return str(error.value)


def test_a_target_that_nobody_knows_is_refused_with_those_that_there_are(simple):
    assert refused(simple, "seldon") == "nothing is packaged for 'seldon'. There is: triton, kserve, vllm."


def test_a_folder_that_exists_is_left_as_it_is(simple, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match=r"mine exists already\. Remove it, or name another folder with -o\."):
        package.write(str(simple), "triton", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_triton_runs_no_hf_model(tmp_path):
    assert "is an hf model, and Triton runs graphs and engines. Put export.onnx after it." in refused(tiny(tmp_path))


def test_vllm_runs_no_graph(simple):
    assert refused(simple, "vllm").endswith("is onnx, and vLLM loads hf models. Package it with --for triton.")


def test_triton_loads_no_engine_of_tensorrt_for_rtx(tmp_path):
    said = refused(built(tmp_path / "m", runtime="tensorrt_rtx", version="1.7"))
    assert "was built by TensorRT for RTX 1.7, whose engines Triton does not load. Build it with" in said


def test_triton_runs_no_graph_in_bfloat16(simple, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(simple, kept)
    before = artifact.read(simple)
    stage = artifact.Stage(technique="quantize.bf16", config={}, metrics={}, parent=before.digest)
    (kept / artifact.MANIFEST).unlink()
    artifact.seal(
        kept, format="onnx", task=before.task, labels=before.labels, base=before.base,
        history=(*before.history, stage),
    )  # fmt: skip
    assert "is kept in bfloat16, which ONNX Runtime multiplies on no processor. Package an engine" in refused(kept)


def test_a_request_is_as_large_as_the_largest_profile(schema, monkeypatch, tmp_path):
    sizes = [{"input_ids": {"min": (1, 1), "opt": (1, 8), "max": (1, 64)}}]
    sizes.append({"input_ids": {"min": (2, 1), "opt": (8, 8), "max": (24, 64)}})
    inputs = {"input_ids": {"dtype": "int64", "shape": (-1, -1)}}
    made = package.write(
        str(built(tmp_path / "m", profiles=sizes, inputs=inputs)), "triton", tmp_path / "out", name="tiny"
    )
    assert "max_batch_size: 24" in (made.folder / "tiny" / "config.pbtxt").read_text()


def test_triton_loads_no_engine_without_weights(tmp_path):
    assert "is an engine without its weights" in refused(built(tmp_path / "m", stripped=True))


def test_a_type_that_a_python_step_cannot_hold_is_named(tmp_path):
    outputs = {"logits": {"dtype": "bfloat16", "shape": (-1, 2)}}
    assert "is bfloat16, which Triton's Python steps cannot hold" in refused(built(tmp_path / "m", outputs=outputs))


def test_an_input_that_no_text_has_is_named(tmp_path):
    record = engine.read(built(tmp_path / "m"))
    inputs = {"pixels": {"dtype": "float", "shape": (-1, 3)}, **record.inputs}
    shutil.rmtree(tmp_path / "m")
    assert "asks for the input 'pixels', which no text has" in refused(built(tmp_path / "m", inputs=inputs))


def test_a_fixed_number_of_texts_is_refused(tmp_path):
    outputs = {"logits": {"dtype": "float", "shape": (1, 2)}}
    assert "is fixed at (1, 2). Export it with an open batch" in refused(built(tmp_path / "m", outputs=outputs))


def test_an_evaluation_is_not_a_model(tmp_path):
    (tmp_path / "m").mkdir()
    artifact.seal(tmp_path / "m", format="evaluation", task="", labels=("a",), base="")
    assert "is an evaluation, which gives no answers" in refused(tmp_path / "m")


def test_an_encoder_without_a_head_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    artifact.seal(tmp_path / "m", format="hf", task="", labels=(), base="")
    assert "has no labels, so no head for a task" in refused(tmp_path / "m")


def test_a_folder_that_was_not_sealed_is_refused(tmp_path):
    assert "has no manifest.json" in refused(make_tiny("bert", tmp_path / "m"))


def test_a_changed_byte_is_refused(tmp_path):
    source = words.onnx_model(tmp_path / "m")
    (source / "tokenizer.json").write_text("{}")
    assert "has changed since it was sealed" in refused(source)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "two words", "x" * 201, "täg"])
def test_a_name_that_is_no_folder_everywhere_is_refused(name, simple):
    assert refused(simple, name=name).startswith(f"{name!r} cannot name a served model. Name it with -n")


@pytest.mark.parametrize("name", ["Reviews", "my_reviews", "1st", "reviews-", "a" * 54, "a.b"])
def test_a_name_that_kubernetes_does_not_take_is_refused(name, simple):
    said = refused(simple, "kserve", name=name, storage_uri=URI)
    assert said.startswith(f"{name!r} cannot name a service in Kubernetes. Name it with -n")


def test_the_longest_name_that_kubernetes_takes_is_taken(simple, tmp_path):
    assert package.write(str(simple), "kserve", tmp_path / "out", "a" * 53, URI).name == "a" * 53


def test_kserve_must_be_told_where_the_model_will_be(simple):
    said = refused(simple, "kserve")
    assert said == "kserve must be told where the cluster will find the model: --storage-uri s3://bucket/path."


def test_an_engine_is_not_left_to_the_image_that_kserve_chooses(tmp_path):
    said = refused(built(tmp_path / "m"), "kserve", storage_uri=URI)
    assert "release of Triton that has its TensorRT, 10.9.0.34; KServe's own choice is older. Name the tag" in said


def test_what_is_no_tag_of_an_image_is_refused(simple):
    said = refused(simple, "kserve", storage_uri=URI, runtime_version="a tag")
    assert said == "'a tag' is no tag of an image. Give one such as 26.09-py3."


@pytest.mark.parametrize("uri", ["models/words", "s3:/bucket", "s3://", "ftp://host/path", "s3://a b"])
def test_what_is_no_storage_uri_is_refused(uri, simple):
    assert f"{uri!r} is no storage uri of KServe" in refused(simple, "kserve", storage_uri=uri)


@pytest.mark.parametrize("uri", ["pvc://claim/words", "file:///mnt/words", "gs://bucket"])
def test_every_kind_of_storage_that_kserve_knows_is_taken(uri, simple, tmp_path):
    package.write(str(simple), "kserve", tmp_path / "out", storage_uri=uri)
    assert f"storageUri: {uri}\n" in (tmp_path / "out" / "inferenceservice.yaml").read_text()


def test_an_option_for_another_system_is_refused(simple):
    assert "--runtime-version 1 is for kserve, and this is for vllm" in refused(simple, "vllm", runtime_version="1")
    assert (
        refused(simple, storage_uri=URI) == f"--storage-uri {URI} is for kserve, and this is for triton. Leave it out."
    )


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_done_is_left(failure, simple, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises((StoreError, KeyboardInterrupt)) as error:
        package.write(str(simple), "triton", tmp_path / "out")
    if isinstance(failure, OSError):
        assert "out cannot be written: No space left on device. Name another folder with -o." in str(error.value)
    assert not list(tmp_path.iterdir())


def test_everybody_may_read_what_was_written(simple, tmp_path):
    out = package.write(str(simple), "triton", tmp_path / "out").folder
    assert not [path for path in (out, *out.rglob("*")) if not path.stat().st_mode & 0o004]


# The command


def test_the_command_says_what_it_wrote_and_what_starts_it(simple, tmp_path):
    out = tmp_path / "out"
    shown = CliRunner().invoke(cli.app, ["package", str(simple), "--for", "triton", "-o", str(out), "-n", "reviews"])
    assert shown.exit_code == 0, shown.output
    assert shown.output == (
        f"Written  {out} (reviews, version 1)\n"
        f'Start    docker run --rm -p 8000:8000 -p 8001:8001 -v {out}:/models:ro "$TRITON_IMAGE" tritonserver '
        "--model-repository=/models\n"
    )


def test_the_command_says_what_comes_before(simple, tmp_path):
    command = ["package", str(simple), "--for", "kserve", "-o", str(tmp_path / "out"), "--storage-uri", URI]
    shown = CliRunner().invoke(cli.app, command)
    assert shown.exit_code == 0, shown.output
    assert f"First    Copy what is in {tmp_path / 'out'}/repository to {URI}." in shown.output
