import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from slimline import artifact, probe, serve
from slimline.errors import DataError, ModelError
from tests import words


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    return words.onnx_model(tmp_path_factory.mktemp("onnx") / "model")


@pytest.fixture(scope="module")
def torch_model(tmp_path_factory):
    return words.hf_model(tmp_path_factory.mktemp("hf") / "model")


def test_an_answer_is_the_likeliest_label_and_its_probability(onnx):
    (answer,) = serve.load(onnx).predict(["good film"])
    assert answer["label"] == "good"
    assert answer["score"] == pytest.approx(1 / (1 + math.exp(-4)))


def test_answers_come_in_the_order_of_the_texts_however_many_there_are(onnx):
    texts = ["good " * (i % 7) + "bad " * (i % 5) for i in range(100)]
    expected = [2 * (i % 7) - 2 * (i % 5) for i in range(100)]
    assert serve.load(onnx).logits(texts)[:, 1].tolist() == expected


def test_no_texts_give_no_answers(onnx):
    assert serve.load(onnx).predict([]) == []


@pytest.mark.parametrize("text", ["", " \n", "good " * 100_000, "🙂\u200d", "\ud83d", "\x00", "مرحبا"])
@pytest.mark.parametrize("which", ["onnx", "torch_model"])
def test_odd_texts_are_answered(which, text, request):
    (answer,) = serve.load(request.getfixturevalue(which), threads=1).predict([text])
    assert answer["label"] in words.LABELS
    assert 0.5 <= answer["score"] <= 1


def test_a_long_text_is_cut_at_the_length_of_the_config(onnx):
    logits = serve.load(onnx).logits(["good " * 100])
    assert logits[0, 1] == 2 * (16 - 2)


@pytest.mark.parametrize("bad", ["good", b"good", None, [None], [float("nan")], [["good"]], [b"good"]])
def test_what_is_not_a_list_of_texts_is_refused(onnx, bad):
    with pytest.raises(DataError):
        serve.load(onnx).logits(bad)


def test_a_folder_without_a_manifest_is_refused(onnx, tmp_path):
    (tmp_path / "model.onnx").write_bytes((onnx / "model.onnx").read_bytes())
    with pytest.raises(ModelError, match=r"manifest\.json"):
        serve.load(tmp_path)


def test_a_model_without_labels_is_refused(tmp_path):
    artifact.seal(tmp_path, format="hf", task="", labels=(), base="")
    with pytest.raises(ModelError, match="no labels"):
        serve.load(tmp_path)


def test_an_evaluation_is_not_a_model(tmp_path):
    artifact.seal(tmp_path, format="evaluation", task="", labels=("a",), base="")
    with pytest.raises(ModelError, match="evaluation"):
        serve.load(tmp_path)


def test_bytes_that_are_no_graph_are_refused_in_one_line(tmp_path):
    folder = words.onnx_model(tmp_path / "model")
    (folder / "model.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="does not load") as error:
        serve.load(folder)
    assert "\n" not in str(error.value)


def test_answers_that_are_not_finite_are_an_error(tmp_path):
    folder = words.onnx_model(tmp_path / "model", unknown=float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        serve.load(folder).predict(["unheard of"])


def test_an_onnx_model_is_served_without_torch(onnx):
    code = (
        "import sys; from slimline import serve; serve.load(sys.argv[1]).predict(['good']);"
        "print(sorted({'torch', 'transformers', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(onnx)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_runtimes_are_named(onnx, torch_model):
    assert serve.load(onnx).runtime.startswith("ONNX Runtime 1.")
    assert serve.load(torch_model).runtime.startswith("PyTorch 2.")


@pytest.mark.parametrize(
    "given",
    [
        ["good", "bad"],
        np.array(["good", "bad"]),
        np.array([["good"], ["bad"]], dtype=object),
        pd.Series(["good", "bad"]),
        pd.DataFrame({"text": ["good", "bad"]}),
        pd.DataFrame({"review": ["good", "bad"]}),
        pd.DataFrame({"id": [1, 2], "text": ["good", "bad"]}),
        {"text": ["good", "bad"]},
    ],
    ids=lambda given: type(given).__name__,
)
def test_mlflow_gets_a_table_whatever_it_sends(onnx, given):
    table = serve._load_pyfunc(str(onnx)).predict(given)
    assert list(table.columns) == ["label", "score"]
    assert table["label"].tolist() == ["good", "bad"]
    assert table["score"].dtype == np.float64


def test_a_table_without_a_column_of_texts_is_refused(onnx):
    with pytest.raises(DataError, match="'text'"):
        serve._load_pyfunc(str(onnx)).predict(pd.DataFrame({"a": ["x"], "b": ["y"]}))


def test_rows_of_the_softmax_sum_to_one_however_large_the_logits():
    rows = serve.softmax(np.array([[1000.0, 999.0], [-1000.0, 0.0]], dtype=np.float32))
    assert rows.sum(axis=1).tolist() == [1.0, 1.0]
    assert rows[0, 0] == pytest.approx(1 / (1 + math.exp(-1)))


# The mechanical blessing


@pytest.mark.parametrize("which", ["onnx", "torch_model"])
def test_a_sound_model_is_blessed_in_a_fresh_process(which, request):
    folder = request.getfixturevalue(which)
    done = subprocess.run([sys.executable, "-m", "slimline.serve", str(folder)], capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert (answer["ok"], answer["problem"], done.returncode) == (True, "", 0)
    assert answer["digest"] == artifact.read(folder).digest
    assert answer["peak_memory_bytes"] > 10_000_000
    assert answer["seconds_to_load"] > 0


def test_a_changed_byte_is_not_blessed(tmp_path, capsys):
    folder = words.onnx_model(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("16", "17"))
    assert serve.main([str(folder)]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"]
    assert "has changed" in answer["problem"]


def test_a_model_that_counts_its_padding_is_not_blessed(tmp_path):
    found = probe.probe(words.onnx_model(tmp_path / "model", masked=False))
    assert not found["ok"]
    assert "in a batch than alone" in found["problem"]


def test_a_dynamically_quantized_model_answers_each_text_alone_so_company_moves_nothing(tmp_path):
    history = ("quantize.int8_dynamic",)
    swayed = serve.load(words.onnx_model(tmp_path / "model", masked=False, history=history))
    texts = ["good", "a long bad film", "good good film a long a long a"]
    together = swayed.logits(texts)
    np.testing.assert_array_equal(together, np.concatenate([swayed.logits([text]) for text in texts]))


def test_not_naming_a_folder_is_a_usage_error(capsys):
    assert serve.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_peak_memory_is_this_programs_and_not_its_parents(onnx):
    code = (
        "import subprocess, sys; big = bytearray(600_000_000);"
        "print(subprocess.run([sys.executable, '-m', 'slimline.probe', sys.argv[1], '1'], input='[[\"good\"]]',"
        " capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(onnx)], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < 600_000_000
