"""How a run begins and ends on a cluster: one tree in MLflow whoever made it, and a message to whoever waits.

Kubeflow is played by its environment variables and arguments; MLflow is real.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from slimline import attempt, errors, outcome, step, store
from tests.stores import saved

RUN = "5f0c3a52-6a4e-4c0e-8d52-0f1d2c7a9b11"


@pytest.fixture
def kubeflow(fresh_store, monkeypatch):
    """A pod of a step: what Kubernetes and KFP tell it, and nothing of a launcher."""
    for name in ("SLIMLINE_WEBHOOK", "SLIMLINE_MLFLOW_URL", "KFP_RETRY_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLIMLINE_PIPELINE_RUN", RUN)
    monkeypatch.setenv("SLIMLINE_NAMESPACE", "team-a")
    monkeypatch.setenv("SLIMLINE_PIPELINE", "optimize")
    monkeypatch.setattr(sys, "argv", ["executor"])
    return fresh_store


@pytest.fixture
def asked(kubeflow, monkeypatch):
    """Call it with a step's inputs: the arguments of KFP's executor."""

    def ask(**parameters):
        told = json.dumps({"inputs": {"parameterValues": parameters}, "outputs": {}})
        monkeypatch.setattr(sys, "argv", ["executor", "--executor_input", told, "--function_to_execute", "step"])

    return ask


@pytest.fixture
def recipe_values(kubeflow):
    """A recipe for `optimize` as KFP hands it to `begin`: every number a float, and KFP's own inputs among it."""
    (kubeflow.parent / "model").mkdir()
    (kubeflow.parent / "data.csv").write_text("text,label\n")
    return {
        "pipeline": "optimize", "source": "model", "data": "data.csv", "name": "reviews", "train_epochs": 3.0,
        "train_options": {"batch_size": 8.0}, "resources_memory": "8Gi", "cpu_limit": "1",
        "pipelinechannel--resources_light_cpu": "1",
    }  # fmt: skip


def plug_in(monkeypatch, task="train"):
    """KFP's MLflow plug-in: a parent run, a nested run for this step, and its id in the step's environment."""
    client = store.client()
    place = client.get_experiment_by_name("KFP")
    place = place.experiment_id if place else client.create_experiment("KFP")
    parents = client.search_runs([place], "tags.`kfp.run_id` = 'x'")
    parent = parents[0] if parents else client.create_run(place, tags={"kfp.run_id": "x"}, run_name="KFP's name")
    nested = client.create_run(place, tags={"mlflow.parentRunId": parent.info.run_id}, run_name=task)
    monkeypatch.setenv("MLFLOW_RUN_ID", nested.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", place)
    return parent.info.run_id, nested.info.run_id


def tree(parent):
    """What hangs under a run: technique and status of each child, without a step that has no technique."""
    client = store.client()
    place = client.get_run(parent).info.experiment_id
    children = client.search_runs([place], f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(
        (run.data.tags["slimline.technique"], run.info.status)
        for run in children
        if "slimline.technique" in run.data.tags
    )


def work(*names):
    for name in names:
        with store.step_run(name, {}, {"seed": 0}):
            pass


# The tree


def test_the_steps_of_one_kubeflow_run_find_one_parent_without_being_told(kubeflow, monkeypatch):
    found = set()
    for _ in range(3):  # three pods
        store._run_of.cache_clear()
        found.add(store.pipeline_run())
    assert len(found) == 1
    store._run_of.cache_clear()
    monkeypatch.setenv("SLIMLINE_PIPELINE_RUN", "another")
    assert store.pipeline_run() not in found


def test_a_parent_that_was_made_twice_as_an_answer_was_lost_is_the_older_for_everybody(kubeflow):
    client, place = store.client(), store.experiment("team-a/optimize")
    made = [
        client.create_run(place, start_time=start, tags={store.by_key(RUN): "1"}).info.run_id
        for start in (2000, 1000, 3000)
    ]
    store._run_of.cache_clear()
    assert store.pipeline_run() == made[1]


def test_each_namespace_and_pipeline_has_an_experiment_of_its_own(kubeflow, monkeypatch):
    names = set()
    for namespace in ("team-a", "team-b"):
        for pipeline in ("optimize", "engine"):
            monkeypatch.setenv("SLIMLINE_NAMESPACE", namespace)
            monkeypatch.setenv("SLIMLINE_PIPELINE", pipeline)
            place = store.client().get_run(store.pipeline_run()).info.experiment_id
            names.add(store.client().get_experiment(place).name)
    assert names == {"team-a/optimize", "team-a/engine", "team-b/optimize", "team-b/engine"}


def test_the_tree_is_the_same_on_a_laptop_on_a_cluster_and_under_the_plug_in(kubeflow, monkeypatch):
    trees = {}
    work("train.finetune", "prune.heads")
    trees["cluster"] = tree(store.pipeline_run())

    with monkeypatch.context() as laptop:
        laptop.delenv("SLIMLINE_PIPELINE_RUN")
        laptop.setenv("SLIMLINE_PARENT_RUN", store.start_pipeline("here", "here", {}, ""))
        work("train.finetune", "prune.heads")
        trees["laptop"] = tree(store.pipeline_run())

    for name in ("train.finetune", "prune.heads"):
        parent, nested = plug_in(monkeypatch)
        work(name)
        assert store.pipeline_run() == parent
        store.end(nested)  # as KFP's launcher does
    trees["plug-in"] = tree(parent)
    assert trees["laptop"] == trees["cluster"] == trees["plug-in"] == [
        ("prune.heads", "FINISHED"), ("train.finetune", "FINISHED"),
    ]  # fmt: skip


def test_under_the_plug_in_no_key_is_logged_that_is_not_ours_and_nothing_is_renamed_or_ended(kubeflow, monkeypatch):
    parent, nested = plug_in(monkeypatch)
    store.start_pipeline("optimize reviews", "optimize", {"seed": 0}, "kubeflow")
    work("train.finetune")
    outcome.finish("optimize", "SUCCEEDED")
    for run in (store.client().get_run(parent), store.client().get_run(nested)):
        assert run.info.status == "RUNNING"
        ours = {key for key in (*run.data.params, *run.data.tags) if not key.startswith(("mlflow.", "kfp."))}
        assert ours and all(key.startswith("slimline.") for key in ours)
    assert store.client().get_run(parent).info.run_name == "KFP's name"
    assert store.tags(parent)["slimline.outcome"] == "FINISHED"


def test_a_plug_in_on_another_server_is_left_alone(kubeflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    work("train.finetune")
    assert tree(store.pipeline_run()) == [("train.finetune", "FINISHED")]


def test_a_step_that_was_reused_says_so_in_the_run_that_the_plug_in_made_for_it(kubeflow, monkeypatch):
    earlier = store.run_id_of(saved(kubeflow.parent / "earlier"))
    _, nested = plug_in(monkeypatch)
    store.note_reuse("train.finetune", earlier)
    assert store.tags(nested)["slimline.reused"] == earlier


# The beginning


def test_the_beginning_writes_the_whole_recipe_into_the_run(recipe_values, asked):
    asked(**recipe_values)
    begun = outcome.begin("optimize")
    assert begun.status == "RUNNING"
    run = store.client().get_run(store.pipeline_run())
    assert run.info.run_name == "optimize reviews" and run.info.status == "RUNNING"
    assert run.data.params["slimline.train_epochs"] == "3"
    assert run.data.params["slimline.resources_memory"] == "8Gi"
    assert run.data.params["slimline.quantize_method"] == "int8_dynamic"  # a default
    assert not {key for key in run.data.params if "channel" in key or key.endswith("cpu_limit")}
    assert run.data.tags["slimline.command"] == f"kubeflow {RUN}"
    assert {file.path for file in store.client().list_artifacts(run.info.run_id)} >= {"recipe.yaml"}
    outcome.begin("optimize")  # the pod was lost and started again


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"source": ""}, errors.ConfigError, "'source' is required"),
        ({"name": ""}, errors.ConfigError, "'name' is required"),
        ({"name": "a/b"}, errors.ConfigError, "cannot name a registered model"),
        ({"prune_method": "head"}, errors.ConfigError, "Did you mean 'prune.heads'"),
        ({"train_options": {"batch": 8.0}}, errors.ConfigError, "batch"),
        ({"data": "nowhere.csv"}, errors.DataError, "does not exist"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_any_step_and_the_end_says_why(
    recipe_values, asked, changed, kind, said
):
    asked(**{**recipe_values, **changed})
    with pytest.raises(kind, match=said):
        outcome.begin("optimize")
    ended = outcome.finish("optimize", "FAILED")
    assert said in ended.sentence and ended.status == "FAILED"
    assert store.tags(store.pipeline_run())["slimline.failed_step"] == "begin"


def test_started_by_the_launcher_of_this_machine_the_beginning_changes_nothing(kubeflow, asked, monkeypatch):
    monkeypatch.delenv("SLIMLINE_PIPELINE_RUN")
    run_id = store.start_pipeline("here", "here", {"seed": 0}, "slimline run")
    monkeypatch.setenv("SLIMLINE_PARENT_RUN", run_id)
    asked(source="")  # the launcher has checked the recipe
    before = store.tags(run_id)
    outcome.begin("optimize")
    assert store.tags(run_id) == before


# The end


def test_a_run_that_went_well_is_finished_and_says_what_became_of_the_candidate(kubeflow, monkeypatch):
    monkeypatch.setenv("SLIMLINE_MLFLOW_URL", "https://mlflow.example.com/")
    parent = store.pipeline_run()
    told = {"name": "reviews", "version": 3, "verdict": "PASS", "outcome": "Version 3 of reviews is now the champion."}
    store.set_tags(parent, {f"slimline.result.{key}": str(value) for key, value in told.items()})
    ended = outcome.finish("optimize", "SUCCEEDED")
    assert store.client().get_run(parent).info.status == "FINISHED"
    assert ended.sentence == "PASS. Version 3 of reviews is now the champion."
    assert ended.links["reviews version 3"] == "https://mlflow.example.com/#/models/reviews/versions/3"
    assert ended.links["run in MLflow"].endswith(f"/runs/{parent}")
    outcome.show(ended, str(kubeflow.parent / "page" / "told.md"))
    page = (kubeflow.parent / "page" / "told.md").read_text()
    assert "**optimize: finished**" in page and "](https://mlflow.example.com/#/models/reviews/versions/3)" in page


def test_the_step_that_failed_and_its_sentence_are_in_the_run_and_in_the_outcome(kubeflow):
    with pytest.raises(errors.ConfigError), step.reporting("distill.logits"):
        raise errors.ConfigError("'layers' is 9, but the teacher has 6. Ask for fewer.")
    ended = outcome.finish("optimize", "FAILED", "Task exit-handler-1 failed.")
    tags = store.tags(store.pipeline_run())
    assert tags["slimline.failed_step"] == "distill.logits"
    assert tags["slimline.sentence"] == ended.sentence == "'layers' is 9, but the teacher has 6. Ask for fewer."
    assert store.client().get_run(store.pipeline_run()).info.status == "FAILED"


def test_a_step_that_was_killed_without_a_word_is_named_and_not_left_running(kubeflow):
    killed = store.client().create_run(
        store.experiment("team-a/optimize"),
        tags={"mlflow.parentRunId": store.pipeline_run(), "slimline.technique": "train.finetune"},
    )
    ended = outcome.finish("optimize", "FAILED", "main exited with code 137")
    assert store.client().get_run(killed.info.run_id).info.status == "KILLED"
    assert ended.sentence.startswith("train.finetune was ended from outside: out of memory")


def test_a_run_that_somebody_stopped_is_killed_and_not_failed(kubeflow):
    assert outcome.finish("optimize", "CANCELLED").status == "KILLED"
    assert store.client().get_run(store.pipeline_run()).info.status == "KILLED"


def test_a_store_that_is_away_is_said_and_does_not_fail_the_end(kubeflow, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    ended = outcome.finish("optimize", "FAILED", "The step train failed.")
    assert ended.status == "FAILED" and ended.sentence == "The step train failed."
    assert "cannot be reached" in capsys.readouterr().err


# Trying again


def test_what_cannot_help_is_not_tried_again_and_the_same_is_said(asked, monkeypatch):
    asked(method="logits", layers=9.0)
    with pytest.raises(errors.ConfigError), step.reporting("distill.logits"):
        raise errors.ConfigError("'layers' is 9, but the teacher has 6.")
    monkeypatch.setenv("KFP_RETRY_INDEX", "1")
    with pytest.raises(errors.ConfigError, match=r"the teacher has 6\. \(Not tried again"):
        step.run("distill.logits", "nowhere", {})


def test_what_may_help_is_tried_again(asked, monkeypatch):
    asked(method="logits")
    with pytest.raises(errors.StoreError), step.reporting("distill.logits"):
        raise errors.StoreError("the tracking server cannot be reached.")
    monkeypatch.setenv("KFP_RETRY_INDEX", "1")
    with step.reporting("distill.logits"):
        pass


def test_another_step_of_that_kind_and_a_run_that_is_started_again_by_hand_are_not_refused(asked, monkeypatch):
    asked(source="a")
    with pytest.raises(errors.DataError), step.reporting("evaluate.classification"):
        raise errors.DataError("no such column.")
    asked(source="a")
    with step.reporting("evaluate.classification"):  # by hand: the first attempt of its own
        pass
    asked(source="b")
    monkeypatch.setenv("KFP_RETRY_INDEX", "2")
    with step.reporting("evaluate.classification"):
        pass


def test_a_failure_outside_of_any_pipeline_leaves_no_run_behind(fresh_store):
    with pytest.raises(errors.DataError), step.reporting("train.finetune"):
        raise errors.DataError("no such column.")
    assert attempt.given() == {} and store.pipeline_run() == ""


# The webhook


class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.taken.append((self.path, self.headers["Content-Type"], json.loads(body)))
        self.send_response(self.server.answers.pop(0) if self.server.answers else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook(monkeypatch):
    """A chat's address on this machine. What it has been sent is in `taken`; `answers` are given first."""
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        server.taken, server.answers = [], []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("SLIMLINE_WEBHOOK", f"http://127.0.0.1:{server.server_port}/services/secret")
        monkeypatch.setattr(outcome, "PAUSE_S", 0.0)
        yield server
        server.shutdown()


def test_the_webhook_is_sent_the_outcome_as_slack_takes_it(kubeflow, hook, monkeypatch):
    monkeypatch.setenv("SLIMLINE_MLFLOW_URL", "https://mlflow.example.com")
    with pytest.raises(errors.DataError), step.reporting("train.finetune"):
        raise errors.DataError("column <label> is missing & needed.")
    outcome.finish("optimize", "FAILED")
    ((path, kind, body),) = hook.taken
    assert path == "/services/secret" and kind == "application/json"
    assert set(body) == {"text", "blocks"}
    assert body["text"] == "optimize: failed. column &lt;label&gt; is missing &amp; needed."
    title, sentence, links = (block["text"]["text"] for block in body["blocks"])
    assert title == "*optimize: failed*" and "&lt;label&gt;" in sentence
    assert links.startswith("<https://mlflow.example.com/#/experiments/") and links.endswith("|run in MLflow>")
    assert all(block["type"] == "section" and block["text"]["type"] == "mrkdwn" for block in body["blocks"])


@pytest.mark.parametrize(
    ("answers", "calls", "taken"),
    [([500], 2, True), ([503, 503], 2, False), ([429], 2, True), ([404], 1, False)],
)
def test_a_webhook_that_is_busy_is_asked_once_more_and_then_left(hook, answers, calls, taken, capsys):
    hook.answers[:] = answers
    assert outcome.tell(outcome.Outcome("optimize", "FINISHED", "All is well.", {})) is taken
    assert len(hook.taken) == calls
    assert ("not reached" in capsys.readouterr().err) is not taken


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/secret", "ftp://chat/secret", "not an address", "http://[/secret"])
def test_a_webhook_that_is_not_there_fails_nothing_and_its_address_is_in_no_log(kubeflow, monkeypatch, capsys, url):
    monkeypatch.setattr(outcome, "PAUSE_S", 0.0)
    monkeypatch.setenv("SLIMLINE_WEBHOOK", url)
    assert outcome.finish("optimize", "SUCCEEDED").status == "FINISHED"
    assert "not reached" in (told := capsys.readouterr().err)
    assert "secret" not in told and url not in told


def test_without_a_webhook_nobody_is_told(kubeflow, capsys):
    assert outcome.tell(outcome.Outcome("optimize", "FINISHED", "", {})) is False
    assert capsys.readouterr().err == ""


def test_a_long_sentence_is_cut_to_what_slack_takes():
    body = outcome.message_of(outcome.Outcome("optimize", "FAILED", "x" * 9000, {}))
    assert len(body["text"]) <= 3000 and all(len(block["text"]["text"]) <= 3000 for block in body["blocks"])
