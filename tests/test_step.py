import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slimline import artifact, step, store
from slimline.errors import ConfigError, ModelError, StoreError
from tests.tiny import make_tiny


@pytest.fixture
def outside(tmp_path) -> Path:
    """A model folder as it comes from outside."""
    return make_tiny("bert", tmp_path / "outside")


def runs(status: str = "FINISHED") -> list:
    experiments = [e.experiment_id for e in store.client().search_experiments()]
    return list(store.client().search_runs(experiments, f"attributes.status = '{status}'"))


def test_a_step_leaves_a_sealed_model_with_its_history_in_the_store(fresh_store, outside):
    ref, metrics = step.run("fetch.local", str(outside), {})
    manifest = artifact.verify(store.fetch(ref))
    (stage,) = manifest.history
    assert (stage.technique, stage.parent) == ("fetch.local", artifact.digest(outside))
    assert manifest.base == str(outside)
    assert stage.seconds > 0 and stage.peak_memory_bytes > 1e6 and len(stage.code) == 64
    assert metrics["parameters"] == stage.metrics["parameters"] == store.metrics(store.run_id_of(ref))["parameters"]


def test_the_same_step_is_reused_and_another_source_is_not(fresh_store, outside, tmp_path):
    first, numbers = step.run("fetch.local", str(outside), {})
    again, same = step.run("fetch.local", str(outside), {})
    assert (again, same) == (first, numbers)
    assert len(runs()) == 1
    other, _ = step.run("fetch.local", str(make_tiny("bert", tmp_path / "other", seed=1)), {})
    assert other != first


def test_a_file_of_weights_stands_for_its_folder_so_a_changed_config_is_another_source(fresh_store, outside):
    first, _ = step.run("fetch.local", str(outside / "model.safetensors"), {})
    assert step.run("fetch.local", str(outside), {})[0] == first
    config = json.loads((outside / "config.json").read_text())
    (outside / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert step.run("fetch.local", str(outside / "model.safetensors"), {})[0] != first


def test_a_stored_model_that_was_changed_is_made_again_and_not_handed_on(fresh_store, outside):
    first, _ = step.run("fetch.local", str(outside), {})
    weights = store.fetch(first) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    second, _ = step.run("fetch.local", str(outside), {})
    assert second != first
    artifact.verify(store.fetch(second))


def test_none_passes_the_ref_through_and_copies_nothing(fresh_store):
    assert step.run("prune.none", "runs:/0/model", {"heads": 0.5}) == ("runs:/0/model", {})
    assert runs() == []


def test_the_same_step_on_a_models_registered_name_is_the_same_step(fresh_store, outside, tiny_data):
    ref, _ = step.run("fetch.local", str(outside), {})
    store.register("reviews", ref, "k", {}, "")
    one = step.resolve(ref)
    other = step.resolve("models:/reviews/1")
    assert one.digest == other.digest


def test_a_technique_that_needs_another_format_says_where_it_belongs(fresh_store, outside, tiny_data):
    ref, _ = step.run("fetch.local", str(outside), {})
    with pytest.raises(ModelError, match=r"quantize.int8_dynamic needs onnx but .* is hf. Put this step after export"):
        step.run("quantize.int8_dynamic", ref, {"data": str(tiny_data)})
    with pytest.raises(ModelError, match="Bring it in with fetch.local"):
        step.run("prune.heads", str(outside), {"data": str(tiny_data)})


def test_a_failed_step_leaves_no_model_and_a_run_marked_failed(fresh_store, outside):
    (outside / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        step.run("fetch.local", str(outside), {})
    assert len(runs("FAILED")) == 1 and runs() == []
    assert not list((fresh_store / "artifacts").rglob("manifest.json"))


def test_an_unknown_technique_or_option_is_refused_before_a_run_is_made(fresh_store, outside):
    with pytest.raises(ConfigError, match="Did you mean 'fetch.local'"):
        step.run("fetch.locale", str(outside), {})
    with pytest.raises(ConfigError, match="fetch.local has no option 'sped'"):
        step.run("fetch.local", str(outside), {"sped": 1})
    assert runs() == [] and runs("FAILED") == []


def test_what_happens_is_written_for_whoever_watches(fresh_store, outside, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_PROGRESS", str(tmp_path / "events.jsonl"))
    ref, _ = step.run("fetch.local", str(outside), {})
    with pytest.raises(ConfigError):
        step.run("fetch.local", str(outside), {"sped": 1})
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [e["event"] for e in events if e["event"] != "progress"]
    assert kinds == ["start", "end", "start", "error"]
    assert next(e for e in events if e["event"] == "end")["ref"] == ref
    assert events[-1]["kind"] == "ConfigError" and "sped" in events[-1]["message"]


def test_the_digest_of_code_changes_with_what_a_technique_imports_and_with_nothing_else():
    prune, fetch = step.code_digest("slimline.prune.heads"), step.code_digest("slimline.fetch.local")
    assert prune != fetch
    assert prune == step.code_digest("slimline.prune.heads")
    imported = set(step.imported_modules("slimline.fetch.local"))
    assert {"slimline.fetch.local", "slimline.allowlist"} <= imported
    assert not imported & {"slimline.store", "slimline.step", "slimline.prune.heads"}


POINTS = {
    "in the technique": "from slimline.fetch import local as place; name = 'run'; after = False",
    "before the manifest is written": "from slimline import artifact as place; name = 'seal'; after = False",
    "before the upload": "from slimline import store as place; name = 'save'; after = False",
    "between the files and the manifest": "from pathlib import Path as place; name = '_none'; after = False",
    "after the upload": "from slimline import store as place; name = 'save'; after = True",
    "before the run is marked finished": "from slimline import store as place; name = 'end'; after = False",
}
KILLED = """
import os, signal, sys
from slimline import step, store
{point}
def die(*args, **kwargs):
    if after:
        original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
if name == "_none":
    calls = []
    put = store.transfer.upload
    def counted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(*args)
    store.transfer.upload = counted
else:
    original = getattr(place, name)
    setattr(place, name, die)
step.run("fetch.local", sys.argv[1], {{}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_step_killed_anywhere_is_made_whole_by_the_same_command(fresh_store, outside, point):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(point=POINTS[point]), str(outside)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert runs() == []
    ref, _ = step.run("fetch.local", str(outside), {})
    artifact.verify(store.fetch(ref))
    assert len(runs()) == 1
    assert runs("RUNNING") == []
    assert step.run("fetch.local", str(outside), {})[0] == ref


def test_a_terminated_step_marks_its_run_killed_and_exits_with_143(fresh_store, outside):
    code = (
        "import os, signal, sys, time\nfrom slimline import step\nfrom slimline.fetch import local\n"
        "def slow(*_):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
        "local.run = slow\nstep.run('fetch.local', sys.argv[1], {})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(outside)], capture_output=True, text=True)
    assert ended.returncode == 143, ended.stderr[-2000:]
    assert len(runs("KILLED")) == 1


def test_a_full_disk_is_said_and_leaves_nothing_half_done(fresh_store, outside, tmp_path):
    code = (
        "import resource, sys\nfrom slimline import errors, step, store\nstore.client()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, 8_000_000))\n"
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n    step.run('fetch.local', sys.argv[1], {})\n"
        "except errors.StoreError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    big = make_tiny("bert", tmp_path / "big", width=384)
    assert (big / "model.safetensors").stat().st_size > 8_000_000
    full = subprocess.run([sys.executable, "-c", code, str(big)], capture_output=True, text=True)
    assert full.returncode == 5, full.stderr[-2000:]
    assert "the disk is full" in full.stdout and "MB free" in full.stdout
    assert not list((fresh_store / "artifacts").rglob("manifest.json"))
    ref, _ = step.run("fetch.local", str(big), {})
    artifact.verify(store.fetch(ref))


def test_one_technique_runs_on_a_folder_without_any_store(outside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = []
    numbers = step.run_on_folder("fetch.local", outside, tmp_path / "out", {}, events.append)
    assert artifact.verify(tmp_path / "out").history[-1].metrics == numbers
    assert [e["event"] for e in events if e["event"] != "progress"] == ["start", "end"]
    assert not (tmp_path / "slimline-store").exists()
    with pytest.raises(ConfigError, match="exists already"):
        step.run_on_folder("fetch.local", outside, tmp_path / "out", {}, events.append)


def test_a_result_that_has_no_place_is_refused(outside, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"file/out cannot be written: .*\. Name another folder\."):
        step.run_on_folder("fetch.local", outside, tmp_path / "file" / "out", {}, print)


def test_a_sealed_model_is_not_fetched_again(tiny_bert, tmp_path):
    with pytest.raises(ModelError, match=r"takes a plain folder but .* is a sealed hf model\. .* fetch_method=none"):
        step.run_on_folder("fetch.local", tiny_bert, tmp_path / "out", {}, print)


def test_nothing_secret_of_the_environment_is_written_down(fresh_store, outside, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-in-a-coal-mine")
    store.start_pipeline("optimize", "optimize", {"margin": 0.1}, "slimline run")
    step.run("fetch.local", str(outside), {})
    for folder, _, names in os.walk(fresh_store):
        for name in names:
            assert b"canary-in-a-coal-mine" not in (Path(folder) / name).read_bytes()


def test_a_ref_that_is_gone_is_said(fresh_store):
    with pytest.raises(StoreError, match="does not exist"):
        step.run("fetch.local", "no/such/model", {})
