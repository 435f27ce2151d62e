"""Bad input gets one sentence that says what is wrong and what to do, an exit code, and nothing half done."""

import json
import sys

import pytest
import yaml

from slimline import cli, store
from tests.tiny import make_data, make_tiny


def call(capsys, monkeypatch, *arguments: str) -> tuple[int, str]:
    """Exit code and last line on stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["slimline", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    return int(stopped.value.code or 0), (said.strip().split("\n") or [""])[-1]


@pytest.fixture
def recipe(fresh_store, tmp_path):
    """A recipe that would run, to be spoilt; returns (its folder, write)."""
    make_tiny("bert", tmp_path / "model", head=False)
    make_data(tmp_path / "data.parquet")
    values = {"source": "model", "data": "data.parquet", "name": "reviews", "train_epochs": 1}
    values["train_options"] = {"batch_size": 64}

    def write(**changes) -> str:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
        return str(tmp_path / "recipe.yaml")

    return tmp_path, write


def nothing_registered() -> bool:
    return not store.client().search_registered_models()


def spoil_config(folder, **changes):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def spoil_weights(folder, how):
    from safetensors.torch import load_file, save_file

    file = folder / "model" / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        weights = load_file(file)
        weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
        save_file(weights, file)


MODELS = {
    "a missing tokenizer": (lambda f: (f / "model" / "tokenizer.json").unlink(), "tokenizer.json"),
    "a truncated safetensors file": (lambda f: spoil_weights(f, "truncated"), "model.safetensors"),
    "NaN in the weights": (lambda f: spoil_weights(f, "nan"), "encoder.layer.0.output.dense.weight"),
    "a config with auto_map": (lambda f: spoil_config(f, auto_map={"AutoModel": "x.Y"}), "auto_map"),
    "a private hook": (lambda f: spoil_config(f, _attn_implementation_internal="a/b"), "_attn_implementation_internal"),
    "a .py in the folder": (lambda f: (f / "model" / "modeling.py").write_text("raise SystemExit"), "modeling.py"),
    "a family that is not known": (lambda f: spoil_config(f, model_type="t5"), "t5"),
    "a pickle checkpoint": (
        lambda f: (f / "model" / "model.safetensors").rename(f / "model" / "pytorch_model.bin"),
        "safetensors",
    ),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_bad_model_ends_the_run_with_exit_3(recipe, capsys, monkeypatch, what):
    folder, write = recipe
    spoil, named = MODELS[what]
    spoil(folder)
    code, said = call(capsys, monkeypatch, "run", "optimize", "-f", write())
    assert code == 3 and named in said, said
    assert nothing_registered()


def test_a_head_that_does_not_fit_the_labels_ends_the_run_with_exit_3(recipe, capsys, monkeypatch):
    folder, write = recipe
    make_tiny("bert", folder / "headed")
    rows = "\n".join(f"text {i} of kind {i % 3},{'abc'[i % 3]}" for i in range(300))
    (folder / "three.csv").write_text(f"text,label\n{rows}\n")
    code, said = call(capsys, monkeypatch, "run", "optimize", "-f", write(source="headed", data="three.csv"))
    assert code == 3 and "head for 2 labels but the data has 3" in said, said
    assert nothing_registered()


DATA = {
    "an empty file": (b"", "empty"),
    "wrong columns": (b"words,mark\nfine,1\n", "text"),
    "one label only": (b"text,label\n" + b"".join(b"text %d,good\n" % i for i in range(60)), "label"),
    "bytes that are not UTF-8": (b"text,label\n" + b"caf\xe9,good\n" * 60, "UTF-8"),
}


@pytest.mark.parametrize("what", DATA)
def test_bad_data_ends_the_run_with_exit_3(recipe, capsys, monkeypatch, what):
    folder, write = recipe
    content, named = DATA[what]
    (folder / "bad.csv").write_bytes(content)
    code, said = call(capsys, monkeypatch, "run", "optimize", "-f", write(data="bad.csv"))
    assert code == 3 and named in said, said
    assert nothing_registered()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--set", "data=nowhere.csv"], 3, "does not exist"),
        (["--set", "prune_method=head"], 2, "Did you mean 'prune.heads'"),
        (["--set", "train_options.epoch=1"], 2, "Did you mean 'epochs'"),
        (["--set", "margn=0.1"], 2, "Did you mean 'margin'"),
        (["--set", "gate_options.min_sped=1"], 2, "min_sped"),
        (["--set", "name=a/b"], 2, "cannot name a registered model"),
        (["--set", "margin"], 2, "is not name=value"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_runs(recipe, capsys, monkeypatch, arguments, code, named):
    _, write = recipe
    given, said = call(capsys, monkeypatch, "run", "optimize", "-f", write(), *arguments)
    assert given == code and named in said, said
    assert not list((store.home() / "runs").glob("*")) if (store.home() / "runs").exists() else True


def test_an_unreachable_tracking_server_is_exit_5(recipe, capsys, monkeypatch):
    _, write = recipe
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, said = call(capsys, monkeypatch, "run", "optimize", "-f", write())
    assert code == 5 and "127.0.0.1:9 cannot be reached" in said


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["run", "optimise"], 2, "There is: compress, engine, language, optimize"),
        (["run", "optimize", "-f", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
        (["show", "models:/nobody@champion"], 5, "does not resolve"),
        (["show", "nowhere"], 5, "does not exist"),
        (["techniques", "prune.head"], 2, "Did you mean 'prune.heads'"),
        (["techniques", "prunes"], 2, "Did you mean 'prune'"),
        (["techniques", "quantize.int8"], 2, "Did you mean 'quantize.int8_dynamic'"),
        (["promote", "nobody"], 2, "no challenger"),
        (["rollback", "nobody"], 4, "no version before"),
        (["report", "models:/nobody/1"], 5, "does not resolve"),
        (["predict", "nowhere", "text"], 5, "does not exist"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_every_command_says_what_is_wrong(fresh_store, capsys, monkeypatch, arguments, code, named):
    given, said = call(capsys, monkeypatch, *arguments)
    assert given == code and named in said, said


def test_ctrl_c_is_no_success(fresh_store, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.recipe, "assign", interrupted)
    code, said = call(capsys, monkeypatch, "run", "optimize")
    assert code == 130 and said.endswith("stopped. The same command goes on where it was.")


def test_techniques_doctor_version_and_compile_answer(fresh_store, capsys, monkeypatch, tmp_path):
    def output(*arguments):
        monkeypatch.setattr(sys, "argv", ["slimline", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    assert "prune.heads" in output("techniques")
    shown = output("techniques", "prune.heads")
    assert "1905.10650" in shown and "fraction of the heads" in shown
    assert json.loads(output("techniques", "prune.heads", "--json"))["needs"] == "hf"
    assert "python" in output("doctor").lower()
    assert json.loads(output("doctor", "--json"))
    assert output("--version").startswith("slimline 0")
    output("compile", "optimize", "-o", str(tmp_path / "o.yaml"))
    assert (tmp_path / "o.yaml").is_file()


def test_one_step_on_a_folder_answers(fresh_store, capsys, monkeypatch, tmp_path):
    make_tiny("bert", tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["slimline", "step", "fetch.local", "model", "out", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out)["layers"] == 3
    assert (tmp_path / "out" / "manifest.json").is_file()
