import json

import numpy as np
import pytest
import torch

from slimline import artifact, hf, imitation, technique, training
from slimline.errors import DataError, ModelError
from slimline.train import finetune
from tests.tiny import KINDS, LABELS, make_tiny


def trained(source, out, data, **options):
    out.mkdir()
    config = technique.configure(
        finetune, {"data": str(data), "learning_rate": 3e-3, "epochs": 6, "batch_size": 8, **options}
    )
    return finetune.run(source, out, config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_encoder_learns_the_task_and_says_its_labels(kind, tmp_path, tiny_data):
    metrics = trained(make_tiny(kind, tmp_path / "bare", head=False), tmp_path / "out", tiny_data)
    assert metrics["validation_accuracy"] > 0.85
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": LABELS[0], "1": LABELS[1]}
    assert config["slimline_max_length"] == hf.max_length(tmp_path / "bare") <= 66


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, tiny_data):
    source = make_tiny("bert", tmp_path / "bare", head=False)
    first = trained(source, tmp_path / "a", tiny_data, epochs=1)
    second = trained(source, tmp_path / "b", tiny_data, epochs=1)
    trained(source, tmp_path / "c", tiny_data, epochs=1, seed=1)
    digests = [artifact.digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert {k: v for k, v in first.items() if k != "tokens_per_s"} == {
        k: v for k, v in second.items() if k != "tokens_per_s"
    }


def test_what_is_written_is_the_best_epoch_by_validation(tmp_path, tiny_data):
    metrics = trained(make_tiny("bert", tmp_path / "bare", head=False), tmp_path / "out", tiny_data, epochs=3)
    model, tokenizer = hf.load(tmp_path / "out"), hf.tokenizer(tmp_path / "out", 64)
    validation = training.read(tiny_data, "validation", tokenizer, LABELS)
    accuracy, negative_loss = training.validate(model, tokenizer, validation)
    assert accuracy == metrics["validation_accuracy"]
    assert -negative_loss == pytest.approx(metrics["validation_loss"], rel=1e-4)


def test_batches_hold_every_text_once_and_texts_of_like_length(tmp_path):
    lengths = list(np.random.default_rng(0).integers(3, 60, 200))
    batches = list(training.shuffled(lengths, 16, np.random.default_rng(1)))
    assert sorted(i for rows in batches for i in rows) == list(range(200))
    widest = max(max(lengths[i] for i in rows) - min(lengths[i] for i in rows) for rows in batches)
    assert widest < 15
    assert batches != list(training.shuffled(lengths, 16, np.random.default_rng(2)))


def test_the_rate_rises_and_falls_in_straight_lines():
    weight = torch.nn.Linear(2, 2)
    plan = training.Training(learning_rate=0.1, warmup=0.5)
    optimizer, schedule = training.optimizing(weight, plan, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])


def test_the_average_of_the_first_steps_is_plain_and_then_forgets():
    weight = torch.nn.Linear(1, 1, bias=False)
    average = training.Average(weight, steps=2)
    for value in (4.0, 2.0, 7.0):
        weight.weight.data.fill_(value)
        average.update()
    with average.in_place():
        assert weight.weight.item() == ((4 + 2) / 2 + 7) / 2
    assert weight.weight.item() == 7.0


def test_without_an_average_the_weights_are_those_of_the_last_step():
    weight = torch.nn.Linear(1, 1, bias=False)
    average = training.Average(weight, steps=0)
    weight.weight.data.fill_(3.0)
    average.update()
    with average.in_place():
        assert weight.weight.item() == 3.0


def test_biases_and_norms_do_not_decay():
    optimizer, _ = training.optimizing(torch.nn.Linear(2, 2), training.Training(weight_decay=0.3), 4)
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups] == [
        (0.3, [2]),
        (0.0, [1]),
    ]


def test_frozen_embeddings_stay_as_they_were_and_the_rest_learns(tmp_path, tiny_data):
    source = make_tiny("bert", tmp_path / "bare", head=False)
    trained(source, tmp_path / "out", tiny_data, epochs=1, freeze_embeddings=True)
    before, after = hf.load(source, LABELS), hf.load(tmp_path / "out")
    assert torch.equal(before.bert.embeddings.word_embeddings.weight, after.bert.embeddings.word_embeddings.weight)
    assert not torch.equal(
        before.bert.encoder.layer[0].output.dense.weight, after.bert.encoder.layer[0].output.dense.weight
    )


def test_a_head_that_does_not_fit_the_labels_of_the_data_is_refused(tmp_path, tiny_data):
    file = tmp_path / "three.csv"
    rows = "\n".join(f"text {i} of kind {i % 3},{'abc'[i % 3]}" for i in range(300))
    file.write_text(f"text,label\n{rows}\n")
    with pytest.raises(ModelError, match="head for 2 labels but the data has 3"):
        trained(make_tiny("bert", tmp_path / "model"), tmp_path / "out", file)


def test_data_with_one_label_only_is_refused(tmp_path):
    file = tmp_path / "one.csv"
    file.write_text("text,label\n" + "\n".join(f"text {i},good" for i in range(100)) + "\n")
    with pytest.raises(DataError, match="label"):
        trained(make_tiny("bert", tmp_path / "model"), tmp_path / "out", file)


def test_hiding_spares_first_and_last_tokens_and_padding():
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    hidden = imitation.hide(batch, 0.999999, 99)["input_ids"]
    assert hidden.tolist() == [[1, 99, 99, 99, 99, 6], [7, 99, 99, 10, 11, 12]]
    assert imitation.hide(batch, 0.0, 99)["input_ids"] is ids


def test_imitation_is_hintons_formula():
    config = imitation.Imitation(temperature=2, mixing=0.75)
    mine, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    value = float(imitation.imitate(mine, teacher, torch.tensor([1]), config))
    p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    kl = float((p * (np.log(p) - np.log(0.5))).sum())
    assert value == pytest.approx(0.75 * 4 * kl + 0.25 * np.log(2), rel=1e-6)
