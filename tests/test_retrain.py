"""Retraining, whole: a champion made by optimize, data that have not changed, and data that have."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest
import yaml

from components.plan import plan as port
from slimline import artifact, judging, launch, ledger, recipe, retraining, store
from slimline.errors import ConfigError, DataError, StoreError
from tests.stores import saved, standing_in
from tests.test_launch import CLI, short
from tests.tiny import make_data

ROWS = 900


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A champion made by optimize, and a function that retrains it from a data set."""
    with standing_in(tmp_path_factory.mktemp("world")) as folder:
        values = short(folder)
        assert launch.run("optimize", values, print, "slimline run optimize").summary["status"] == "PASS"
        yield {"folder": folder, "values": values}


def retrain(values, data, **more):
    events = []
    outcome = launch.run("retrain", {"name": "tiny", "data": str(data), **more}, events.append, "slimline run retrain")
    return outcome, events


@pytest.mark.slow
def test_a_champion_is_made_again_from_what_is_new_and_judged_against_the_one_before(world):
    data = make_data(world["folder"] / "newer.parquet", rows=ROWS + 300)
    outcome, events = retrain(world["values"], data)
    said = next(event["text"] for event in events if event["event"] == "note")
    assert "300 of 1200 texts are new since version 1 of tiny" in said and "Drift: none" in said
    assert outcome.summary["version"] == 2 and outcome.summary["status"] in ("PASS", "INCONCLUSIVE", "FAIL")
    ref = store.version_of("models:/tiny/2").tags["slimline.verdict_ref"]
    verdict, asked, _ = judging.verdict_at(ref)
    assert asked.champion == 1 and asked.rival, "the champion was measured on the new data"
    assert any("champion" in check.name for check in verdict.checks)
    trained = artifact.read(store.fetch("models:/tiny/2")).history[1]
    assert trained.technique == "train.finetune" and trained.config["epochs"] == world["values"]["train_epochs"]
    assert trained.data["data"] == artifact.digest(data), "the frozen bytes"
    data.unlink()
    assert artifact.digest(store.fetch(trained.config["data"])) == trained.data["data"]
    again = store.fetch_file(outcome.run_id, retraining.PLANNED)
    assert yaml.safe_load(again.read_text())["train_epochs"] == world["values"]["train_epochs"]


def test_without_a_new_text_the_run_says_so_and_ends_at_once(world):
    before = len(store.versions("tiny"))
    outcome, events = retrain(world["values"], world["values"]["data"])
    champion = store.alias("tiny", "champion")
    assert (
        outcome.summary["outcome"] == f"Nothing to do: data.parquet has no new text since version {champion} of tiny."
    )
    ran = [event["step"] for event in events if event["event"] == "start"]
    assert ran == ["plan"] and len(store.versions("tiny")) == before
    assert store.tags(outcome.run_id)["slimline.sentence"] == outcome.summary["outcome"]


def test_the_same_rows_in_another_order_are_nothing_new(world):
    table = parquet.read_table(world["values"]["data"])
    shuffled = world["folder"] / "shuffled.parquet"
    parquet.write_table(table.take(list(reversed(range(len(table))))), shuffled)
    assert artifact.digest(shuffled) != artifact.digest(world["folder"] / "data.parquet")
    due, sentence, _ = retraining.look("tiny", 1, shuffled, 1)
    assert not due and "no new text" in sentence


def test_a_file_that_changes_under_its_name_is_seen_to_have_changed(world):
    data = make_data(world["folder"] / "growing.parquet", rows=ROWS)
    assert not retraining.look("tiny", 1, data, 1)[0]
    make_data(data, rows=ROWS + 40)
    due, sentence, numbers = retraining.look("tiny", 1, data, 41)
    assert not due and "has only 40 new texts, and 41 are asked for" in sentence
    assert retraining.look("tiny", 1, data, 40)[0] and numbers["new_texts"] == 40


def test_texts_of_another_kind_are_reported_as_drift(world):
    table = parquet.read_table(make_data(world["folder"] / "strange.parquet", rows=ROWS)).to_pydict()
    table["text"] = [
        f"quarterly figures {i} of the steel division rose again beyond what was planned" for i in range(ROWS)
    ]
    parquet.write_table(pyarrow.table(table), world["folder"] / "strange.parquet")
    due, sentence, numbers = retraining.look("tiny", 1, world["folder"] / "strange.parquet", 1)
    assert due and "words (1.00)" in sentence and numbers["drifted"] == 1.0


def test_a_text_that_the_champion_has_learnt_from_cannot_judge_it(world):
    table = parquet.read_table(world["values"]["data"]).to_pydict()
    table = {"text": table["text"], "label": table["label"], "split": ["train"] * 100 + ["test"] * (ROWS - 100)}
    parquet.write_table(pyarrow.table(table), world["folder"] / "leaking.parquet")
    with pytest.raises(DataError, match=r"leaking.parquet has \d+ texts in split test which the champion was trained"):
        retraining.look("tiny", 1, world["folder"] / "leaking.parquet", 1)


def test_frozen_data_that_were_changed_are_not_read(world):
    data = make_data(world["folder"] / "kept.parquet", rows=50)
    with store.step_run("plan", {}, {}) as run_id:
        ref = store.save_data(run_id, data, artifact.digest(data))
    assert store.fetch(ref).read_bytes() == data.read_bytes()
    store.fetch(ref).write_bytes(b"else")
    with pytest.raises(StoreError, match=r"kept.parquet is not what was saved"):
        store.fetch(ref)
    with pytest.raises(StoreError, match="the run keeps no such data"):
        store.fetch(f"runs:/{run_id}/data/other.parquet")


def test_what_cannot_be_made_again_is_said_in_a_sentence(world, tmp_path):
    with pytest.raises(ConfigError, match="nobody has no champion to make again. Run optimize first"):
        retraining.made_by("nobody")
    version = store.register("foreign", saved(tmp_path / "model"), "key", {}, "")
    ledger.move("foreign", version, None, "promote", {})
    with pytest.raises(ConfigError, match="version 1 of foreign was made by no pipeline, not by optimize"):
        retraining.made_by("foreign")
    with pytest.raises(ConfigError, match="min_new is 0"):
        retraining.plan("tiny", world["values"]["data"], 0)
    with pytest.raises(DataError, match="is a folder. Name the file"):
        retraining.plan("tiny", str(world["folder"]), 1)


def test_the_command_line_says_that_there_is_nothing_to_do(world):
    values = ("--set", "name=tiny", "--set", f"data={world['values']['data']}")
    done = subprocess.run(
        [*CLI, "run", "retrain", *values, "--json"], capture_output=True, text=True, cwd=world["folder"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "NOTHING_NEW"


def test_the_plan_hands_on_every_parameter_of_optimize_by_its_name():
    spec = next(yaml.safe_load_all(recipe.pipeline_file("optimize").read_text()))
    known = spec["root"]["inputDefinitions"]["parameters"]
    wanted = {name: d["parameterType"] for name, d in known.items() if not name.startswith("resources_")}
    outputs = {name: out.type for name, out in port.component_spec.outputs.items() if name not in ("Output", "metrics")}
    assert list(outputs) == sorted(wanted)
    kinds = {"STRING": "String", "NUMBER_INTEGER": "Integer", "NUMBER_DOUBLE": "Float", "BOOLEAN": "Boolean",
             "STRUCT": "Dict", "LIST": "List"}  # fmt: skip
    assert outputs == {name: kinds[kind] for name, kind in wanted.items()}
