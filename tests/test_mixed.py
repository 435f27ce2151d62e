"""Mixed widths keep their budget, spend it where the model suffers most, and are read back by others."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimline import decoder, layerwise, passages, technique
from slimline.errors import ConfigError
from slimline.quantize import gptq, mixed
from slimline.shards import Weights
from tests.decoders import KINDS, make_decoder, make_documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


def config(documents, module=mixed, **more):
    return technique.configure(module, {"data": str(documents), "group_size": 32, "length": 32, "windows": 12} | more)


def logits(model, tokens_NT):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens_NT), use_cache=False).logits


def widths_of(folder):
    """Bits of every packed matrix, by what is stored."""
    weights = Weights(folder)
    return {name: found[1] for name in weights.floats() if (found := weights.integers(name))}


def average_of(folder):
    weights, widths = Weights(folder), widths_of(folder)
    sizes = {name: math.prod(weights.shape(name)) for name in widths}
    return sum(sizes[name] * bits for name, bits in widths.items()) / sum(sizes.values())


def test_of_places_of_one_size_the_best_assignment_is_found():
    draw = torch.Generator().manual_seed(0)
    for bits in (4.0, 4.5, 5.9, 8.0):
        loss = [sorted(torch.rand(2, generator=draw).tolist(), reverse=True) for _ in range(7)]
        suffering = {(i, ("a",)): {4: high, 8: low} for i, (high, low) in enumerate(loss)}
        given = mixed.allocate(dict.fromkeys(suffering, 10), suffering, bits)
        every = [ws for ws in itertools.product((4, 8), repeat=7) if sum(ws) <= 7 * bits]
        best = min(sum(suffering[place][w] for place, w in zip(suffering, ws)) for ws in every)
        assert sum(suffering[place][w] for place, w in given.items()) == pytest.approx(best)


def test_a_width_above_the_hull_is_passed_over_and_what_does_not_fit_is_left():
    a, b = (0, ("a",)), (0, ("b",))
    suffering = {a: {3: 10.0, 4: 9.9, 8: 0.0}, b: {3: 4.0, 4: 3.0, 8: 2.9}}
    assert mixed.allocate({a: 1, b: 1}, suffering, 6.0) == {a: 8, b: 4}
    assert mixed.allocate({a: 1, b: 1}, suffering, 5.0) == {a: 3, b: 4}
    assert mixed.allocate({a: 1, b: 9}, suffering, 3.6) == {a: 8, b: 3}


def test_more_bits_that_do_not_help_are_not_spent():
    place = (0, ("a",))
    assert mixed.allocate({place: 1}, {place: {4: 1.0, 8: 1.0}}, 8.0) == {place: 4}


def all_but_one_hushed(folder, loud):
    """The same model, in which what one map says is heard, and what the others add to the stream hardly is."""
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")) and name != loud:
            weights[name] *= 0.03
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_maps_that_matter_most_get_the_bits_and_the_budget_is_kept(tmp_path, documents):
    loud = "model.layers.1.mlp.down_proj.weight"
    source = all_but_one_hushed(make_decoder("llama", tmp_path / "source"), loud)
    out = tmp_path / "out"
    out.mkdir()
    numbers = mixed.run(source, out, config(documents, bits=4.5))
    widths = widths_of(out)
    assert widths[loud] == 8
    assert set(widths.values()) == {4, 8}
    assert 4.2 < average_of(out) <= 4.5
    assert numbers["bits"] == pytest.approx(average_of(out))
    assert numbers["share_of_4_bits"] + numbers["share_of_8_bits"] == pytest.approx(1)


def test_maps_that_a_server_fuses_have_one_width(tmp_path, documents):
    source, out = make_decoder("llama", tmp_path / "source", layers=4), tmp_path / "out"
    out.mkdir()
    mixed.run(source, out, config(documents, bits=5, widths=[3, 4, 6, 8]))
    widths = widths_of(out)
    for i, group in itertools.product(range(4), decoder.FAMILIES["llama"].readers):
        assert len({widths[f"model.layers.{i}.{name}.weight"] for name in group}) == 1
    assert len(set(widths.values())) > 1 and average_of(out) <= 5


def test_measuring_leaves_the_layer_as_it_was_and_fewer_bits_hurt_more(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "source")
    options = config(documents)
    for layer in layerwise.look(source, passages.draw(source, options)):
        before = {name: layer.weight(name).clone() for name in layer.kind.maps}
        for group in layer.kind.readers:
            found = mixed.suffer(layer, group, (3, 4, 8), options)
            assert found[3] > found[4] > 50 * found[8] > 0
        assert all(torch.equal(before[name], layer.weight(name)) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_answers_nearer_to_its_source_than_with_the_least_width(kind, tmp_path, documents):
    source = make_decoder(kind, tmp_path / "source")
    ours, least = tmp_path / "mixed", tmp_path / "gptq"
    ours.mkdir(), least.mkdir()
    mixed.run(source, ours, config(documents, bits=4, widths=[3, 8]))
    gptq.run(source, least, config(documents, gptq, bits=3))
    tokens = passages.draw(source, config(documents, split="test"))
    right = logits(decoder.load(source), tokens)
    near, far = ((logits(decoder.load(folder), tokens) - right).square().mean() for folder in (ours, least))
    assert near < far
    assert average_of(ours) <= 4


def test_transformers_reads_several_widths_to_the_same_answers(tmp_path, documents):
    from transformers import AutoModelForCausalLM

    source, out = make_decoder("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    mixed.run(source, out, config(documents, bits=6))
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    tokens = torch.arange(20)[None]
    theirs = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), tokens)
    torch.testing.assert_close(theirs, logits(decoder.load(out), tokens), rtol=1e-5, atol=1e-5)


def test_a_budget_below_every_width_and_widths_that_there_are_not_are_refused(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "source")
    with pytest.raises(ConfigError, match=r"bits 3.5 is less than the least of widths \[4, 8\]"):
        mixed.run(source, tmp_path, config(documents, bits=3.5))
    with pytest.raises(ConfigError, match=r"widths are \[4, 16\], but each is one of 2 to 8 bits"):
        mixed.run(source, tmp_path, config(documents, widths=[4, 16]))
