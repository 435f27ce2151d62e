"""AWQ changes nothing by scaling alone, and loses less by rounding than rounding to the nearest does."""

import pytest
import torch

from slimline import decoder, grid, hf, layerwise, obq, passages, technique
from slimline.errors import ModelError
from slimline.packed import Integers, Scheme
from slimline.quantize import awq, rtn
from tests.decoders import KINDS, make_decoder, make_documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


def config(documents, **more):
    options = {"data": str(documents), "group_size": 32, "length": 32, "windows": 12, "steps": 8}
    return technique.configure(awq, options | more)


def logits(model, tokens_NT):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens_NT), use_cache=False).logits


FOLDED = dict.fromkeys(KINDS, 4) | {"gpt2": 3, "phi": 2}
"""Places of each family: two norms, values and what is gated; GELU lets no scale through, and Phi has one norm."""


@pytest.mark.parametrize("kind", KINDS)
def test_scales_alone_change_no_answer(kind, tmp_path):
    folder = make_decoder(kind, tmp_path / "source")
    values, family = hf.read_config(folder), decoder.FAMILIES[kind]
    model, tokens = decoder.load(folder).double(), torch.arange(24).reshape(2, 12)
    before, draw = logits(model, tokens), torch.Generator().manual_seed(0)
    for layer in model.get_submodule(family.layers):
        places = awq.folds(family, values, layer)
        assert len(places) == FOLDED[kind]
        for place in places:
            inputs = awq._shape(layer, family, place.readers[0])[1]
            scale = awq.shared(torch.rand(inputs, dtype=torch.float64, generator=draw) * 4 + 0.25, place)
            weight = layer.get_submodule(place.readers[0]).weight.clone()
            awq.fold(layer, family, place, scale, one_more=kind in awq.ONE_MORE)
            assert not torch.equal(weight, layer.get_submodule(place.readers[0]).weight)
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-5)  # Gemma's norms stay in float32
    assert before.std() > 0.1


def test_an_opt_whose_norms_come_after_the_sum_keeps_them(tmp_path):
    folder = make_decoder("opt", tmp_path / "source", do_layer_norm_before=False)
    layer = decoder.load(folder).get_submodule("model.decoder.layers")[0]
    places = awq.folds(decoder.FAMILIES["opt"], hf.read_config(folder), layer)
    assert [place.before for place in places] == ["self_attn.v_proj", "fc1"]


def test_a_loud_input_gets_a_larger_scale_and_the_output_suffers_less():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=draw)
    loudness = torch.ones(32)
    loudness[[3, 17]] = 30.0
    weight[:, [3, 17]] *= 0.2  # what is loud has small weights, as in most models
    x = torch.randn(256, 32, generator=draw) * loudness
    hessian, scheme = x.T @ x, Scheme(3, 32)
    scale = awq.best_scale([weight], hessian, scheme, 20, awq.Fold(("a",), "b"))
    assert set(scale.topk(2).indices.tolist()) == {3, 17}
    plain, _ = grid.fit(weight, scheme, search=False)
    nearest = Integers(grid.nearest(weight, plain, None, 3), plain, None)
    scaled, _ = grid.fit(weight * scale, scheme, search=False)
    better = Integers(grid.nearest(weight * scale, scaled, None, 3), scaled, None).floats() / scale
    lost = ((better - weight) @ x.T).square().sum()
    assert lost < 0.5 * obq.loss(weight, hessian, nearest)


def test_heads_that_share_a_value_share_its_scale():
    place = awq.Fold(("o",), "v", repeats=2, head=3)
    loud = awq.shared(torch.tensor([1.0, 2, 3, 7, 2, 3, 4, 4, 4, 4, 4, 4]), place)
    assert loud.tolist() == pytest.approx([5, 2, 3, 5, 2, 3, 4, 4, 4, 4, 4, 4])  # 5 = sqrt((1 + 49) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_answers_nearer_to_its_source_than_rounded_to_the_nearest(kind, tmp_path, documents):
    source = make_decoder(kind, tmp_path / "source")
    ours, nearest = tmp_path / "awq", tmp_path / "rtn"
    ours.mkdir(), nearest.mkdir()
    numbers = awq.run(source, ours, config(documents, bits=3, windows=40))
    rtn.run(source, nearest, rtn.Config(bits=3, group_size=32, search=False))
    tokens = passages.draw(source, config(documents, split="test"))
    right = logits(decoder.load(source), tokens)
    near, far = ((logits(decoder.load(folder), tokens) - right).square().mean() for folder in (ours, nearest))
    assert near < far
    assert 0 < numbers["relative_error"] < 0.4


def test_transformers_reads_what_was_written_to_the_same_answers(tmp_path, documents):
    from transformers import AutoModelForCausalLM

    source, out = make_decoder("gemma2", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    awq.run(source, out, config(documents))
    tokens = torch.arange(20)[None]
    theirs = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager"), tokens)
    torch.testing.assert_close(theirs, logits(decoder.load(out), tokens), rtol=1e-5, atol=1e-5)


class Killed(Exception):
    pass


def test_it_repeats_itself_and_goes_on_where_it_was_killed(tmp_path, documents, monkeypatch):
    source = make_decoder("llama", tmp_path / "source", layers=3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    first, store = awq.run(source, whole, config(documents)), layerwise.Layer.store

    def dies(layer, packing=None):
        if layer.index == 2:
            raise Killed
        store(layer, packing)

    monkeypatch.setattr(layerwise.Layer, "store", dies)
    with pytest.raises(Killed):
        awq.run(source, killed, config(documents))
    monkeypatch.undo()
    assert awq.run(source, killed, config(documents)) == first
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in killed.iterdir()}


def test_a_model_whose_activations_are_not_finite_is_refused(tmp_path, documents):
    from safetensors.torch import load_file, save_file

    source = make_decoder("llama", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"maps of model.layers.0 is not finite"):
        awq.run(source, tmp_path / "out", config(documents))
    assert not (tmp_path / "out" / "config.json").exists()
