"""The walk through a model's layers: for every family the numbers of the whole model, however often it is killed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimline import decoder, layerwise, packed, technique
from slimline.errors import ModelError
from slimline.shards import Weights
from tests.decoders import KINDS, make_decoder
from tests.test_decoder import answers, configure, shard, tokens

LAYERS = 3


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def llama(tmp_path):
    return make_decoder("llama", tmp_path / "llama", layers=LAYERS)


def hidden(folder, tokens_NT):
    """What enters each layer, and what leaves the last, as transformers reports it; the last is behind the norm."""
    model = decoder.load(folder)
    with torch.no_grad():
        return model(input_ids=tokens_NT, output_hidden_states=True).hidden_states


def _stored(folder, out, tokens_NT):
    """What enters each layer while nothing is changed."""
    for layer in layerwise.walk(folder, out, tokens_NT):
        yield layer.hidden_NTW.clone()
        layer.store()


def changed(layer):
    """A change that every later layer feels, which bfloat16 has to round."""
    layer.weight(layer.kind.up).mul_(1.001)
    layer.numbers = {"changed": float(layer.weight(layer.kind.up).numel())}
    layer.store()


def walk(source, out, *given, stop_before=-1, **more):
    """Walk and change every layer; or stop before one, as a kill does."""
    for layer in layerwise.walk(source, out, *given, **more):
        if layer.index == stop_before:
            return
        changed(layer)
    decoder.copy_rest(source, out)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_see_what_they_see_in_the_whole_model_and_come_out_as_they_were(kind, tmp_path, out):
    more = {"sliding_window": 6} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    folder = make_decoder(kind, tmp_path / kind, layers=LAYERS, **more)
    tokens_NT = tokens(5, 17)
    expected = hidden(folder, tokens_NT)
    for layer in layerwise.walk(folder, out, tokens_NT):
        assert (layer.hidden_NTW - expected[layer.index]).abs().max() < 1e-5
        layer.store()
    decoder.copy_rest(folder, out)
    source, written = Weights(folder), Weights(out)
    assert set(written.stored()) == set(source.stored())
    assert all(torch.equal(written.raw(name), source.raw(name)) for name in source.stored())
    assert torch.equal(answers(decoder.load(out), tokens_NT), answers(decoder.load(folder), tokens_NT))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_half_precision(dtype, llama, out):
    half = {k: v.to(getattr(torch, dtype)) for k, v in load_file(llama / "model.safetensors").items()}
    save_file(half, llama / "model.safetensors", {"format": "pt"})
    for layer in layerwise.walk(llama, out, tokens()):
        assert {p.dtype for p in layer.module.parameters()} == {torch.float32}
        layer.store()
    written = Weights(out)
    assert all(
        written.raw(name).equal(tensor) and written.raw(name).dtype == tensor.dtype for name, tensor in half.items()
    )


def test_what_is_stored_in_another_type_is_what_the_next_layers_see(llama, out):
    tokens_NT, seen = tokens(), []
    for layer in layerwise.walk(llama, out, tokens_NT, dtype="bfloat16"):
        seen.append(layer.hidden_NTW.clone())
        changed(layer)
    decoder.copy_rest(llama, out, {"dtype": "bfloat16"})
    written = Weights(out)
    assert {written.raw(name).dtype for name in written.stored()} == {torch.bfloat16}
    embedded = Weights(llama).read("model.embed_tokens.weight")[tokens_NT]
    assert torch.equal(seen[0], embedded), "the embedding is rounded at the end"
    model = decoder.load(out)
    model.model.embed_tokens.weight.data = decoder.load(llama).model.embed_tokens.weight.data
    with torch.no_grad():
        expected = model(input_ids=tokens_NT, output_hidden_states=True).hidden_states
    assert all((mine - theirs).abs().max() < 1e-5 for mine, theirs in zip(seen, expected))


def test_shards_are_walked_as_one_file_is(llama, tmp_path, out):
    (tmp_path / "whole").mkdir()
    walk(llama, tmp_path / "whole", tokens())
    shard(llama)
    walk(llama, out, tokens())
    assert contents(out) == contents(tmp_path / "whole")


def test_the_source_is_not_written_to(llama, out):
    before = contents(llama)
    for layer in layerwise.walk(llama, out, tokens()):
        layer.weight("mlp.up_proj").zero_()
        layer.store()
    assert contents(llama) == before


def test_without_text_nothing_is_run(llama, out):
    for layer in layerwise.walk(llama, out):
        assert layer.hidden_NTW.numel() == 0
        layer.store()
    assert len(list(out.glob("model-*-of-00004.safetensors"))) == LAYERS + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_what_is_measured_is_what_a_map_reads_and_two_devices_measure_the_same(kind, tmp_path):
    folder, tokens_NT = make_decoder(kind, tmp_path / kind, layers=LAYERS), tokens(70, 75)
    model, read = decoder.load(folder), {}
    part = decoder.FAMILIES[kind]
    for i in range(LAYERS):
        for name in part.maps:
            module = model.get_submodule(f"{part.layers}.{i}.{name}")
            module.register_forward_pre_hook(lambda _, x, key=(i, name): read.update({key: x[0].flatten(0, 1)}))
    answers(model, tokens_NT)
    found, outputs = {}, {}
    for devices in (["cpu"], ["cpu", "cpu"], ["cpu"] * 3):
        at = tmp_path / f"out{len(devices)}"
        at.mkdir()
        for layer in layerwise.walk(folder, at, tokens_NT, devices=devices):
            assert len(layer.batches()) >= 3
            found[len(devices), layer.index] = layer.measure(part.maps, lambda x_TI: x_TI.T @ x_TI)
            outputs[len(devices), layer.index] = layer.outputs()
            layer.store()
    for i in range(LAYERS):
        for name in part.maps:
            expected = read[i, name].double().T @ read[i, name].double()
            for devices in (1, 2, 3):
                assert (found[devices, i][name] - expected).abs().max() < 1e-4 * expected.abs().max()
        assert torch.equal(outputs[1, i], outputs[2, i]) and torch.equal(outputs[1, i], outputs[3, i])


def test_measurements_can_be_combined_otherwise_than_by_adding(llama, out):
    for layer in layerwise.walk(llama, out, tokens(40, 100), devices=["cpu", "cpu"]):
        assert len(layer.batches()) > 1
        found = layer.measure(["mlp.up_proj"], lambda x_TI: x_TI.abs().amax(0), torch.maximum)["mlp.up_proj"]
        normed = layer.module.post_attention_layernorm
        seen = []
        hook = normed.register_forward_hook(lambda _, __, x, seen=seen: seen.append(x.flatten(0, 1)))
        layer.outputs()
        hook.remove()
        assert torch.allclose(found, torch.cat(seen).abs().amax(0))
        layer.store()


def test_original_targets_are_what_the_sources_own_layers_make(llama, out):
    tokens_NT = tokens()
    expected = hidden(llama, tokens_NT)
    for layer in layerwise.walk(llama, out, tokens_NT, original=True):
        if layer.index + 1 < LAYERS:
            assert (layer.target_NTW - expected[layer.index + 1]).abs().max() < 1e-5
        if layer.index:
            assert (layer.hidden_NTW - expected[layer.index]).abs().max() > 1e-2, "what comes from changed layers"
        layer.weight("mlp.down_proj").mul_(0.5)
        layer.store()


def test_what_lies_around_the_layers_can_be_changed(llama, out):
    def change(name, tensor):
        return tensor * 2 if name == "model.norm.weight" else tensor

    for layer in layerwise.walk(llama, out, change_rest=change, dtype="float16"):
        layer.store()
    source, written = Weights(llama), Weights(out)
    assert torch.equal(written.raw("model.norm.weight"), (source.raw("model.norm.weight") * 2).half())
    assert torch.equal(written.raw("lm_head.weight"), source.raw("lm_head.weight").half())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_packed_maps_are_to_the_next_layer_what_a_reader_makes_of_them(kind, symmetric, tmp_path, out):
    from slimline import grid

    folder, tokens_NT, seen = make_decoder(kind, tmp_path / kind, layers=LAYERS), tokens(), []
    scheme, schemes = packed.Scheme(3, 32, symmetric), {}
    for layer in layerwise.walk(folder, out, tokens_NT):
        seen.append(layer.hidden_NTW.clone())
        packing = {}
        for name in layer.kind.maps:
            scale, zero = grid.fit(layer.weight(name), scheme)
            whole = packed.Integers(grid.nearest(layer.weight(name), scale, zero, 3), scale, zero)
            packing[name], schemes[f"{layer.name}.{name}"] = packed.pack(whole, 3), scheme
        layer.store(packing)
    grid.finish(folder, out, schemes)
    expected = hidden(out, tokens_NT)
    assert (seen[-1] - hidden(folder, tokens_NT)[LAYERS - 1]).abs().max() > 1e-2
    assert all((mine - theirs).abs().max() < 1e-5 for mine, theirs in zip(seen, expected))


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_a_walk_that_was_killed_goes_on_and_ends_in_the_same_bytes(dtype, original, llama, tmp_path, out):
    options = {"dtype": dtype, "original": original}
    (tmp_path / "whole").mkdir()
    sums, again = {}, {}
    walk(llama, tmp_path / "whole", tokens(), totals=sums, **options)
    walk(llama, out, tokens(), stop_before=2, **options)
    written = {file.name: file.stat().st_ino for file in out.iterdir()}
    assert sorted(written) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    told = []
    with technique.listening(lambda *event: told.append(event)):
        walk(llama, out, tokens(), totals=again, **options)
    assert told[0][3] == "resumed at layer 3 of 3"
    assert contents(out) == contents(tmp_path / "whole")
    assert all((out / name).stat().st_ino == number for name, number in written.items()), "kept, not made again"
    assert again == sums == {"changed": LAYERS * 96.0 * 64}


def test_a_finished_walk_is_not_walked_again(llama, out):
    walk(llama, out, tokens())
    before = contents(out)
    assert list(layerwise.walk(llama, out, tokens())) == []
    assert contents(out) == before


def test_a_layer_that_is_not_stored_is_a_mistake(llama, out):
    with pytest.raises(AssertionError, match=r"model.layers.0 was not stored"):
        list(layerwise.walk(llama, out))


def test_a_layer_without_all_its_weights_is_named(llama, out):
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks model.layers.1.self_attn.q_proj.weight. Is the checkpoint whole"):
        walk(llama, out, tokens())


def test_only_the_rows_of_the_embedding_that_are_needed_are_made_floats(tmp_path, out):
    folder = make_decoder("gemma3_text", tmp_path / "gemma3", vocabulary=500)
    configure(folder, pad_token_id=499)  # an index of the whole embedding
    tokens_NT = torch.tensor([[3, 498, 3, 7]])
    first, *_ = _stored(folder, out, tokens_NT)
    assert torch.equal(first, hidden(folder, tokens_NT)[0])


def test_depth_counts_layers_in_every_family(tmp_path):
    for kind in KINDS:
        assert layerwise.depth(make_decoder(kind, tmp_path / kind, layers=4)) == 4
        assert json.loads((tmp_path / kind / "config.json").read_text())["model_type"] == kind
