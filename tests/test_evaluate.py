import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from slimline import artifact, technique, variants
from slimline.errors import ConfigError, DataError, ModelError
from slimline.evaluate import classification, latency
from tests import words

ROWS = [
    ("good film", "good"),
    ("a good long film", "good"),
    ("bad film", "bad"),
    ("bad bad film", "good"),  # the one that a model which can only count gets wrong
    ("good good bad", "good"),
]


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "data.csv", ROWS)


def write(file, rows):
    lines = ["id,text,label,split"] + [f"{i},{text},{label},test" for i, (text, label) in enumerate(rows)]
    lines += ["t0,good,good,train", "t1,bad,bad,train"]
    file.write_text("\n".join(lines) + "\n")
    return file


def evaluated(model, out, **options):
    """Metrics and the sealed evaluation, as a step makes it."""
    out.mkdir()
    config = technique.configure(classification, {k: str(v) for k, v in options.items()})
    metrics = classification.run(model, out, config)
    artifact.seal(out, format="evaluation", task="text-classification", labels=words.LABELS, base="")
    return metrics


def test_four_of_five_right_is_an_accuracy_of_four_fifths_with_wilsons_interval(tmp_path, rows):
    metrics = evaluated(words.onnx_model(tmp_path / "model"), tmp_path / "out", data=rows)
    assert metrics["accuracy"] == 0.8
    assert metrics["accuracy_low"] == pytest.approx(0.3755, abs=1e-4)
    assert metrics["accuracy_high"] == pytest.approx(0.9638, abs=1e-4)
    assert metrics["recall_good"] == 0.75
    assert metrics["recall_bad"] == 1.0
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 6 / 7) / 2)
    assert metrics["examples"] == 5
    assert metrics["accuracy_0_to_15_tokens"] == 0.8


def test_answers_are_written_in_the_datas_order(tmp_path, rows):
    evaluated(words.onnx_model(tmp_path / "model"), tmp_path / "out", data=rows)
    table = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    assert list(table) == [
        "id", "text", "label", "predicted", "score", "logit_0", "logit_1", "length_tokens",
    ]  # fmt: skip
    assert table["text"] == [text for text, _ in ROWS]
    assert table["label"] == [label for _, label in ROWS]
    assert table["predicted"] == ["good", "good", "bad", "bad", "good"]
    assert table["logit_1"] == [2, 2, -2, -4, 2]
    assert table["score"][0] == pytest.approx(1 / (1 + math.exp(-4)))
    assert table["length_tokens"] == [4, 6, 4, 5, 5]


def test_two_runs_write_the_same_bytes(tmp_path, rows):
    model = words.onnx_model(tmp_path / "model")
    assert evaluated(model, tmp_path / "a", data=rows) == evaluated(model, tmp_path / "b", data=rows)
    assert artifact.digest(tmp_path / "a") == artifact.digest(tmp_path / "b")


def test_a_model_agrees_with_itself(tmp_path, rows):
    model = words.onnx_model(tmp_path / "model")
    evaluated(model, tmp_path / "before", data=rows)
    metrics = evaluated(model, tmp_path / "after", data=rows, baseline=tmp_path / "before")
    assert [metrics[k] for k in ("agreement", "flips_lost", "flips_won", "kl_mean")] == [1, 0, 0, 0]


def test_a_model_that_says_the_opposite_loses_what_was_right_and_wins_what_was_wrong(tmp_path, rows):
    evaluated(words.onnx_model(tmp_path / "model"), tmp_path / "before", data=rows)
    opposite = words.onnx_model(tmp_path / "opposite", weight=-2.0)
    metrics = evaluated(opposite, tmp_path / "after", data=rows, baseline=tmp_path / "before")
    assert metrics["agreement"] == 0
    assert metrics["flips_lost"] == 4
    assert metrics["flips_won"] == 1
    assert metrics["kl_mean"] > 1


def test_a_baseline_on_other_examples_is_refused(tmp_path, rows):
    model = words.onnx_model(tmp_path / "model")
    other = write(tmp_path / "other.csv", ROWS[:-1])
    evaluated(model, tmp_path / "before", data=other)
    with pytest.raises(DataError, match="4 examples which are not the 5"):
        evaluated(model, tmp_path / "after", data=rows, baseline=tmp_path / "before")


def test_a_baseline_that_is_no_evaluation_is_refused(tmp_path, rows):
    model = words.onnx_model(tmp_path / "model")
    with pytest.raises(DataError, match=r"predictions\.parquet"):
        evaluated(model, tmp_path / "after", data=rows, baseline=model)


def test_a_baselines_logits_are_read_in_this_models_order_of_labels(tmp_path, rows):
    evaluated(words.onnx_model(tmp_path / "model"), tmp_path / "before", data=rows)
    ids = pq.read_table(tmp_path / "before" / "predictions.parquet")["id"].to_pylist()
    turned = classification.baseline_logits(tmp_path / "before", ids, ("good", "bad"))
    assert turned[:, 0].tolist() == [2, 2, -2, -4, 2]
    with pytest.raises(ModelError, match="labels"):
        classification.baseline_logits(tmp_path / "before", ids, ("good", "ugly"))


def test_kl_is_zero_for_equal_and_log_two_for_sure_against_even():
    sure, even = np.array([[0.0, -1000.0]]), np.array([[0.0, 0.0]])
    assert classification.divergence(even, even).tolist() == [0.0]
    assert classification.divergence(sure, even)[0] == pytest.approx(math.log(2))


def test_slices_of_length_are_named_by_their_bounds():
    right, length = np.array([True, False, True, True]), np.array([15, 15, 16, 200])
    assert classification.by_length(right, length) == {
        "accuracy_0_to_15_tokens": 0.5,
        "accuracy_16_to_31_tokens": 1.0,
        "accuracy_from_64_tokens": 1.0,
    }


def test_a_label_that_never_occurs_does_not_count_in_macro_f1():
    metrics = classification.quality(np.array([0, 1]), np.array([0, 1]), ("no", "yes", "maybe"))
    assert metrics["macro_f1"] == 1
    assert "recall_maybe" not in metrics


def test_a_label_of_any_characters_gives_a_name_that_a_metric_can_have():
    metrics = classification.quality(np.array([0]), np.array([0]), ("très bon!?",))
    assert metrics["recall_très bon__"] == 1


@pytest.mark.parametrize("module", [classification, latency])
def test_a_split_that_is_not_there_is_refused(module):
    with pytest.raises(ConfigError, match="split"):
        technique.configure(module, {"data": "x", "split": "tset"})


# Latency


@pytest.fixture
def timed(tmp_path, rows):
    base = words.onnx_model(tmp_path / "base", history=("fetch.local", "train.finetune", "export.onnx"))
    other = words.hf_model(tmp_path / "other", history=("train.finetune",))
    small = words.onnx_model(tmp_path / "small", weight=1.0, history=("train.finetune", "prune.heads"))
    options = {"data": str(rows), "against": (str(base), str(other), str(base)), "batches": 6, "batch_size": 3}
    out = tmp_path / "out"
    out.mkdir()
    config = technique.configure(latency, options)
    metrics = latency.run(small, out, config)
    return metrics, json.loads((out / "latency.json").read_text(encoding="utf-8")), (base, other, small)


def test_latency_is_measured_for_all_with_the_first_as_baseline(timed):
    metrics, whole, models = timed
    assert [v["digest"] for v in whole["variants"]] == [artifact.read(m).digest for m in models], "each model once"
    assert [v["name"] for v in whole["variants"]] == ["finetune · onnx", "finetune · hf", "heads · onnx"]
    assert (whole["queries"], whole["batch_size"], whole["threads"]) == (662, 3, 1)
    assert whole["tokenization"] == "included"
    first, _, own = whole["variants"]
    assert [first[k] for k in ("speedup", "speedup_low", "speedup_high", "batch_speedup")] == [1, 1, 1, 1]
    for variant in whole["variants"]:
        assert 0 < variant["p50_low_ms"] <= variant["p50_ms"] <= variant["p50_high_ms"] <= variant["p99_ms"]
        assert variant["speedup_low"] <= variant["speedup"] <= variant["speedup_high"]
        assert variant["throughput_per_s"] == pytest.approx(3000 / variant["batch_p50_ms"])
        assert variant["peak_memory_bytes"] > variant["weights_bytes"] > 0
        assert variant["size_bytes"] > variant["weights_bytes"]
    assert metrics == {k: v for k, v in own.items() if not isinstance(v, str)}


def test_texts_are_drawn_by_seed_and_all_are_used_before_one_is_used_again():
    config = latency.Config(data="x", seed=3)
    texts = [str(i) for i in range(400)]
    drawn = latency.draw(texts, config)
    assert drawn == latency.draw(texts, config)
    assert drawn != latency.draw(texts, latency.Config(data="x", seed=4))
    assert len(drawn) == 662
    assert set(drawn[:400]) == set(texts)


def test_names_are_told_apart_when_two_models_were_made_alike():
    named = [{"name": "heads · hf", "digest": "aaaaaaaa"}, {"name": "heads · hf", "digest": "bbbbbbbb"}]
    variants.name_apart(named)
    assert [v["name"] for v in named] == ["heads · hf · aaaaaa", "heads · hf · bbbbbb"]


def test_fewer_queries_than_a_p99_needs_are_refused():
    with pytest.raises(ConfigError, match="662"):
        technique.configure(latency, {"data": "x", "queries": 661})


def test_all_options_that_name_something_stored_are_known():
    assert technique.stored_fields(latency.Config) == ["data", "against"]
    assert technique.stored_fields(classification.Config) == ["data", "baseline"]
