"""prune.wanda and prune.sparsegpt: which weights become zero, and what those that stay become."""

import json

import pytest
import torch
from safetensors.torch import load_file

from slimline import decoder, passages, sparse, technique
from slimline.errors import ConfigError, ModelError
from slimline.prune import wanda
from slimline.quantize import rtn
from slimline.shards import Writer
from tests import plain
from tests.decoders import KINDS, make_decoder, make_documents, seal_decoder

METHODS = [wanda]
NAMES = [module.__name__.rpartition(".")[2] for module in METHODS]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("data") / "documents.parquet")


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A sealed decoder of each family, by name."""
    place, made = tmp_path_factory.mktemp("decoders"), {}

    def get(kind):
        if kind not in made:
            made[kind] = seal_decoder(make_decoder(kind, place / kind))
        return made[kind]

    return get


def configured(module, documents, **options):
    return technique.configure(module, {"data": str(documents), "windows": 8, "length": 32, **options})


def pruned(module, source, out, documents, **options):
    out.mkdir()
    return module.run(source, out, configured(module, documents, **options))


def whole(folder):
    """All tensors of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def matrices(folder):
    """Every map of every layer, [O, I]."""
    kind = decoder.family(json.loads((folder / "config.json").read_text()), folder)
    model = decoder.load(folder)
    found = {name: model.get_submodule(name.removesuffix(".weight")).weight for name in sparse.maps(folder, kind)}
    return {name: weight.T if kind.transposed else weight for name, weight in found.items()}


def test_a_large_weight_on_a_silent_input_goes_first():
    weight_OI, loudness_I = torch.tensor([[10.0, -1.0, 2.0, 3.0]]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    worth_OI = wanda.worth(weight_OI, loudness_I)
    assert worth_OI.tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert sparse.lowest(worth_OI, 0.25).tolist() == [[True, False, False, False]]


def test_every_row_loses_as_many_weights_and_ties_fall_to_the_lower_input():
    worth_OI = torch.tensor([[1.0, 1.0, 1.0, 1.0], [100.0, 200.0, 300.0, 400.0]])
    assert sparse.lowest(worth_OI, 0.5).tolist() == [[True, True, False, False]] * 2
    assert not sparse.lowest(worth_OI, 0.0).any()


def test_a_pattern_takes_the_least_of_every_few_neighbours():
    worth_OI = torch.tensor([[4.0, 3.0, 2.0, 1.0, 50.0, 60.0, 80.0, 70.0]])
    assert sparse.lowest(worth_OI, 0.5, "2:4").int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert sparse.lowest(worth_OI, 0.5, "4:8").int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_the_loudness_of_an_input_is_its_norm_over_tokens():
    x_XI = torch.tensor([[3.0, 0.0], [4.0, -2.0]])
    assert wanda.square_sums(x_XI).sqrt().tolist() == [5.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_wanda_zeroes_the_lowest_half_of_each_row_and_leaves_the_rest_alone(kind, decoders, documents, tmp_path):
    source, out = decoders(kind), tmp_path / "out"
    metrics = pruned(wanda, source, out, documents)
    assert metrics["sparsity"] == 0.5 and metrics["sparsity_before"] == 0.0
    before, after = matrices(source), matrices(out)
    for name, weight_OI in after.items():
        stays = weight_OI != 0
        assert set(stays.sum(dim=1).tolist()) == {weight_OI.shape[1] // 2}, name
        assert torch.equal(weight_OI[stays], before[name][stays]), name
    assert not torch.allclose(plain.assert_reads_the_same(out), plain.logits(decoder.load(source)), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_but_the_layers_maps_is_as_it_was(kind, decoders, documents, tmp_path):
    source, out = decoders(kind), tmp_path / "out"
    pruned(wanda, source, out, documents, pattern="2:4")
    before, after = whole(source), whole(out)
    maps = sparse.maps(source, decoder.FAMILIES[kind])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in maps)
    for name, weight_OI in matrices(out).items():
        assert (weight_OI.reshape(-1, 4) == 0).sum(dim=1).eq(2).all(), name
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_each_layer_is_measured_on_what_the_pruned_ones_before_it_give(decoders, documents, tmp_path):
    source, out = decoders("llama"), tmp_path / "out"
    pruned(wanda, source, out, documents, sparsity=0.75)
    config = technique.configure(wanda, {"data": str(documents), "windows": 8, "length": 32})
    tokens_NT = torch.from_numpy(passages.draw(source, config))
    model, name = decoder.load(out), "model.layers.1.self_attn.q_proj"
    heard = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    plain.logits(model, tokens_NT)
    loudness_I = heard[0].double().flatten(0, 1).norm(dim=0)
    kept_OI = matrices(source)[f"{name}.weight"].double().abs() * loudness_I
    border_O1 = kept_OI.sort(dim=1).values[:, 48:49]  # of 64 inputs the 16 that are worth most stay
    assert torch.equal(kept_OI >= border_O1, matrices(out)[f"{name}.weight"] != 0)


@pytest.mark.parametrize("module", METHODS, ids=NAMES)
def test_a_killed_run_goes_on_where_it_was(module, decoders, documents, tmp_path, monkeypatch):
    pruned(module, decoders("qwen2"), tmp_path / "whole", documents)
    write = Writer.write

    def killed(self, number, tensors):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", killed)
        pruned(module, decoders("qwen2"), tmp_path / "killed", documents)
    assert [p.name for p in (tmp_path / "killed").glob("*.safetensors")] == ["part-00000.safetensors"]
    module.run(decoders("qwen2"), tmp_path / "killed", configured(module, documents))
    one, other = whole(tmp_path / "whole"), whole(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("module", METHODS, ids=NAMES)
def test_what_cannot_be_is_said(module, decoders, documents, tmp_path):
    with pytest.raises(ConfigError, match="2:4 zeroes half of the weights; leave sparsity at 0.5"):
        configured(module, documents, sparsity=0.7, pattern="2:4")
    odd = seal_decoder(make_decoder("llama", tmp_path / "odd", feed=102))
    with pytest.raises(ModelError, match="mlp.down_proj.weight has 102 inputs, which do not divide into the 4"):
        pruned(module, odd, tmp_path / "a", documents, pattern="2:4")
    packed = tmp_path / "packed"
    packed.mkdir()
    rtn.run(decoders("llama"), packed, technique.configure(rtn, {"group_size": 32}))
    with pytest.raises(ModelError, match="is quantized already"):
        pruned(module, packed, tmp_path / "b", documents)
