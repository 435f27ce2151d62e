"""The store on real servers when they are away, forget to answer, or start anew: nothing twice, nothing lost."""

import datetime
import threading
import time

import pytest

from slimline import artifact, attempt, retry, step, store, transfer
from slimline.errors import StoreError
from tests.faults import ENDLESS, Fault, Faults
from tests.servers import use
from tests.stores import saved, sealed
from tests.tiny import make_tiny


@pytest.fixture
def spoiled(tracking_server, tmp_path, monkeypatch):
    """The tracking server and the bucket, each behind a proxy that spoils things."""
    with Faults(tracking_server.port) as tracking, Faults(tracking_server.s3.port) as s3:
        use(tracking_server, tmp_path, monkeypatch)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.url)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3.url)
        monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "60")
        yield tracking, s3


def everything(name):
    """What a store has of one experiment: finished runs, all runs, models that are there and their status."""
    found = store.client().get_experiment_by_name(name)
    runs = store.client().search_runs([found.experiment_id])
    models = store.client().search_logged_models([found.experiment_id])
    return runs, models


def save_into(experiment, folder, monkeypatch, key="k"):
    """A pipeline with one step that saves a small model, registered under the experiment's name."""
    parent = store.start_pipeline(experiment, experiment, {"margin": 0.02}, "a test")
    monkeypatch.setenv("SLIMLINE_PARENT_RUN", parent)
    ref = saved(folder, key=f"{experiment}-{key}")
    version = store.register(experiment, ref, f"{experiment}-{key}", {}, "")
    store.set_alias(experiment, "champion", version)
    store.end(parent)
    return ref


MAKING = ["runs/create", "logged-models$", "registered-models/create", "model-versions/create", "runs/outputs"]
LOST = [*MAKING, "experiments/create", "runs/log-batch", "runs/update", "registered-models/alias", "logged-models/m-"]


@pytest.mark.slow
@pytest.mark.parametrize("call", LOST)
def test_what_the_server_did_before_its_answer_was_lost_is_not_done_again(spoiled, tmp_path, monkeypatch, call):
    tracking, _ = spoiled
    name = f"lost-{LOST.index(call)}"
    tracking.add(Fault("lose", f"(POST|PATCH) .*{call}"))
    ref = save_into(name, tmp_path, monkeypatch)
    assert tracking.faults[0].times == 0
    runs, models = everything(name)
    assert sorted(run.info.status for run in runs) == ["FINISHED", "FINISHED"]
    assert [(model.status, model.source_run_id) for model in models] == [("READY", store.run_id_of(ref))]
    assert [int(v.version) for v in store.versions(name)] == [1]
    assert artifact.verify(store.fetch(f"models:/{name}@champion")).digest == artifact.digest(tmp_path / "model")


def test_a_server_that_answers_503_now_and_then_makes_no_difference(spoiled, tmp_path, monkeypatch):
    tracking, s3 = spoiled
    tracking.add(*(Fault("503", ".", spare=spare) for spare in range(3, 40, 4)))
    s3.add(*(Fault("503", ".", spare=spare, code="SlowDown") for spare in range(1, 10, 3)))
    save_into("shaky", tmp_path, monkeypatch)
    runs, models = everything("shaky")
    assert len(runs) == 2 and [model.status for model in models] == ["READY"]


def test_a_server_that_is_down_at_the_start_and_comes_back_is_waited_for(spoiled, tmp_path):
    tracking, _ = spoiled
    tracking.add(Fault("refuse", ".", times=4))
    ref = saved(tmp_path, key="late")
    assert store.find_finished("late") == store.run_id_of(ref)


def test_a_server_that_stays_away_ends_in_one_sentence_with_exit_code_5(spoiled, tmp_path, monkeypatch):
    tracking, _ = spoiled
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "1")
    tracking.add(Fault("refuse", ".", times=ENDLESS))
    with pytest.raises(
        StoreError, match=r"tracking server at http.* did not answer as it should for 1 s.*same comm"
    ) as e:
        store.find_finished("k")
    assert e.value.exit_code == 5 and "\n" not in str(e.value)


def test_a_failure_that_cannot_be_written_down_is_not_waited_for_again(spoiled, monkeypatch):
    tracking, _ = spoiled
    monkeypatch.setenv("SLIMLINE_PARENT_RUN", "0" * 32)
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "86400")  # this test would last a day
    monkeypatch.setattr(retry, "PROMPT_S", 0.1)
    tracking.add(Fault("refuse", ".", times=ENDLESS))
    attempt.note("train.finetune", "StoreError", "the store is away")
    assert tracking.faults[0].times < ENDLESS and retry.limit_s() == 86400


def test_a_server_that_goes_away_in_the_middle_and_stays_costs_no_finished_work(spoiled, tmp_path, monkeypatch):
    tracking, _ = spoiled
    outside = make_tiny("bert", tmp_path / "outside")
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "1")
    tracking.add(Fault("503", "POST .*logged-models", times=ENDLESS))
    with pytest.raises(StoreError, match=r"it answers 503\)\. Finished steps are kept"):
        step.run("fetch.local", str(outside), {})
    tracking.faults.clear()
    calls = []
    monkeypatch.setattr("slimline.fetch.local.run", lambda *given: calls.append(given))
    ref, metrics = step.run("fetch.local", str(outside), {})
    assert calls == [] and metrics["parameters"] > 0
    assert artifact.verify(store.fetch(ref)).history[0].technique == "fetch.local"
    assert not list((tmp_path / "slimline-store" / "unfinished").glob("sealed-*"))


def test_a_model_whose_upload_fails_is_neither_seen_nor_left_in_the_bucket(
    spoiled, tracking_server, tmp_path, monkeypatch
):
    _, s3 = spoiled
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "1")
    s3.add(Fault("503", "PUT .*manifest", times=ENDLESS, code="SlowDown"))
    monkeypatch.setenv("SLIMLINE_PARENT_RUN", store.start_pipeline("halves", "halves", {}, "a test"))
    with pytest.raises(StoreError, match="SlowDown"):
        saved(tmp_path, key="half")
    assert s3.seen("PUT .*model.safetensors") == 1
    runs, models = everything("halves")
    assert models == [] and store.find_finished("half") is None
    experiment = runs[0].info.experiment_id
    assert tracking_server.s3.keys(tracking_server.bucket, f"artifacts/{experiment}/models/") == {}


def test_a_database_that_is_restarted_in_the_middle_makes_no_difference(remote_store, postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "60")
    begun, restarted = threading.Event(), threading.Event()

    def restart():
        begun.wait(60)
        postgres.stop()
        time.sleep(1)
        postgres.start()
        postgres.wait()
        restarted.set()

    thread = threading.Thread(target=restart)
    thread.start()
    real = transfer.upload

    def upload(to, files):
        begun.set()  # in the middle of a save
        real(to, files)

    monkeypatch.setattr(transfer, "upload", upload)
    save_into("restarted", tmp_path, monkeypatch)
    thread.join()
    assert restarted.is_set()
    runs, models = everything("restarted")
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    assert [model.status for model in models] == ["READY"]
    assert [int(v.version) for v in store.versions("restarted")] == [1]


def test_a_password_that_was_changed_is_said_at_once(remote_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "the-old-password-of-16")
    with pytest.raises(StoreError, match=r"does not take the sign-in of this process .*MLFLOW_TRACKING_USERNAME"):
        store.find_finished("k")


def test_a_clock_that_is_wrong_is_said_where_a_bucket_will_not_have_it(remote_store, tmp_path, monkeypatch):
    past = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda remove_tzinfo=True: past.replace(tzinfo=None))
    with pytest.raises(StoreError, match=r"the clock of this machine is too far from that of"):
        saved(tmp_path, key="clock")


def test_clocks_that_disagree_change_no_order(remote_store, tmp_path, monkeypatch):
    first = saved(tmp_path / "one", key="clocks")
    now = time.time
    for number, years in enumerate((-20, 20)):
        monkeypatch.setattr(time, "time", lambda years=years: now() + years * 31_536_000)
        ref = saved(tmp_path / str(number), key=f"clocks-{years}")
        assert store.find_finished(f"clocks-{years}") == store.run_id_of(ref)
        assert store.register("clocks", ref, f"clocks-{years}", {}, "") == number + 1
    monkeypatch.setattr(time, "time", now)
    assert store.register("clocks", first, "clocks", {}, "") == 3
    assert [int(v.version) for v in store.versions("clocks")] == [1, 2, 3]


def test_a_fetched_copy_is_taken_without_reading_until_it_is_touched(remote_store, tmp_path, monkeypatch):
    ref = saved(tmp_path, key="copies")
    copy = store.fetch(ref)
    with Faults(remote_store.s3.port) as s3:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3.url)
        assert store.fetch(ref) == copy and s3.requests == []
        weights = copy / "model.safetensors"
        right = weights.read_bytes()
        weights.write_bytes(right[:-1] + b"!")
        assert (store.fetch(ref) / "model.safetensors").read_bytes() == right
        assert s3.seen("GET .*model.safetensors") == 1 and s3.seen("GET .*config.json") == 0
        (copy / "added.txt").write_text("not of this model")
        store.fetch(ref)
        assert not (copy / "added.txt").exists()


def test_a_stored_file_that_was_changed_in_the_bucket_is_refused(remote_store, tmp_path):
    ref = saved(tmp_path, key="changed")
    model = store.tags(store.run_id_of(ref))["slimline.model"]
    client, bucket = remote_store.s3.client(), remote_store.bucket
    keys = [key for key in remote_store.s3.keys(bucket) if model in key and "data/model" in key]
    weights = next(key for key in keys if key.endswith("model.safetensors"))
    client.put_object(Bucket=bucket, Key=weights, Body=b"something else")
    with pytest.raises(StoreError, match=r"model\.safetensors has changed since it was sealed"):
        store.fetch(ref)
    sealed(tmp_path / "other" / "model", b"other weights")
    for name in ("model.safetensors", "manifest.json"):  # whole, and not what was saved
        key = next(key for key in keys if key.endswith(name))
        client.upload_file(str(tmp_path / "other" / "model" / name), bucket, key)
    with pytest.raises(StoreError, match="is not what was saved: its manifest has changed"):
        store.fetch(ref)
