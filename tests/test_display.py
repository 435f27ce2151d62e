"""What the Kubeflow page draws of an evaluation: counted by hand, and in KFP's own artifact."""

import numpy as np
import pytest
from kfp import dsl

from slimline import artifact, display
from tests import words
from tests.test_evaluate import ROWS, evaluated, write


@pytest.fixture
def evaluation(tmp_path, fresh_store):
    """Five answers of a model that counts words, four of them right."""
    evaluated(words.onnx_model(tmp_path / "model"), tmp_path / "out", data=write(tmp_path / "data.csv", ROWS))
    return tmp_path / "out"


def test_the_page_gets_every_answer_by_its_label_and_the_curve(evaluation):
    shown = dsl.ClassificationMetrics()
    display.answers(str(evaluation), shown)
    labels = [spec["displayName"] for spec in shown.metadata["confusionMatrix"]["annotationSpecs"]]
    rows = dict(zip(labels, (row["row"] for row in shown.metadata["confusionMatrix"]["rows"])))
    assert sorted(labels) == ["bad", "good"]
    assert rows["bad"][labels.index("bad")] == 1 and rows["bad"][labels.index("good")] == 0
    assert rows["good"][labels.index("bad")] == 1 and rows["good"][labels.index("good")] == 3
    curve = shown.metadata["confidenceMetrics"]
    assert (curve[0]["falsePositiveRate"], curve[0]["recall"]) == (0, 0)
    assert (curve[-1]["falsePositiveRate"], curve[-1]["recall"]) == (1, 1)


def test_an_evaluation_without_labels_is_left_undrawn(tmp_path, fresh_store):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "documents.json").write_text("{}")
    artifact.seal(tmp_path / "documents", format="evaluation", task="text-generation", labels=(), base="")
    shown = dsl.ClassificationMetrics()
    display.answers(str(tmp_path / "documents"), shown)
    assert shown.metadata == {}


def test_a_curve_steps_once_for_each_score():
    curve = display.roc(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
    assert curve.threshold == [1.0, 0.9, 0.8, 0.1]
    assert curve.true == [0, 0.5, 1, 1]
    assert curve.false == [0, 0, 0.5, 1]


def test_perfect_scores_reach_the_corner_and_useless_ones_the_diagonal():
    positive = np.arange(1000) % 2 == 1
    perfect = display.roc(positive.astype(float), positive)
    assert (0.0, 1.0) in zip(perfect.false, perfect.true)
    useless = display.roc(np.full(1000, 0.5), positive)
    assert (useless.false, useless.true) == ([0, 1], [0, 1])


def test_many_answers_are_a_hundred_points_that_lie_on_the_whole_curve():
    generator = np.random.default_rng(0)
    scores, positive = generator.random(100_000), generator.random(100_000) < 0.3
    curve = display.roc(scores, positive)
    assert len(curve.true) == display.POINTS + 1
    for false, true, threshold in zip(*curve):
        if threshold < 1:
            assert true == pytest.approx((scores[positive] >= threshold).mean())
            assert false == pytest.approx((scores[~positive] >= threshold).mean())
    assert list(curve.threshold) == sorted(curve.threshold, reverse=True)


def test_with_one_label_alone_nothing_is_divided_by_zero():
    curve = display.roc(np.array([0.2, 0.7]), np.array([True, True]))
    assert curve.true == [0, 0.5, 1] and curve.false == [0, 0, 0]
