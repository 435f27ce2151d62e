"""The whole pipeline, compiled, through kfp.local, on a tiny model: the spine of the product."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slimline import artifact, errors, launch, recipe, release, store, summary
from tests.stores import standing_in
from tests.test_finish import hook  # noqa: F401
from tests.tiny import make_data, make_tiny

ROOT = Path(__file__).parent.parent
CLI = [sys.executable, "-m", "slimline.cli"]


def parameters(folder: Path) -> dict:
    """A recipe of seconds: a tiny bare BERT made small for good, with limits that a tiny test split can prove."""
    return {
        "source": str(make_tiny("bert", folder / "source", head=False)),
        "data": str(make_data(folder / "data.parquet", rows=900)),
        "name": "tiny",
        "margin": 0.2,
        "train_epochs": 3,
        "train_learning_rate": 3e-3,
        "train_options": {"batch_size": 8},
        "distill_layers": 2,
        "distill_epochs": 2,
        "distill_options": {"learning_rate": 3e-3, "batch_size": 8},
        "prune_options": {"multiple": 8, "learning_rate": 3e-3, "batch_size": 8},
        "quantize_options": {"agreement": 0.5, "kl": 5.0},
        "latency_batch_size": 4,
        "latency_options": {"batches": 6},
        "gate_options": {"size_alone": True},
    }


def short(folder: Path) -> dict:
    """The same without distillation and pruning, where what is between the first step and the last does not matter."""
    return {**parameters(folder), "distill_method": "none", "prune_method": "none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working directory in which the pipeline has run once, with what it told and made."""
    with standing_in(tmp_path_factory.mktemp("world")) as folder:
        values = parameters(folder)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        events: list[dict] = []
        outcome = launch.run("optimize", values, events.append, "slimline run optimize -f recipe.yaml")
        yield {"folder": folder, "values": values, "events": events, "outcome": outcome}


def cli(world, *arguments, **environment):
    return subprocess.run(
        [*CLI, *arguments], capture_output=True, text=True, cwd=world["folder"], env={**os.environ, **environment}
    )


def test_the_pipeline_ends_with_a_champion_that_passed(world):
    said = world["outcome"].summary
    assert said["status"] == "PASS", said["sentence"]
    assert said["promoted"] and store.alias("tiny", "champion") == said["version"] == 1
    assert "is now the champion" in said["outcome"]


def test_the_champion_is_a_small_onnx_model_with_its_whole_history(world):
    manifest = artifact.verify(store.fetch("models:/tiny@champion"))
    assert [stage.technique for stage in manifest.history] == [
        "fetch.local",
        "train.finetune",
        "distill.logits",
        "prune.heads",
        "export.onnx",
        "quantize.int8_dynamic",
    ]
    for before, after in zip(manifest.history, manifest.history[1:]):
        assert before.seconds > 0 and after.parent
    assert manifest.format == "onnx" and manifest.base == world["values"]["source"]
    assert manifest.history[1].data["data"] == artifact.digest(Path(world["values"]["data"]))


def test_the_table_has_the_base_and_every_stages_result(world):
    rows = world["outcome"].summary["rows"]
    assert [row["technique"] for row in rows] == [
        "train.finetune",
        "export.onnx",
        "distill.logits",
        "prune.heads",
        "export.onnx",
        "quantize.int8_dynamic",
    ]
    assert rows[0]["is_baseline"] and rows[-1]["is_candidate"]
    for row in rows:
        assert 0 <= row["quality_low"] <= row["quality"] <= row["quality_high"] <= 1
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["peak_memory_bytes"] > 1e6
    assert rows[-1]["weights_bytes"] < rows[0]["weights_bytes"]


def test_everything_hangs_under_one_run_with_recipe_environment_data_and_report(world):
    client, run_id = store.client(), world["outcome"].run_id
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(run_id)} >= {"recipe.yaml", "environment.txt", "report.html"}
    assert parent.data.tags["slimline.command"] == "slimline run optimize -f recipe.yaml"
    assert len(parent.data.tags["slimline.limits"]) == 64
    assert parent.data.tags["slimline.outcome"] == "FINISHED"  # by the pipeline's last step
    assert parent.data.tags["slimline.sentence"].startswith("PASS. Version 1 of tiny is now the champion")
    where = f"tags.`mlflow.parentRunId` = '{run_id}'"
    steps = list(client.search_runs([parent.info.experiment_id], where))
    assert {s.info.status for s in steps} == {"FINISHED"} and len(steps) >= 14
    trained = next(s for s in steps if s.data.tags["slimline.technique"] == "train.finetune")
    assert trained.data.params["slimline.epochs"] == "3"
    assert trained.inputs.dataset_inputs[0].dataset.name == "data.parquet"
    assert trained.data.metrics["validation_accuracy"] > 0.5


def test_weights_are_stored_once_and_nothing_stored_is_a_pickle(world):
    files = [f for f in (world["folder"] / "slimline-store").rglob("*") if f.is_file()]
    weights = [artifact.digest(f) for f in files if f.suffix in (".safetensors", ".onnx")]
    assert len(weights) == len(set(weights)) == 7
    assert not [f for f in files if f.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth")]


def test_the_page_of_kubeflow_gets_numbers_matrices_curves_and_the_report(world):
    folder = world["folder"] / "slimline-store" / "runs" / world["outcome"].run_id / "kfp"
    shown = {file.parent.name: file.read_text() for file in folder.rglob("executor_output.json")}
    ran = [text for step, text in shown.items() if step.startswith("evaluate-quality")]
    measured = [text for text in ran if '"Output": ""' not in text]
    assert len(measured) == len(ran) - 1 >= 4, "all but the champion, of which there was none"
    for text in measured:
        assert "confusionMatrix" in text and "confidenceMetrics" in text and "accuracy" in text
    assert "optimize: finished" in next(folder.rglob("finish/told")).read_text()
    assert "tiny version 1" in next(folder.rglob("report/page")).read_text()


def test_a_second_run_reuses_every_step_and_registers_nothing_new(world):
    second = launch.run("optimize", world["values"], lambda event: None)  # once more for the gate: the champion moved
    events: list[dict] = []
    third = launch.run("optimize", world["values"], events.append)
    kept = {"champion", "register", "promote", "report"}
    made = [e["step"] for e in events if e["event"] == "end" and not e["reused"] and e["step"] not in kept]
    assert made == []
    assert second.summary["version"] == third.summary["version"] == 1
    assert "champion already" in third.summary["outcome"]
    assert len(store.versions("tiny")) == 1


def test_the_report_is_one_page_that_needs_no_network(world):
    page = Path(world["outcome"].summary["report"]).read_text()
    assert summary.page_of(world["outcome"].run_id).read_text() == page
    assert "tiny version 1" in summary.page_of("models:/tiny@champion").read_text()
    assert world["outcome"].summary["sentence"].split(":")[0] in page
    assert "<script src" not in page and "<link" not in page and 'src="http' not in page


def test_show_predict_report_and_techniques_say_what_is_there(world):
    shown = json.loads(cli(world, "show", "models:/tiny@champion", "--json").stdout)
    assert shown["aliases"] == ["champion"] and shown["verdict"] == "PASS" and len(shown["history"]) == 6
    assert "prune.heads" in cli(world, "show", "models:/tiny@champion").stdout
    answers = json.loads(cli(world, "predict", "models:/tiny@champion", "a superb film", "dull", "--json").stdout)
    assert [set(a) for a in answers] == [{"label", "score"}] * 2
    assert Path(cli(world, "report", "models:/tiny@champion").stdout.strip()).is_file()


def test_any_stage_can_be_passed_over(world):
    values = {**world["values"], "name": "short", "distill_method": "none", "prune_method": "none"}
    outcome = launch.run("optimize", values, lambda event: None)
    history = artifact.read(store.fetch("models:/short/1")).history
    assert [s.technique for s in history] == ["fetch.local", "train.finetune", "export.onnx", "quantize.int8_dynamic"]
    assert len(outcome.summary["rows"]) == 3


def test_a_candidate_that_loses_too_much_is_registered_with_its_reasons_and_not_promoted(world):
    values = {**world["values"], "name": "strict", "gate_options": {"min_speedup": 1e6}}
    outcome = launch.run("optimize", values, lambda event: None)
    assert outcome.summary["status"] == "FAIL" and not outcome.summary["promoted"]
    assert store.alias("strict", "champion") is None
    version = store.version_of("models:/strict/1")
    assert version.tags["slimline.verdict"] == "FAIL" and "FAIL" in version.description
    with pytest.raises(errors.GateError, match="its verdict is FAIL"):
        release.promote("strict", 1)
    refused = cli(world, "run", "optimize", "-f", "recipe.yaml", "--set", "name=strict",
                  "--set", "gate_options.min_speedup=1000000", "--require-pass")  # fmt: skip
    assert refused.returncode == 4 and "--require-pass" in refused.stderr


def test_a_steps_error_is_the_runs_error_and_what_was_finished_stays(world, hook):  # noqa: F811
    values = {**world["values"], "name": "broken", "distill_layers": 9}
    with pytest.raises(errors.ConfigError, match="'layers' is 9, but the teacher has 3"):
        launch.run("optimize", values, lambda event: None)
    assert store.versions("broken") == []
    runs = store.client().search_runs([store.experiment("optimize")], "tags.`slimline.pipeline` = 'optimize'")
    (broken,) = (r for r in runs if r.info.status == "FAILED")
    assert broken.data.tags["slimline.failed_step"] == "distill.logits"
    ((_, _, told),) = hook.taken
    assert told["text"].startswith("optimize: failed.") and "'layers' is 9" in told["text"]
    failed = cli(world, "run", "optimize", "-f", "recipe.yaml", "--set", "distill_layers=9", "--set", "name=broken")
    assert failed.returncode == 2
    assert failed.stderr.strip().endswith("Ask for fewer.") and "Traceback" not in failed.stderr


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_where_it_was(world):
    chosen = ("name=killed", "distill_epochs=12", "prune_method=none")
    arguments = ["run", "optimize", "-f", "recipe.yaml", *(word for one in chosen for word in ("--set", one))]
    process = subprocess.Popen(
        [*CLI, *arguments], cwd=world["folder"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stderr:  # until distillation is at work
        if "distill.logits ..." in line:
            break
    os.killpg(process.pid, signal.SIGKILL)  # the step too: one that outlived its run would still finish its work
    process.wait()
    done = cli(world, *arguments)
    assert done.returncode == 0, done.stderr
    told = {line.split()[1]: line.split()[-1] for line in done.stderr.splitlines() if "/" in line[:6]}
    assert told["train.finetune"] == "reused" and told["distill.logits"] == "s"  # seconds: it was done again
    assert "\r" not in done.stderr and "\x1b" not in done.stderr  # plain lines, where there is no terminal
    assert re.search(r"(\d+)/\1 report", done.stderr)
    assert [v.version for v in store.versions("killed")] in (["1"], [1])


def test_the_committed_pipelines_are_what_their_sources_compile_to(tmp_path):
    for source in sorted((ROOT / "pipelines").glob("[!_]*.py")):
        launch.compile(str(source), tmp_path / "fresh.yaml")
        committed = ROOT / "slimline" / "compiled" / f"{source.stem}.yaml"
        assert (tmp_path / "fresh.yaml").read_text() == committed.read_text(), f"run `make compile` for {source.stem}"
    assert recipe.pipelines() == sorted(p.stem for p in (ROOT / "pipelines").glob("[!_]*.py"))


def test_a_pipeline_can_be_written_out_for_kubeflow(tmp_path):
    launch.compile("optimize", tmp_path / "optimize.yaml")
    spec = next(yaml.safe_load_all((tmp_path / "optimize.yaml").read_text()))
    assert spec["pipelineInfo"]["name"] == "optimize"
    assert "enableCache" not in (tmp_path / "optimize.yaml").read_text()
    with pytest.raises(errors.ConfigError, match=r"nothing\.py does not exist"):
        launch.compile("nothing.py", tmp_path / "x.yaml")
