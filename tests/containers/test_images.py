"""What is in an image, and what is not."""

import json

import pytest

from slimline import __version__, allowlist, decoder, hf
from tests.containers.conftest import CPU, KINDS, LANGUAGE, LLM, MLFLOW, ROOT, TENSORRT

BUDGET_BYTES = 600_000_000
"""Of slimline-cpu on the base that docker/base.sh makes, without torch and what torch alone needs."""

TORCH = "torch torchgen functorch torch-*.dist-info sympy mpmath networkx setuptools isympy.py"

ALL = pytest.mark.parametrize("image", [CPU, LANGUAGE, TENSORRT, LLM, MLFLOW], ids=KINDS)


@ALL
def test_an_image_runs_as_nobody_and_says_what_it_is(client, image):
    about = client.images.get(image).attrs["Config"]
    assert about["User"] == "10001:10001"
    assert about["Labels"]["org.opencontainers.image.version"] == __version__
    assert len(about["Labels"]["org.opencontainers.image.revision"].removesuffix("-dirty")) == 12
    assert "org.opencontainers.image.source" in about["Labels"]


@ALL
def test_an_image_holds_no_compiler_no_installer_and_no_cache(inside, image):
    tools = "cc gcc ld strip make pip pip3 uv git"
    look = (
        f"for name in {tools}; do command -v $name; done; ls /opt; find / -name .cache -not -path '/proc/*' 2>/dev/null"
    )
    found = inside(image, "sh", "-c", f"{look}; true").split()
    assert found == ["library", "slimline"]


@pytest.mark.parametrize("name", KINDS)
def test_the_bill_of_materials_beside_an_image_names_python_and_debian_packages(name):
    told = json.loads((ROOT / "build" / "sbom" / f"{name}.json").read_text())
    names = {part["name"] for part in told["components"]}
    assert told["bomFormat"] == "CycloneDX" and {"numpy", "libc6", "mlflow-skinny", "python3"} <= names
    purls = {part.get("purl", "").partition("@")[0] for part in told["components"]}
    assert {"pkg:pypi/numpy", "pkg:deb/debian/libc6"} <= purls


def test_nothing_but_tmp_can_be_written_to(inside):
    found = inside(
        CPU, "sh", "-c", "touch /tmp/yes /opt/no /usr/no /home/no 2>&1; ls /tmp", tmpfs={"/tmp": "mode=1777"}
    )
    assert found.count("Read-only file system") + found.count("Permission denied") == 3 and "yes" in found


def test_the_server_keeps_what_it_has_in_a_volume(client, inside):
    volume = client.volumes.create("slimline-test-data")
    try:
        for written in ("one", "two"):
            found = inside(
                MLFLOW, "sh", "-c", f"touch /data/{written} && ls /data",
                volumes={volume.name: {"bind": "/data", "mode": "rw"}}, tmpfs={"/tmp": "mode=1777"},
            )  # fmt: skip
        assert found.split() == ["one", "two"]
    finally:
        volume.remove(force=True)


def test_without_torch_the_cpu_image_stays_within_its_budget(client, inside):
    whole = client.images.get(CPU).attrs["Size"]
    count = f"cd /opt/slimline/lib/python3*/site-packages && du -sbc {TORCH} 2>/dev/null | tail -1 | cut -f1"
    torch = int(inside(CPU, "sh", "-c", count))
    assert torch > 300_000_000
    assert whole - torch <= BUDGET_BYTES


LOADS = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
Auto = AutoModelForCausalLM if sys.argv[1] == "decoders" else AutoModelForSequenceClassification
small = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
small |= dict(dim=8, n_layers=1, n_heads=2, hidden_dim=8, pad_token_id=0)
for kind in sys.argv[2:]:
    Auto.from_config(AutoConfig.for_model(kind, **small))
print(*sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("image", "what", "kinds"), [(CPU, "encoders", tuple(hf.LAYOUTS)), (LANGUAGE, "decoders", tuple(decoder.FAMILIES))]
)
def test_every_kind_of_model_that_is_taken_loads_in_its_image(inside, image, what, kinds):
    found = inside(image, "python", "-c", LOADS, what, *kinds, tmpfs={"/tmp": "mode=1777"})
    assert found.splitlines()[-1].split() == list(kinds)  # after what transformers warns of


def test_what_is_taken_is_what_the_images_load():
    assert set(allowlist.MODEL_TYPES) == {*hf.LAYOUTS, *decoder.FAMILIES}


def test_the_language_image_reads_gguf_quantizes_generates_and_runs_a_benchmark_of_ours(inside):
    code = """
import json, pathlib
import accelerate, compressed_tensors, gguf, onnxruntime_genai, onnxruntime_genai.models.builder
import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

class Longest(LM):
    def loglikelihood(self, requests):
        return [(float(len(r.args[1])), True) for r in requests]
    loglikelihood_rolling = generate_until = None

place = pathlib.Path("/tmp/task")
place.mkdir()
rows = [{"text": "a", "choices": ["no", "longer"], "gold": 1}, {"text": "b", "choices": ["no", "longer"], "gold": 0}]
(place / "rows.jsonl").write_text("\\n".join(map(json.dumps, rows)))
(place / "ours.yaml").write_text(json.dumps({
    "task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/tmp/task/rows.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
}))
tasks = TaskManager(include_path="/tmp/task", include_defaults=False)
print(lm_eval.simple_evaluate(Longest(), tasks=["ours"], task_manager=tasks)["results"]["ours"]["acc,none"])
"""
    found = inside(LANGUAGE, "python", "-c", code, tmpfs={"/tmp": "mode=1777"})
    assert found.split()[-1] == "0.5"


def test_the_tensorrt_image_serves_onnx_without_torch_and_builds_engines(inside):
    found = inside(
        TENSORRT, "python", "-c", "import tensorrt_rtx, slimline.serve, onnxruntime; print(tensorrt_rtx.__version__)"
    )
    assert found.startswith("1.")
    assert "No module named 'torch'" in inside(TENSORRT, "sh", "-c", "python -c 'import torch' 2>&1; true")
