"""prune.layers: which layers go, and that the rest answers as the source does without them."""

import itertools
import json
import math

import pytest
import torch

from slimline import decoder, passages, technique
from slimline.errors import ConfigError, ModelError
from slimline.prune import layers
from tests import plain
from tests.decoders import KINDS, make_decoder, make_documents, seal_decoder


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("data") / "documents.parquet")


def configured(documents, **options):
    return technique.configure(layers, {"data": str(documents), "windows": 4, "length": 32, **options})


def pruned(source, out, documents, **options):
    out.mkdir()
    return layers.run(source, out, configured(documents, **options))


class Skipped(torch.nn.Module):
    def forward(self, hidden, *args, **kwargs):
        return hidden


def without(source, gone):
    """The source's logits with some layers left out."""
    model = decoder.load(source)
    places = model.get_submodule(decoder.FAMILIES[model.config.model_type].layers)
    for i in gone:
        places[i] = Skipped()
    return plain.logits(model)


def gone(metrics):
    return [int(key[-2:]) for key, value in metrics.items() if key.startswith("stays_") and not value]


def states(source, tokens_NT):
    """What enters each layer, and what leaves the last: a list of [N, T, W] in float64."""
    model, found = decoder.load(source).double(), []
    places = model.get_submodule(decoder.FAMILIES[model.config.model_type].layers)
    for layer in places:
        layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    places[-1].register_forward_hook(lambda _, inputs, output: found.append(output))
    plain.logits(model, tokens_NT)
    return found


def angle(x, y):
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return cosine.clamp(-1, 1).arccos() / math.pi


@pytest.mark.parametrize("choose", ["each", "run"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_answers_as_the_source_without_the_layers_that_went(kind, choose, documents, tmp_path):
    more = {"sliding_window": 8} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    more |= {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2} if kind == "qwen2" else {}
    source = seal_decoder(make_decoder(kind, tmp_path / "source", layers=6, **more))
    metrics = pruned(source, tmp_path / "out", documents, num_layers=2, choose=choose)
    assert metrics["layers"] == 4 and len(gone(metrics)) == 2
    assert torch.equal(plain.assert_reads_the_same(tmp_path / "out"), without(source, gone(metrics)))


def test_the_layers_that_go_are_those_that_turn_their_inputs_least(documents, tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", layers=6))
    tokens_NT = torch.from_numpy(passages.draw(source, configured(documents)))
    found = states(source, tokens_NT)
    cosines = [torch.cosine_similarity(x, y, dim=-1).mean().item() for x, y in itertools.pairwise(found)]
    metrics = pruned(source, tmp_path / "out", documents, drop=0.5)
    assert gone(metrics) == sorted(sorted(range(6), key=lambda i: -cosines[i])[:3])
    for i, cosine in enumerate(cosines):
        assert metrics[f"influence_{i:02}"] == pytest.approx(1 - cosine, abs=1e-5)


def test_a_run_that_goes_is_the_one_whose_ends_are_nearest_in_angle(documents, tmp_path, monkeypatch):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", layers=6, seed=3))
    monkeypatch.setattr(layers, "LAST", 5)
    tokens_NT = torch.from_numpy(passages.draw(source, configured(documents)))
    ends = [x[:, -5:] for x in states(source, tokens_NT)]
    angles = [angle(ends[i], ends[i + 2]).mean().item() for i in range(5)]
    metrics = pruned(source, tmp_path / "out", documents, num_layers=2, choose="run")
    start = min(range(5), key=angles.__getitem__)
    assert gone(metrics) == [start, start + 1]
    assert metrics["run_angle"] == pytest.approx(angles[start], abs=1e-5)


def test_a_layer_that_does_nothing_goes_first(documents, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_decoder("llama", tmp_path / "source", layers=5)
    state = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.3.{name}.weight"].zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    metrics = pruned(seal_decoder(folder), tmp_path / "out", documents, drop=0.2)
    assert gone(metrics) == [3] and metrics["influence_03"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(plain.assert_reads_the_same(tmp_path / "out"), plain.logits(decoder.load(folder)))


def test_config_says_of_each_layer_that_stays_what_kind_it_is():
    values = {"num_hidden_layers": 5, "max_window_layers": 3}

    class Resolved:
        layer_types = ("full", "sliding", "sliding", "full", "sliding")

    assert layers.renumbered(values, Resolved, [0, 2, 3]) == {
        "num_hidden_layers": 3,
        "layer_types": ["full", "sliding", "full"],
        "sliding_window_pattern": None,
        "max_window_layers": 2,
    }
    assert layers.renumbered({"n_layer": 5}, object(), [0, 1]) == {"n_layer": 2}


def test_parameters_are_those_of_the_layers_that_stay(documents, tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", layers=4))
    metrics = pruned(source, tmp_path / "out", documents, drop=0.5)
    model = decoder.load(tmp_path / "out")
    each = sum(p.numel() for p in model.model.layers[0].parameters())
    head = 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    assert metrics["parameters"] == 2 * each + model.model.embed_tokens.weight.numel() + 64 + head
    assert metrics["parameters_removed"] == 2 * each
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_what_cannot_be_is_said(documents, tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source"))
    with pytest.raises(ConfigError, match="of 2 layers 2 cannot go: one has to stay"):
        pruned(source, tmp_path / "a", documents, num_layers=2)
    with pytest.raises(ConfigError, match="drop 0.1 of 2 layers is less than half of one. Ask for num_layers=1"):
        pruned(source, tmp_path / "b", documents)
    scaled = make_decoder("gpt2", tmp_path / "scaled", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="divides attention by the number of its layer"):
        pruned(seal_decoder(scaled), tmp_path / "c", documents, num_layers=1)
