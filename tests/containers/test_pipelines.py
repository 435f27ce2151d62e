"""The pipelines whose steps cannot share an environment: each step in the image that has what it needs."""

import json
import subprocess

import yaml

from slimline import artifact, store
from tests.containers.conftest import CPU, LLM, TENSORRT, slimline

VALIDATE = """
import json, sys
from compressed_tensors.quantization import QuantizationConfig
(scheme,) = QuantizationConfig.model_validate(json.loads(sys.argv[1])).config_groups.values()
print(scheme.weights.num_bits, scheme.weights.group_size)
"""
"""Reads a config.json's quantization_config as the format's own library does; other fields are refused."""
NOT_THERE = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"


def recipe(workplace, **changed):
    """What both pipelines take of the workplace's recipe, and more."""
    known = yaml.safe_load((workplace / "recipe.yaml").read_text())
    values = {name: known[name] for name in ("source", "data", "train_options")} | changed
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(values))


def test_no_image_has_what_the_others_need(inside):
    versions = {
        image: inside(image, "python", "-c", "import transformers; print(transformers.__version__)")
        for image in (CPU, LLM)
    }
    assert versions[CPU].startswith("5.23.") and versions[LLM].startswith("5.17.")
    wanted = ("llmcompressor", "tensorrt_rtx", "onnxruntime", "torch")
    there = {image: inside(image, "python", "-c", NOT_THERE, *wanted).split() for image in (CPU, LLM, TENSORRT)}
    assert there[CPU] == ["onnxruntime", "torch"]
    assert there[LLM] == ["llmcompressor", "torch"]
    assert there[TENSORRT] == ["tensorrt_rtx", "onnxruntime"]


def test_steps_that_disagree_about_transformers_make_one_model(workplace, inside):
    options = {"group_size": 16, "samples": 32, "texts": 32, "agreement": 0.5, "kl": 5.0}
    recipe(
        workplace, name="tiny", margin=0.2, train_epochs=3, quantize_options=options, latency_options={"batches": 6},
        gate_options={"size_alone": True},
    )  # fmt: skip
    ran = slimline("run", "compress", "-f", "recipe.yaml", "--docker", "--json", cwd=workplace)
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout)
    made = artifact.read(store.fetch(f"models:/tiny/{told['version']}"))
    trained, quantized = made.history[-2:]
    assert (trained.technique, quantized.technique) == ("train.finetune", "quantize.llmcompressor")
    assert made.weights_bytes < 0.6 * quantized.metrics["size_before_bytes"]
    packing = json.loads((store.fetch(f"models:/tiny/{told['version']}") / "config.json").read_text())
    packing = packing["quantization_config"]
    assert packing["quant_method"] == "compressed-tensors"
    assert inside(LLM, "python", "-c", VALIDATE, json.dumps(packing)).strip() == "4 16"
    shown = slimline("predict", f"models:/tiny/{told['version']}", "a fine film", "--json", cwd=workplace)
    assert json.loads(shown.stdout)[0]["label"] in ("negative", "positive")


def test_a_model_becomes_an_engine_in_an_image_without_torch(workplace):
    engine = {"compute_capabilities": ["8.9"], "max_length": 32}
    recipe(workplace, train_method="finetune", quantize_method="none", engine_options=engine)
    ran = slimline("run", "engine", "-f", "recipe.yaml", "--docker", "--json", cwd=workplace)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ref = json.loads(ran.stdout)["ref"]
    made = artifact.read(store.fetch(ref))
    assert made.format == "tensorrt" and made.runtime["compute_capabilities"] == ["8.9"]
    refused = slimline("predict", ref, "a fine film", cwd=workplace)
    assert refused.returncode == 3 and "built by TensorRT for RTX" in refused.stderr


def test_a_language_model_is_quantized_judged_and_promoted_in_its_own_image(workplace):
    from tests.test_language_pipeline import parameters

    folder = workplace / "language"
    folder.mkdir()
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(parameters(folder)))
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    ran = slimline("run", "language", "-f", "recipe.yaml", "--docker", "--json", cwd=workplace)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout)["status"] == "PASS", ran.stdout
    manifest = artifact.verify(store.fetch("models:/tiny-llama@champion"))
    assert manifest.format == "genai" and manifest.history[-1].technique == "export.genai"
