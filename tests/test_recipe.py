import json

import pytest
import yaml

from slimline import recipe
from slimline.errors import ConfigError, DataError


@pytest.fixture
def spec():
    return next(yaml.safe_load_all(recipe.pipeline_file("optimize").read_text()))


@pytest.fixture
def values(tmp_path):
    for name in ("model", "data.csv"):
        (tmp_path / name).write_text("")
    return {"source": str(tmp_path / "model"), "data": str(tmp_path / "data.csv"), "name": "reviews"}


def test_defaults_come_from_the_compiled_pipeline_with_their_types(spec, values):
    whole = recipe.check(spec, values)
    assert whole["train_epochs"] == 2 and isinstance(whole["train_epochs"], int)
    assert whole["margin"] == 0.02
    assert whole["quantize_method"] == "int8_dynamic"


def test_an_unknown_parameter_names_the_nearest(spec, values):
    with pytest.raises(ConfigError, match="Did you mean 'train_epochs'"):
        recipe.check(spec, {**values, "train_epoch": 3})


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("train_epochs", 1.5, "a whole number"),
        ("train_epochs", True, "a whole number"),
        ("margin", "wide", "a number"),
        ("train_options", [1], "a mapping"),
        ("name", 7, "text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_needed(spec, values, name, value, needed):
    with pytest.raises(ConfigError, match=f"{name}.*{needed} is needed"):
        recipe.check(spec, {**values, name: value})


def test_a_missing_parameter_is_named_with_its_meaning(spec, values):
    del values["name"]
    with pytest.raises(ConfigError, match="'name' is required"):
        recipe.check(spec, values)


def test_an_unknown_method_is_refused_before_anything_runs_and_the_nearest_named(spec, values):
    with pytest.raises(ConfigError, match=r"no technique 'prune.head'.*Did you mean 'prune.heads'"):
        recipe.check(spec, {**values, "prune_method": "head"})


def test_an_unknown_option_of_a_late_stage_is_refused_before_anything_runs(spec, values):
    with pytest.raises(ConfigError, match=r"quantize.int8_dynamic has no option 'per_chanel'.*'per_channel'"):
        recipe.check(spec, {**values, "quantize_options": {"per_chanel": True}})


def test_an_option_out_of_its_bounds_is_refused_before_anything_runs(spec, values):
    with pytest.raises(ConfigError, match=r"prune.heads: option 'heads' is 1.5"):
        recipe.check(spec, {**values, "prune_heads": 1.5})


def test_a_limit_that_the_gate_does_not_know_is_refused_before_anything_runs(spec, values):
    with pytest.raises(ConfigError, match="gate limit"):
        recipe.check(spec, {**values, "gate_options": {"margn": 0.1}})


def test_data_that_does_not_exist_is_said_before_anything_runs(spec, values):
    with pytest.raises(DataError, match=r"nowhere.csv' does not exist"):
        recipe.check(spec, {**values, "data": "nowhere.csv"})


def test_paths_in_a_recipe_are_taken_from_its_own_folder(tmp_path):
    (tmp_path / "movies.parquet").write_bytes(b"")
    (tmp_path / "recipe.yaml").write_text("data: movies.parquet\nsource: package:somewhere/model\n")
    read = recipe.read(tmp_path / "recipe.yaml")
    assert read == {"data": str(tmp_path / "movies.parquet"), "source": "package:somewhere/model"}


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n- 2\n", b"\xff\xfe\x00", b""])
def test_a_file_that_is_not_a_recipe_is_said_to_be_none(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a recipe"):
        recipe.read(tmp_path / "recipe.yaml")


def test_set_reads_values_as_yaml_and_reaches_into_mappings():
    assigned = recipe.assign(["margin=0.01", "name=x", "train_options.batch_size=8", "train_learning_rate=5e-5"])
    assert assigned == {
        "margin": 0.01, "name": "x", "train_options": {"batch_size": 8}, "train_learning_rate": "5e-5",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="is not name=value"):
        recipe.assign(["margin"])


def test_a_number_in_scientific_notation_is_a_number(spec, values):
    assert recipe.check(spec, {**values, "train_learning_rate": "5e-5"})["train_learning_rate"] == 5e-5


def test_an_unknown_pipeline_names_those_there_are():
    with pytest.raises(ConfigError, match=r"There is: .*optimize"):
        recipe.pipeline_file("optimise")


def test_the_checked_values_can_be_written_as_json(spec, values):
    json.dumps(recipe.check(spec, values))
