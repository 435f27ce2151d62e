"""What a kill, or a machine that is too small, leaves of a long step: all that was finished, and the same end."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from slimline import artifact, grid, step, store, unfinished
from slimline.errors import ModelError, StoreError
from slimline.quantize import rtn
from tests.decoders import make_decoder, seal_decoder

LAYERS = 8
THIRD = f"model-00003-of-{LAYERS + 1:05}.safetensors"
RUN = "import sys; from slimline import step; step.run('quantize.rtn', sys.argv[1], {'bits': 3})"
CLI = "from slimline.cli import main; main()"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Eight layers, each of which takes long enough to be interrupted."""
    return seal_decoder(
        make_decoder("llama", tmp_path_factory.mktemp("resume") / "llama", layers=LAYERS, width=256, feed=256)
    )


@pytest.fixture(scope="module")
def whole(llama):
    """What a run that nothing disturbs makes of it."""
    torch.set_num_threads(1)  # as in the processes it is compared with: sums of more threads end in other bits
    step.run_on_folder("quantize.rtn", llama, llama.parent / "whole", {"bits": 3}, lambda event: None)
    return llama.parent / "whole"


def killed_at_the_third_part(command, place):
    """Run a command, end it with SIGKILL when the third layer is written, and return the folder and its parts."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (found := list(place.rglob(THIRD))):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    parts = {file.name: file.stat().st_ino for file in found[0].parent.glob("model-*.safetensors")}
    assert 3 <= len(parts) < LAYERS
    return found[0].parent, parts


def told(events):
    return next(event["note"] for event in events if event.get("what") == "rounding layers")


def test_a_step_killed_in_the_middle_goes_on_there_and_ends_in_the_same_bytes(llama, whole, tmp_path):
    out, events = tmp_path / "out", []
    folder, parts = killed_at_the_third_part(
        [sys.executable, "-c", CLI, "step", "quantize.rtn", str(llama), str(out), "--set", "bits=3"], tmp_path
    )
    assert folder.parent.name.startswith(".slimline-unfinished-out-") and not out.exists()
    step.run_on_folder("quantize.rtn", llama, out, {"bits": 3}, events.append)
    assert told(events) == f"resumed at layer {len(parts) + 1} of {LAYERS}"
    assert {name: (out / name).stat().st_ino for name in parts} == parts, "the very files"
    assert artifact.verify(out).digest == artifact.read(whole).digest
    assert artifact.read(out).history[-1].metrics == artifact.read(whole).history[-1].metrics
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


def test_a_step_of_the_store_goes_on_too(fresh_store, llama, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_PROGRESS", str(tmp_path / "events.jsonl"))
    folder, parts = killed_at_the_third_part([sys.executable, "-c", RUN, str(llama)], fresh_store)
    assert folder.parent.parent == fresh_store / "unfinished"
    ref, numbers = step.run("quantize.rtn", str(llama), {"bits": 3})
    assert f"resumed at layer {len(parts) + 1} of {LAYERS}" in (tmp_path / "events.jsonl").read_text()
    assert artifact.verify(store.fetch(ref)).digest == artifact.read(whole).digest
    assert numbers["relative_error"] == artifact.read(whole).history[-1].metrics["relative_error"]
    assert list((fresh_store / "unfinished").iterdir()) == []


def test_other_options_or_another_source_begin_anew(llama, tmp_path, monkeypatch):
    other, fit, calls = tmp_path / "other", grid.fit, []
    shutil.copytree(llama, other)
    (other / "generation_config.json").write_text("{}")
    seal_decoder(other)

    def stops(*given, **more):
        calls.append(1)
        if len(calls) > 3 * 7:
            raise ModelError("enough")
        return fit(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(ModelError):
        patch.setattr(grid, "fit", stops)
        step.run_on_folder("quantize.rtn", llama, tmp_path / "out", {"bits": 3}, print)
    for source, bits in ((llama, 4), (other, 3), (llama, 3)):
        events, out = [], tmp_path / f"out of {source.name} {bits}"
        if (source, bits) == (llama, 3):
            out = tmp_path / "out"
        step.run_on_folder("quantize.rtn", source, out, {"bits": bits, "search": True}, events.append)
        assert told(events) == ("resumed at layer 4 of 8" if out.name == "out" else "")


def test_two_equal_steps_at_once_compute_once(fresh_store, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_PROGRESS", str(tmp_path / "events.jsonl"))
    processes = [
        subprocess.Popen([sys.executable, "-c", RUN, str(llama)], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [(p.wait(), p.stderr.read()) for p in processes if p.wait()] == []
    assert len(store.client().search_runs(["0", *_experiments()], "attributes.status = 'FINISHED'")) == 1
    events = (tmp_path / "events.jsonl").read_text()
    assert events.count('"reused": true') == events.count('"reused": false') == 1


def _experiments():
    return [e.experiment_id for e in store.client().search_experiments()]


OUT_OF_MEMORY = """
import re, resource
from pathlib import Path
import torch
from slimline import grid
from slimline.cli import main
fit, calls = grid.fit, []
def fails(*given, **more):
    calls.append(1)
    if len(calls) > 3 * 7 + 2:
        now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) << 10
        resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20),) * 2)
        torch.zeros(256 << 20)
    return fit(*given, **more)
grid.fit = fails
main()
"""


def test_too_little_memory_is_said_with_the_layer_and_costs_only_that(llama, whole, tmp_path):
    out, events = tmp_path / "out", []
    command = ["step", "quantize.rtn", str(llama), str(out), "--set", "bits=3"]
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, *command], capture_output=True, text=True)
    assert done.returncode == StoreError.exit_code, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert "error: quantize.rtn ran out of memory while rounding layers, 4 of 8 (" in said
    assert "can't allocate memory" in said, "torch's own words"
    assert (
        "fewer or shorter windows of text, or a machine with more. What is finished is kept: the same command" in said
    )
    assert "Traceback" not in done.stderr
    step.run_on_folder("quantize.rtn", llama, out, {"bits": 3}, events.append)
    assert told(events) == f"resumed at layer 4 of {LAYERS}"
    assert artifact.read(out).digest == artifact.read(whole).digest


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["Python", "CUDA", "the system"],
)
def test_whoever_runs_out_of_memory_says_the_same(error, llama, tmp_path, monkeypatch):
    def fails(*_, **__):
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("a library's own") from inner

    monkeypatch.setattr(grid, "fit", fails)
    with pytest.raises(StoreError, match=r"^quantize.rtn ran out of memory while rounding layers, 1 of 8 \(.+\)\. "):
        step.run_on_folder("quantize.rtn", llama, tmp_path / "out", {}, print)


def test_an_error_of_another_kind_is_not_taken_for_memory(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "fit", lambda *_, **__: (_ for _ in ()).throw(ValueError("a quota (os error 122)")))
    with pytest.raises(ValueError, match="os error 122"):
        step.run_on_folder("quantize.rtn", llama, tmp_path / "out", {}, print)
    assert list(tmp_path.iterdir()) == [], "no layer was finished, so nothing is kept"


def test_a_technique_that_cannot_resume_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.delattr(rtn, "RESUMES")
    calls = []

    def fails(*given, **more):
        calls.append(1)
        if len(calls) > 20:
            raise ModelError("enough")
        return fit(*given, **more)

    fit = grid.fit
    monkeypatch.setattr(grid, "fit", fails)
    with pytest.raises(ModelError):
        step.run_on_folder("quantize.rtn", llama, tmp_path / "out", {}, print)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_one_processes_own_and_comes_back_after_an_error(tmp_path):
    order, waited = [], threading.Event()

    def second():
        with unfinished.kept(tmp_path, "step-a", waited.set) as folder:
            order.append(("second", [file.name for file in folder.iterdir()]))

    thread = threading.Thread(target=second)
    with pytest.raises(ValueError), unfinished.kept(tmp_path, "step-a") as folder:
        (folder / "part").write_text("one")
        thread.start()
        assert waited.wait(5)
        order.append(("first", []))
        raise ValueError
    thread.join(5)
    assert order == [("first", []), ("second", ["part"])]
    assert list(tmp_path.iterdir()) == [], "the second ended well"


def test_what_nobody_came_back_for_goes_after_two_weeks(tmp_path):
    long_ago = time.time() - 15 * 86_400
    for name, touched in (("step-old", long_ago), ("step-new", time.time()), ("other-old", long_ago)):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "part").write_text("x")
        for path in (tmp_path / name / "model" / "part", tmp_path / name / "model", tmp_path / name):
            os.utime(path, (touched, touched))
    with unfinished.kept(tmp_path, "step-mine"):
        assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir()) == ["other-old", "step-mine", "step-new"]


def test_what_somebody_works_in_stays_however_old(tmp_path):
    with unfinished.kept(tmp_path, "step-old") as folder:
        long_ago = time.time() - 15 * 86_400
        for path in (folder, folder.parent):
            os.utime(path, (long_ago, long_ago))
        with unfinished.kept(tmp_path, "step-mine"):
            assert folder.is_dir()


def test_where_there_are_no_locks_one_works_alone(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(unfinished.fcntl, "flock", without)
    with unfinished.kept(tmp_path, "step-a") as first, unfinished.kept(tmp_path, "step-a") as second:
        assert first != second and first.name == second.name == "model"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
