"""One signature: MLflow's own loader and server answer for every format."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from slimline import step, store
from tests.decoders import make_decoder, seal_decoder
from tests.tiny import make_tiny

TEXTS = ["a superb film", "dull and very very long and stale", ""]


@pytest.fixture
def champions(fresh_store, tmp_path, tiny_data):
    """A registered model with a version of each format."""
    ref, _ = step.run("fetch.local", str(make_tiny("bert", tmp_path / "source")), {})
    exported, _ = step.run("export.onnx", ref, {"data": str(tiny_data)})
    small, _ = step.run("quantize.int8_dynamic", exported, {"data": str(tiny_data), "agreement": 0.5, "kl": 5.0})
    for number, one in enumerate((ref, exported, small)):
        store.register("reviews", one, str(number), {}, "")
    store.set_alias("reviews", "champion", 3)
    return fresh_store


def test_mlflows_loader_answers_alike_for_every_format(champions):
    import mlflow

    mlflow.set_tracking_uri(store.uri())
    answers = [mlflow.pyfunc.load_model(f"models:/reviews/{v}").predict(TEXTS) for v in (1, 2, 3)]
    for answer in answers:
        assert list(answer.columns) == ["label", "score"] and len(answer) == 3
        assert set(answer["label"]) <= {"negative", "positive"}
    assert list(answers[0]["label"]) == list(answers[1]["label"])
    assert list(answers[0]["score"]) == pytest.approx(list(answers[1]["score"]), abs=1e-4)


@pytest.fixture
def writer(fresh_store, tmp_path):
    """A registered language model."""
    from slimline import artifact

    folder = seal_decoder(make_decoder("llama", tmp_path / "model", seed=3))
    with store.step_run("fetch.local", {}, {}) as run_id:
        ref = store.save(run_id, folder, artifact.read(folder))
    store.register("writer", ref, "1", {}, "")
    store.set_alias("writer", "champion", 1)
    return folder


def test_mlflows_loader_writes_chats_and_streams(writer):
    import mlflow

    from slimline import language
    from slimline.sampling import Sampling

    mlflow.set_tracking_uri(store.uri())
    served, model = mlflow.pyfunc.load_model("models:/writer@champion"), language.load(writer)
    expected = model.generate(["the film is", "plot"], Sampling.of({"max_tokens": 8}))
    table = served.predict(["the film is", "plot"], params={"max_tokens": 8})
    assert list(table.columns) == ["generated"] and table["generated"].tolist() == expected
    assert "".join(served.predict_stream("plot", params={"max_tokens": 8})) == expected[1]
    drawn = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "stop": ["film"], "chat": True}
    how = Sampling.of({k: v for k, v in drawn.items() if k != "chat"})
    said = served.predict(["the film is"], params=drawn)["generated"].tolist()
    assert said == [model.chat([{"role": "user", "content": "the film is"}], how)]


def asked_over_http(ref: str, body: dict) -> list:
    """What `mlflow models serve` answers to a request: its predictions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", ref]
    command += ["--env-manager", "local", "--port", str(port), "--host", "127.0.0.1"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store.uri(), "PATH": path}
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), kind)
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(request, timeout=20) as reply:
                    return json.load(reply)["predictions"]
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(1)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


@pytest.mark.slow
def test_mlflows_server_answers_over_http(champions):
    answers = asked_over_http("models:/reviews@champion", {"inputs": TEXTS})
    assert [set(answer) for answer in answers] == [{"label", "score"}] * 3


@pytest.mark.slow
def test_mlflows_server_writes_over_http(writer):
    from slimline import language
    from slimline.sampling import Sampling

    prompts = ["the film is", "plot"]
    answers = asked_over_http("models:/writer@champion", {"inputs": prompts, "params": {"max_tokens": 8}})
    expected = language.load(writer).generate(prompts, Sampling.of({"max_tokens": 8}))
    assert [answer["generated"] for answer in answers] == expected


def test_a_fetched_copy_elsewhere_answers_too(champions, tmp_path):
    from slimline import serve

    shutil.copytree(store.fetch("models:/reviews@champion"), tmp_path / "elsewhere")
    assert len(serve.load(tmp_path / "elsewhere").predict(TEXTS)) == 3
