"""What a container may see and must leave behind, where no engine is needed to tell. Real ones: tests/containers."""

import json
from pathlib import Path

import pytest
import yaml

from slimline import containers, errors, launch, recipe

COMPILED = Path(launch.__file__).parent / "compiled" / "optimize.yaml"


def spec() -> dict:
    return next(yaml.safe_load_all(COMPILED.read_text()))


@pytest.mark.parametrize(
    ("uri", "network"),
    [
        ("sqlite:////srv/slimline-store/mlflow.db", "none"),
        ("http://127.0.0.1:5000", "host"),
        ("http://localhost:5000", "host"),
        ("https://mlflow.example.com", "bridge"),
    ],
)
def test_a_step_has_no_network_but_the_one_that_reaches_its_store(uri, network):
    assert containers.network_for(uri) == network


def test_only_what_a_recipe_names_is_shown_and_at_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("text,label\n")
    (tmp_path / "teacher").mkdir()
    values = {"data": "data.csv", "name": "reviews", "margin": 0.02, "prune_options": {"teacher": "teacher"}, "x": ""}
    assert containers.inputs(values) == {
        tmp_path / "data.csv": str(tmp_path / "data.csv"),
        tmp_path / "teacher": str(tmp_path / "teacher"),
    }


def test_an_installed_package_is_shown_where_the_image_looks_for_packages():
    import yaml as some_package

    found = containers.inputs({"source": "package:yaml/__init__.py"})
    assert found == {Path(some_package.__file__).parent: "/opt/library/yaml"}


def test_a_file_that_only_its_owner_may_read_is_said_before_anything_runs(tmp_path, monkeypatch):
    secret = tmp_path / "model" / "model.safetensors"
    secret.parent.mkdir()
    secret.write_bytes(b"")
    secret.chmod(0o600)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(containers.os, "getuid", lambda: 0)
    with pytest.raises(errors.ConfigError, match=r"model\.safetensors can be read by its owner alone.*chmod"):
        containers.require_readable([tmp_path])
    secret.chmod(0o644)
    containers.require_readable([tmp_path])


def test_memory_limits_are_what_the_parameters_of_the_compiled_pipeline_say():
    made, values = spec(), {"resources_memory": "6Gi", "resources_light_memory": "512Mi"}
    limits = containers.memory_limits(made, values)
    assert limits["train"] == limits["evaluate_quality"] == "6G"
    assert limits["gate"] == limits["begin"] == limits["finish"] == "512M"
    made["deploymentSpec"]["executors"]["exec-train"]["container"]["resources"] = {"resourceMemoryLimit": "4Gi"}
    made["deploymentSpec"]["executors"]["exec-prune"]["container"]["resources"] = {"memoryLimit": 0.5}
    changed = containers.memory_limits(made, values)
    assert changed["train"] == "4G" and changed["prune"] == "500000000"


def test_an_output_that_was_not_written_is_missed(tmp_path):
    file = tmp_path / "executor_output.json"
    wanted = {"outputs": {"parameters": {"Output": {"outputFile": "x"}}, "outputFile": str(file)}}
    command = ["--executor_input", json.dumps(wanted), "--function_to_execute", "train"]
    assert containers.missing_outputs(command) == ["Output"]
    file.write_text(json.dumps({"parameterValues": {"Output": "runs:/1/model"}}))
    assert containers.missing_outputs(command) == []


def test_without_an_engine_one_sentence_says_what_to_start(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    said = r"no container engine answers at unix:///nowhere\.sock"
    with pytest.raises(errors.ConfigError, match=said), containers.engine():
        pass


def test_a_compiled_pipeline_names_the_images_that_were_built(tmp_path):
    images = tmp_path / "images.json"
    images.write_text(json.dumps({"slimline-cpu:0.1.0": "registry.example.com/slimline-cpu@sha256:12ab"}))
    launch.compile("optimize", tmp_path / "o.yaml", images)
    named = {
        executor["container"]["image"]
        for executor in next(yaml.safe_load_all((tmp_path / "o.yaml").read_text()))["deploymentSpec"][
            "executors"
        ].values()
    }
    assert named == {"registry.example.com/slimline-cpu@sha256:12ab"}
    assert recipe.pipeline_file(str(tmp_path / "o.yaml"))


def test_an_image_that_was_not_built_is_named_and_no_file_is_left(tmp_path):
    images = tmp_path / "images.json"
    images.write_text("{}")
    with pytest.raises(errors.ConfigError, match=r"has no slimline-cpu:0\.1\.0.*make images"):
        launch.compile("optimize", tmp_path / "o.yaml", images)
    assert not (tmp_path / "o.yaml").exists()
    with pytest.raises(errors.ConfigError, match="does not exist"):
        launch.compile("optimize", tmp_path / "o.yaml", tmp_path / "none.json")


class Engine:
    """As much of an engine's client as choosing an image and its devices asks for."""

    def __init__(self, name, *images):
        self.images, self.name, self.known = self, name, images

    def version(self):
        return {"Components": [{"Name": self.name}]}

    def get(self, image):
        import docker

        if image not in self.known:
            raise docker.errors.ImageNotFound(image)
        return type("Image", (), {"id": f"id of {image}"})


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine whose nvidia-smi lists a GPU."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_all_gpus_are_passed_through_in_each_engines_own_words(gpu):
    assert containers._devices(Engine("Podman Engine")) == {"devices": ["nvidia.com/gpu=all"]}
    (request,) = containers._devices(Engine("Engine"))["device_requests"]
    assert request.count == -1 and request.capabilities == [["gpu"]]


def test_without_a_gpu_no_device_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert containers._devices(Engine("Engine")) == {}


def test_where_there_is_a_gpu_its_image_takes_the_place_of_the_processors(gpu):
    both = Engine("Engine", "slimline-cpu:0.1.0", "slimline-gpu:0.1.0")
    assert containers.present(both, "slimline-cpu:0.1.0") == "id of slimline-gpu:0.1.0"
    assert (
        containers.present(Engine("Engine", "slimline-cpu:0.1.0"), "slimline-cpu:0.1.0") == "id of slimline-cpu:0.1.0"
    )
