import json
import re

import numpy as np
import pytest

from slimline import artifact, engine
from slimline.engine import Gpu, Record
from slimline.errors import ConfigError, ModelError
from slimline.export import tensorrt as export
from slimline.profiles import Shapes
from tests.driver import Driver, runtime

ADA, AMPERE, HOPPER = Gpu("NVIDIA L4", "8.9"), Gpu("NVIDIA A10", "8.6"), Gpu("NVIDIA H100", "9.0")
SHAPES = Shapes(min=(1, 1), opt=(8, 16), max=(32, 64))


def made(**changed):
    facts = {
        "runtime": "tensorrt_rtx", "version": "1.7.1.116", "compute_capabilities": ("8.9",),
        "inputs": {"input_ids": {"dtype": "int64", "shape": (-1, -1)}},
        "outputs": {"logits": {"dtype": "float", "shape": (-1, 2)}},
        "profiles": [{"input_ids": SHAPES}],
    }  # fmt: skip
    return Record.model_validate(facts | changed)


def test_an_engine_runs_on_the_gpu_and_version_it_was_built_for():
    assert engine.refusal(made(), {"tensorrt_rtx": "1.7.1.116"}, ADA) == ""


@pytest.mark.parametrize(
    ("changed", "installed", "gpu", "sentence"),
    [
        ({}, {"tensorrt_rtx": "1.7.1.116"}, None, "compute capability 8.9, but this machine has no NVIDIA GPU"),
        ({}, {"tensorrt_rtx": "1.7.1.116"}, AMPERE, "capability 8.9, but this machine's GPU, NVIDIA A10, has 8.6"),
        ({}, {"tensorrt_rtx": "1.7.1.117"}, ADA, "RTX 1.7.1.116 .* has TensorRT for RTX 1.7.1.117. Install"),
        ({}, {"tensorrt": "11.4.0.106"}, ADA, "by TensorRT for RTX 1.7.1.116 .* this machine has TensorRT 11.4.0.106"),
        ({}, {}, None, "but this machine has no TensorRT. Install tensorrt-rtx-cu12==1.7.1.116"),
        (
            {"runtime": "tensorrt", "version": "11.4.0.106", "version_compatible": True},
            {"tensorrt": "10.16.1.11"}, ADA, "by TensorRT 11.4.0.106 .* has TensorRT 10.16.1.11",
        ),
        (
            {"runtime": "tensorrt", "version": "10.13.3.9", "version_compatible": True},
            {"tensorrt": "11.4.0.106"}, ADA, "by TensorRT 10.13.3.9 .* has TensorRT 11.4.0.106",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_the_engine_and_the_machine(changed, installed, gpu, sentence):
    assert re.search(sentence, engine.refusal(made(**changed), installed, gpu))


def test_a_version_compatible_engine_runs_on_later_versions_of_its_kind():
    record = made(runtime="tensorrt", version="10.13.3.9", version_compatible=True)
    assert engine.refusal(record, {"tensorrt": "10.16.1.11"}, ADA) == ""
    assert engine.refusal(made(runtime="tensorrt", version="10.13.3.9"), {"tensorrt": "10.16.1.11"}, ADA)


def test_a_hardware_compatible_engine_runs_on_other_gpus_from_ampere_on():
    record = made(runtime="tensorrt", version="11.4.0.106", hardware_compatible=True)
    here = {"tensorrt": "11.4.0.106"}
    assert [bool(engine.refusal(record, here, gpu)) for gpu in (AMPERE, HOPPER, Gpu("T4", "7.5"))] == [0, 0, 1]


def test_a_wheel_without_its_libraries_counts_as_not_installed(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "tensorrt" not in engine.installed()
    with pytest.raises(ConfigError, match="TensorRT is not installed here. Install it with pip: tensorrt-cu12"):
        engine.module("tensorrt")


def test_a_failed_call_of_the_driver_names_its_reason():
    class Status(int):
        name = "CUDA_ERROR_OUT_OF_MEMORY"

    with pytest.raises(ModelError, match="the GPU refused: CUDA_ERROR_OUT_OF_MEMORY"):
        engine.ask((Status(2),))
    assert engine.ask((Status(0), 7)) == 7


@pytest.mark.parametrize("text", ["", "[]", '{"runtime": "another"}'])
def test_a_broken_record_is_refused(text, tmp_path):
    (tmp_path / engine.RECORD).write_text(text)
    with pytest.raises(ModelError, match="is no record of an engine"):
        engine.read(tmp_path)


def test_facts_are_what_the_record_holds_but_for_its_layers(tmp_path):
    assert engine.facts(tmp_path) == {}
    record = made(layers={"/classifier/MatMul": "half"})
    (tmp_path / engine.RECORD).write_text(json.dumps(record.model_dump(mode="json")))
    facts = engine.facts(tmp_path)
    assert "layers" not in facts and facts["compute_capabilities"] == ["8.9"]
    sealed = artifact.seal(tmp_path, format="tensorrt", task="", labels=(), base="", runtime=facts)
    assert artifact.read(tmp_path) == sealed
    said = "TensorRT for RTX 1.7.1.116; compute capability 8.9; input_ids (1, 1) to (32, 64) tuned for (8, 16)"
    assert engine.describe(sealed.runtime) == said


def test_earlier_timings_are_reused_only_under_the_same_key(tmp_path):
    (tmp_path / engine.RECORD).write_text(json.dumps(made(timing_cache="this one").model_dump(mode="json")))
    (tmp_path / engine.TIMING_CACHE).write_bytes(b"timings")
    config = export.Config(data="texts", timing_cache=str(tmp_path))
    assert export.timings(config, "this one") == b"timings"
    assert export.timings(config, "another GPU") == b""
    assert export.timings(export.Config(data="texts"), "this one") == b""


# Running one, on a driver that counts


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def opened(driver, tmp_path, monkeypatch):
    """Opens an engine that adds up token numbers, on a GPU of plain memory."""

    def open(capturable=True):
        record = made(runtime="tensorrt", version="11.4.0.106")
        (tmp_path / engine.RECORD).write_text(json.dumps(record.model_dump(mode="json")))
        (tmp_path / engine.FILE).write_bytes(b"engine")
        monkeypatch.setattr(engine, "installed", lambda: {"tensorrt": "11.4.0.106"})
        monkeypatch.setattr(engine, "gpu", lambda: ADA)
        monkeypatch.setattr(engine, "cuda", lambda: driver)
        monkeypatch.setattr(engine, "module", lambda name: runtime(driver, capturable))
        return engine.Session(tmp_path)

    return open


def summed(session, *shapes):
    """Whether the session adds up rows of these shapes rightly, one call after the other."""
    rows = [np.random.default_rng(size).integers(0, 99, (size, length)) for size, length in shapes]
    return [(session.run({"input_ids": row})["logits"][:, 0] == row.sum(axis=1)).all() for row in rows]


def test_a_shape_that_comes_again_is_launched_as_a_graph_on_what_is_there_then(opened, driver):
    session = opened()
    assert all(summed(session, (2, 5), (3, 7), (2, 5), (3, 7), (2, 5)))
    assert driver.launches == 3 and driver.count("launchable") == 2


def test_graphs_that_are_not_kept_are_given_back_and_the_one_in_use_is_kept(opened, driver, monkeypatch):
    monkeypatch.setattr(engine, "GRAPHS", 2)
    session = opened()
    assert all(summed(session, (1, 1), (1, 2), (1, 1), (1, 3), (1, 1)))
    assert driver.launches == 2
    assert (driver.count("launchable"), driver.count("graph")) == (2, 0)


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(opened, driver):
    session = opened(capturable=False)
    assert all(summed(session, (2, 5), (2, 5), (3, 7), (2, 5)))
    assert driver.launches == 0 and driver.recording is None


def test_a_closed_session_holds_nothing_on_the_gpu(opened, driver):
    session = opened()
    summed(session, (2, 5), (3, 7))
    session.close()
    assert not driver.alive


def test_an_engine_answers_texts_in_their_order(opened, driver, tmp_path):
    opened().close()
    texts = ["a", "bcd", "ef"]
    answers = engine.logits(tmp_path, lambda batch: {"input_ids": np.array([[len(t)] for t in batch])}, texts, size=2)
    assert answers[:, 0].tolist() == [1, 3, 2] and not driver.alive
