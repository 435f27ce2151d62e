"""Drift: what is kept of a data set, which texts are new, and what has changed beyond chance."""

import json
import random

import numpy as np
import pytest

from slimline import drift
from slimline.errors import DataError

FILMS = ["film", "plot", "actor", "scene", "story", "ending", "camera", "director", "script", "music"]
MEALS = ["soup", "bread", "salt", "waiter", "table", "menu", "spice", "dish", "oven", "kitchen"]


def texts(count, words, seed, length=8):
    draw = random.Random(seed)
    lengths = [draw.randint(length - 4, length + 4) for _ in range(count)]
    return [" ".join(draw.choices(words, k=k)) + f" {seed}x{i}" for i, k in enumerate(lengths)]


def write(file, found, labels=("good", "bad"), split=None):
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(found)]
    if split:
        rows = [{**row, "split": split[i]} for i, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def inputs(tmp_path, *given, **more):
    return drift.look(write(tmp_path / "data.jsonl", *given, **more))


def test_texts_of_one_kind_have_not_drifted_nor_have_the_same_ones(tmp_path):
    old, new = (inputs(tmp_path, texts(600, FILMS, seed)) for seed in (1, 2))
    assert drift.compare(old, new).drifted == []
    assert drift.compare(old, old).size["labels"] == drift.compare(old, old).size["length"] == 0.0


def test_chance_alone_is_called_drift_in_at_most_one_of_twenty_tries(tmp_path):
    found = [inputs(tmp_path, texts(60, FILMS + MEALS, seed)) for seed in range(40)]
    assert sum(bool(drift.compare(a, b).drifted) for a, b in zip(found[::2], found[1::2])) <= 1


def test_other_words_other_labels_and_other_lengths_are_told_apart(tmp_path):
    old = inputs(tmp_path, texts(300, FILMS, 1))
    assert drift.compare(old, inputs(tmp_path, texts(300, MEALS, 2))).drifted == ["words"]
    more_bad = inputs(tmp_path, texts(300, FILMS, 2), labels=("good", "bad", "bad"))
    assert drift.compare(old, more_bad).drifted == ["labels"]
    assert "length" in drift.compare(old, inputs(tmp_path, texts(300, FILMS, 2, length=14))).drifted


def test_distances_are_those_that_can_be_counted_by_hand(tmp_path):
    old = inputs(tmp_path, ["a b", "c d", "e f", "g h"], labels=("x", "x", "x", "y"))
    new = inputs(tmp_path, ["a b c", "c d e", "e f", "g h"], labels=("x", "y"))
    assert drift.compare(old, new).size == {"labels": 0.25, "length": 0.5, "words": 0.5}


def test_what_is_read_back_is_what_was_kept_and_holds_no_text(tmp_path):
    old = inputs(tmp_path, texts(1200, FILMS, 1))
    drift.write(old, tmp_path)
    again = drift.read(tmp_path)
    for one, other in zip(old, again, strict=True):
        assert np.allclose(one, other, atol=1e-3) if one.dtype == np.float32 else np.array_equal(one, other)
    assert len(again.sample_S) == drift.SAMPLE < len(again.text_N)
    assert b"director" not in (tmp_path / drift.FILE).read_bytes()
    assert drift.read(tmp_path / "nowhere") is None


def test_a_text_is_new_unless_it_was_there_in_any_case_and_spacing(tmp_path):
    old, new = inputs(tmp_path, ["One film", "two"]), inputs(tmp_path, ["one  FILM", "three", "two"])
    fresh = drift.fresh(old, new)
    assert fresh.tolist() == [False, True, False]
    assert drift.only(new, fresh).text_N.tolist() == [new.text_N[1]]
    assert drift.only(new, fresh).words_SH.tolist() == [new.words_SH[1].tolist()]


def test_a_text_that_the_champion_was_trained_on_cannot_judge(tmp_path):
    old = inputs(tmp_path, ["one", "two", "three"], split=["train", "test", "validation"])
    drift.refuse_leaks(old, inputs(tmp_path, ["two", "new"], split=["test", "test"]), "data.jsonl")
    leaking = inputs(tmp_path, ["one", "two", "three"], split=["test", "test", "test"])
    with pytest.raises(DataError, match=r"data.jsonl has 2 texts in split test which the champion was trained"):
        drift.refuse_leaks(old, leaking, "data.jsonl")
