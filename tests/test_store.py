import os
import shutil
import subprocess
import sys
import time

import pytest

from slimline import artifact, store, transfer
from slimline.errors import ConfigError, StoreError
from tests.stores import saved, sealed


def test_a_saved_model_comes_back_byte_for_byte_under_every_kind_of_ref(fresh_store, tmp_path):
    ref = saved(tmp_path)
    version = store.register("reviews", ref, "k", {}, "")
    store.set_alias("reviews", "champion", version)
    want = artifact.digest(tmp_path / "model")
    for name in (ref, "models:/reviews/1", "models:/reviews@champion", str(tmp_path / "model")):
        assert artifact.verify(store.fetch(name)).digest == want, name


def test_the_manifest_is_uploaded_last(fresh_store, tmp_path, monkeypatch):
    order = []
    real = transfer.upload

    def spy(to, files):
        order.append(sorted(name.rpartition("/")[2] for name in files))
        real(to, files)

    monkeypatch.setattr(transfer, "upload", spy)
    saved(tmp_path)
    assert order[-1] == ["manifest.json"]
    assert "manifest.json" not in order[0] and "model.safetensors" in order[0]


def test_nothing_in_what_is_saved_is_a_pickle(fresh_store, tmp_path):
    saved(tmp_path)
    names = [name for _, _, files in os.walk(fresh_store / "artifacts") for name in files]
    assert "model.safetensors" in names
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".bin", ".pt", ".pth"))]


def test_a_changed_byte_in_a_stored_model_is_refused_with_the_file_named(fresh_store, tmp_path):
    ref = saved(tmp_path)
    stored = next((fresh_store / "artifacts").rglob("model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    with pytest.raises(StoreError, match=r"model\.safetensors has changed"):
        store.fetch(ref)


def test_only_a_finished_run_is_found_by_its_key(fresh_store, tmp_path):
    with pytest.raises(ZeroDivisionError), store.step_run("s", {store.PREFIX + "key": "k"}, {}) as failed:
        1 / 0  # noqa: B018
    assert store.find_finished("k") is None
    assert store.client().get_run(failed).info.status == "FAILED"
    with store.step_run("s", {store.PREFIX + "key": "k"}, {}) as first:
        assert store.find_finished("k") is None
    with store.step_run("s", {store.PREFIX + "key": "k"}, {}):
        pass
    assert store.find_finished("k") == first


def test_an_interrupted_run_is_marked_killed(fresh_store):
    with pytest.raises(KeyboardInterrupt), store.step_run("s", {}, {}) as run_id:
        raise KeyboardInterrupt
    assert store.client().get_run(run_id).info.status == "KILLED"


def test_a_run_that_a_dead_process_left_running_is_marked_killed_by_the_next(fresh_store):
    code = (
        "import os\nfrom slimline import store\n"
        "with store.step_run('s', {store.PREFIX + 'key': 'k'}, {}) as r:\n    print(r, flush=True)\n    os._exit(9)\n"
    )
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    assert store.client().get_run(dead).info.status == "RUNNING"
    with store.step_run("s", {store.PREFIX + "key": "k"}, {}):
        pass
    assert store.client().get_run(dead).info.status == "KILLED"


def test_steps_of_a_pipeline_hang_under_its_run_and_injected_runs_are_joined(fresh_store, monkeypatch):
    parent = store.start_pipeline("optimize reviews", "optimize", {"margin": 0.02}, "slimline run optimize")
    monkeypatch.setenv("SLIMLINE_PARENT_RUN", parent)
    with store.step_run("s", {}, {"epochs": 2}) as child:
        pass
    run = store.client().get_run(child)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.params == {"slimline.epochs": "2"}
    assert store.client().get_run(parent).data.params == {"slimline.margin": "0.02"}
    assert {f.path for f in store.client().list_artifacts(parent)} == {"recipe.yaml", "environment.txt"}
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    with store.step_run("s", {}, {}) as joined:
        pass
    assert joined == parent
    assert store.client().get_run(parent).info.status == "RUNNING"


def test_a_version_is_made_once_per_key_and_the_lowest_wins(fresh_store, tmp_path):
    ref = saved(tmp_path)
    assert store.register("reviews", ref, "k", {}, "") == 1
    assert store.register("reviews", ref, "k", {}, "") == 1
    assert store.register("reviews", ref, "other", {}, "") == 2
    # A reply that was lost after the server had made the version leaves a double behind.
    store.client().create_model_version("reviews", str(tmp_path), tags={store.by_key("k"): "1"})
    assert store.register("reviews", ref, "k", {}, "") == 1
    assert store.client().get_model_version("reviews", "3").tags[store.PREFIX + "duplicate_of"] == "1"


def test_refs_that_do_not_resolve_say_so(fresh_store, tmp_path):
    for ref in (
        "runs:/0123456789abcdef0123456789abcdef/model",
        "models:/nobody@champion",
        "models:/nobody/1",
    ):
        with pytest.raises(StoreError, match="does not resolve"):
            store.fetch(ref)
    with pytest.raises(StoreError, match="does not exist"):
        store.fetch("no/such/folder")
    with pytest.raises(StoreError, match="empty ref"):
        store.fetch("")


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "../x", "a b", "x" * 300, "a\nb"])
def test_a_name_that_a_registry_cannot_keep_is_refused_before_anything_is_made(fresh_store, tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a registered model"):
        store.register(name, "runs:/0/model", "k", {}, "")


def test_an_unreachable_server_is_said_within_seconds(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9 cannot be reached"):
        store.client()
    assert time.monotonic() - start < 30


def test_four_processes_that_open_a_new_store_at_once_all_find_it_whole(tmp_path):
    code = "from slimline import store\nwith store.step_run('s', {}, {}) as run_id:\n    print(run_id)\n"
    environment = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "SLIMLINE_PARENT_RUN")}
    environment["SLIMLINE_STORE"] = str(tmp_path / "new")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ended = [process.communicate() for process in started]
    assert [p.returncode for p in started] == [0] * 4, [e[1][-500:] for e in ended]
    assert len({output.strip() for output, _ in ended}) == 4


def test_an_evaluation_comes_back_as_it_was(fresh_store, tmp_path):
    manifest = sealed(tmp_path / "evaluation", format="evaluation")
    with store.step_run("evaluate", {}, {}) as run_id:
        ref = store.save(run_id, tmp_path / "evaluation", manifest)
    assert ref == f"runs:/{run_id}/evaluation"
    assert artifact.read(store.fetch(ref)).digest == manifest.digest
    assert (tmp_path / "evaluation" / "manifest.json").is_file()


def test_a_store_that_was_opened_does_not_stand_in_the_way_of_the_next(fresh_store, tmp_path, monkeypatch):
    saved(tmp_path / "one", key="k")
    assert "MLFLOW_TRACKING_URI" not in os.environ
    shutil.copytree(fresh_store, tmp_path / "second")
    monkeypatch.setenv("SLIMLINE_STORE", str(tmp_path / "second"))
    saved(tmp_path / "two", key="other")
    assert store.find_finished("other")
    monkeypatch.setenv("SLIMLINE_STORE", str(fresh_store))
    assert store.find_finished("k") and not store.find_finished("other")
