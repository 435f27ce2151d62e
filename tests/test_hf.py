import json

import numpy as np
import pytest
import torch

from slimline import hf
from slimline.errors import ModelError
from tests.tiny import KINDS, LABELS, make_tiny

TEXTS = ["a superb film", "the plot is dull and the end is long and stale and cold", "fine", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_answers_as_transformers_itself_does(kind, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = make_tiny(kind, tmp_path / kind)
    tokenizer = hf.tokenizer(folder, 32)
    reference = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model = hf.load(folder)
    with torch.no_grad():
        each = [reference(**{k: v.cpu() for k, v in hf.tensors(tokenizer.encode([t]), model).items()}) for t in TEXTS]
    wanted = np.concatenate([answer.logits.numpy() for answer in each])
    np.testing.assert_allclose(hf.logits(model, tokenizer, TEXTS, batch_size=3), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_same_model(kind, tmp_path):
    folder = make_tiny(kind, tmp_path / kind)
    (tmp_path / "out").mkdir()
    model = hf.load(folder)
    hf.save(model, folder, tmp_path / "out")
    tokenizer = hf.tokenizer(tmp_path / "out", 32)
    again = hf.load(tmp_path / "out")
    np.testing.assert_array_equal(hf.logits(model, tokenizer, TEXTS), hf.logits(again, tokenizer, TEXTS))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == dict(zip("01", LABELS))


def test_a_bare_encoder_gets_a_head_that_depends_on_the_seed_alone(tmp_path):
    folder = make_tiny("bert", tmp_path / "bare", head=False)
    one, same, other = (hf.load(folder, ("a", "b", "c"), seed=s) for s in (1, 1, 2))
    assert one.classifier.weight.shape == (3, 32)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_a_bare_encoder_without_labels_is_sent_to_training(tmp_path):
    with pytest.raises(ModelError, match=r"no classification head.*train\.finetune"):
        hf.load(make_tiny("bert", tmp_path / "bare", head=False))


def test_a_head_that_does_not_fit_the_labels_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ModelError, match="head for 2 labels but the data has 3"):
        hf.load(make_tiny("bert", tmp_path / "model"), ("a", "b", "c"))


def test_missing_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_tiny("bert", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks weights: bert\.encoder\.layer\.1\.output\.dense\.weight"):
        hf.load(folder)


def test_an_unknown_family_and_a_missing_tokenizer_are_said(tmp_path):
    folder = make_tiny("bert", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        hf.tokenizer(folder, 8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="is a gpt2 model"):
        hf.load(folder)


def test_encoding_pads_on_the_right_and_cuts_at_the_limit(tmp_path):
    tokenizer = hf.tokenizer(make_tiny("bert", tmp_path / "model"), 6)
    batch = tokenizer.encode(["fine", "a very very very very long film"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["input_ids"][0, 3:].tolist() == [0, 0, 0]
    assert tokenizer.lengths(["fine", "a very very very very long film"]) == [3, 6]


def test_a_models_layers_are_cut_to_the_shapes_in_the_file(tmp_path):
    folder = make_tiny("bert", tmp_path / "model")
    model = hf.load(folder)
    layer = hf.layers(model)[0]
    for name in (BERT.query, BERT.key, BERT.value):
        part = layer.get_submodule(name)
        part.weight.data, part.bias.data = part.weight.data[:16], part.bias.data[:16]
    mixed = layer.get_submodule(BERT.mixed)
    mixed.weight.data = mixed.weight.data[:, :16]
    (tmp_path / "out").mkdir()
    hf.save(model, folder, tmp_path / "out")
    again = hf.load(tmp_path / "out")
    assert hf.layers(again)[0].get_submodule(BERT.query).weight.shape == (16, 32)
    tokenizer = hf.tokenizer(folder, 32)
    np.testing.assert_allclose(hf.logits(again, tokenizer, TEXTS), hf.logits(model, tokenizer, TEXTS), atol=1e-6)


BERT = hf.BERT


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_on_the_first_token_alone_gives_the_same_answers_and_gradients(kind, tmp_path):
    folder = make_tiny(kind, tmp_path / kind)
    tokenizer, model = hf.tokenizer(folder, 32), hf.load(folder)
    batch = hf.tensors(tokenizer.encode(TEXTS), model)

    def answers_and_gradients():
        model.zero_grad()
        last = []
        seen = list(hf.layers(model))[-1].register_forward_hook(lambda module, inputs, out: last.append(out))
        logits = model(**batch).logits
        torch.logsumexp(logits, dim=1).sum().backward()
        seen.remove()
        return logits.detach(), last[0].shape, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, shape, wanted = answers_and_gradients()
    with hf.first_token_only(model):
        logits, one, found = answers_and_gradients()
    assert shape[1] > 1 and one[1] == 1  # the work did fall away
    torch.testing.assert_close(logits, whole, atol=1e-6, rtol=1e-5)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert answers_and_gradients()[1] == shape  # and comes back afterwards


def test_lengths_are_rounded_up_as_asked_but_never_beyond_where_texts_are_cut(tmp_path):
    tokenizer = hf.tokenizer(make_tiny("bert", tmp_path / "m"), 12)
    short, long = TEXTS[0], TEXTS[1]
    assert [tokenizer.encode([t])["input_ids"].shape for t in (short, long)] == [(1, 5), (1, 12)]
    for texts, width in (([short], 8), ([short, long], 12), ([""], 8)):
        padded, plain = tokenizer.encode(texts, 8), tokenizer.encode(texts)
        used = plain["input_ids"].shape[1]
        assert padded["input_ids"].shape == (len(texts), width)
        assert all((padded[key][:, :used] == plain[key]).all() for key in plain)
        assert (padded["attention_mask"][:, used:] == 0).all() and (
            padded["input_ids"][:, used:] == tokenizer.pad
        ).all()
