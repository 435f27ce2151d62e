"""prune.wanda and prune.sparsegpt: which weights become zero, and what those that stay become."""

import json

import pytest
import torch
from safetensors.torch import load_file

from slimline import decoder, passages, sparse, technique
from slimline.errors import ConfigError, ModelError
from slimline.prune import sparsegpt, wanda
from slimline.quantize import rtn
from slimline.shards import Writer
from tests import plain
from tests.decoders import KINDS, make_decoder, make_documents, seal_decoder

METHODS = [wanda, sparsegpt]
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


def generator(seed):
    return torch.Generator().manual_seed(seed)


def correlated(inputs=24, outputs=12, rank=6, seed=0):
    """A matrix [O, I] and the Hessian [I, I] of inputs that are mixed of fewer sources, in float64."""
    draw = generator(seed)
    sources_XR = torch.randn(400, rank, generator=draw, dtype=torch.float64)
    x_XI = sources_XR @ torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    x_XI += 0.1 * torch.randn(400, inputs, generator=draw, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=draw, dtype=torch.float64), x_XI.T @ x_XI


def lost(new_OI, weight_OI, hessian_II):
    """How far the answers on the inputs move."""
    return float(((new_OI - weight_OI) @ hessian_II * (new_OI - weight_OI)).sum())


def by_the_definition(weight_OI, hessian_II, sparsity, pattern, block):
    """SparseGPT with an inverse of its own for every set of columns that are still to come, and no block updates."""
    new_OI, size = weight_OI.clone(), weight_OI.shape[1]
    inverses = [torch.linalg.inv(hessian_II[i:, i:]) for i in range(size)]
    goes_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    every = {"unstructured": block, "2:4": 4, "4:8": 8}[pattern]
    for i in range(size):
        if i % every == 0:
            columns = range(i, min(i + every, size))
            worth = torch.stack([new_OI[:, j] ** 2 / inverses[j][0, 0] for j in columns], dim=1)
            rows = worth.reshape(1, -1) if pattern == "unstructured" else worth
            for r, values in enumerate(rows):
                for at in sorted(range(len(values)), key=values.tolist().__getitem__)[: round(len(values) * sparsity)]:
                    where = divmod(at, len(columns)) if pattern == "unstructured" else (r, at)
                    goes_OI[where[0], i + where[1]] = True
        for r in range(len(new_OI)):
            if goes_OI[r, i]:
                new_OI[r, i:] -= new_OI[r, i] / inverses[i][0, 0] * inverses[i][0]
                new_OI[r, i] = 0
    return new_OI


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.3), ("2:4", 0.5), ("4:8", 0.5)]
)
@pytest.mark.parametrize("block", [8, 16, 128])
def test_sparsegpt_does_what_its_definition_says(pattern, sparsity, block):
    weight_OI, hessian_II = correlated()
    damped_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    new_OI = sparsegpt.prune(weight_OI, sparsegpt.root(hessian_II, 0.01)[0], sparsity, pattern, block)
    expected_OI = by_the_definition(weight_OI, damped_II, sparsity, pattern, block)
    assert torch.equal(new_OI == 0, expected_OI == 0)
    assert round(float((new_OI == 0).double().mean()), 1) == sparsity
    torch.testing.assert_close(new_OI, expected_OI, rtol=1e-8, atol=1e-8)


def test_no_weights_in_the_same_places_would_do_much_better():
    weight_OI, hessian_II = correlated()
    new_OI = sparsegpt.prune(weight_OI, sparsegpt.root(hessian_II, 1e-6)[0], 0.5, "unstructured", 8)
    best_OI = torch.zeros_like(weight_OI)
    for r, row_I in enumerate(new_OI != 0):
        stays = row_I.nonzero().flatten()
        moved = hessian_II[stays] @ weight_OI[r]
        best_OI[r, stays] = torch.linalg.solve(hessian_II[stays][:, stays], moved)
    only_zeroed = lost(torch.where(new_OI != 0, weight_OI, 0), weight_OI, hessian_II)
    least, found = lost(best_OI, weight_OI, hessian_II), lost(new_OI, weight_OI, hessian_II)
    assert least <= found < only_zeroed / 5


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(3))
def test_on_inputs_that_go_together_it_loses_least_and_magnitude_most(pattern, seed):
    weight_OI, hessian_II = correlated(inputs=64, outputs=48, rank=16, seed=seed)
    loud_I = torch.linspace(0.2, 2, 64, dtype=torch.float64)[torch.randperm(64, generator=generator(seed))]
    hessian_II = hessian_II * loud_I * loud_I[:, None]
    root_II, _ = sparsegpt.root(hessian_II, 0.01)
    loudness_I = hessian_II.diagonal().sqrt()
    updated = lost(sparsegpt.prune(weight_OI, root_II, 0.5, pattern, 16), weight_OI, hessian_II)
    by_inputs = weight_OI.masked_fill(sparse.lowest(wanda.worth(weight_OI, loudness_I), 0.5, pattern), 0)
    by_size = weight_OI.masked_fill(sparse.lowest(weight_OI.abs(), 0.5, pattern), 0)
    assert 2 * updated < lost(by_inputs, weight_OI, hessian_II) < lost(by_size, weight_OI, hessian_II)


def test_inputs_that_are_silent_or_the_same_give_numbers_all_the_same():
    draw = generator(0)
    x_XI = torch.randn(5, 16, generator=draw)  # fewer tokens than inputs
    x_XI[:, 3], x_XI[:, 5] = 0, x_XI[:, 4]
    weight_OI = torch.randn(8, 16, generator=draw)
    root_II, damp = sparsegpt.root(sparsegpt.products(x_XI), 1e-10)
    assert damp > 1e-10  # it took more
    new_OI = sparsegpt.prune(weight_OI, root_II, 0.5, "2:4", 8)
    assert new_OI.isfinite().all() and (new_OI == 0).float().mean() == 0.5


def test_the_root_is_of_the_inverse_of_the_damped_hessian():
    hessian_II = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    root_II, damp = sparsegpt.root(hessian_II, 0.5)
    damped_II = torch.tensor([[5.5, 1.0], [1.0, 3.5]], dtype=torch.float64)
    assert damp == 0.5 and root_II[1, 0] == 0
    torch.testing.assert_close(root_II.T @ root_II, torch.linalg.inv(damped_II))
    assert sparsegpt.root(torch.zeros(2, 2), 0.01)[0].equal(torch.eye(2, dtype=torch.float64))
    with pytest.raises(ModelError, match="a map has inputs that are not finite"):
        sparsegpt.root(torch.tensor([[torch.inf]]), 0.01)
    with pytest.raises(ModelError, match="a map goes together so much"):
        sparsegpt.root(torch.tensor([[1.0, 99.0], [99.0, 1.0]]), 0.01)  # no second moments of anything


@pytest.mark.parametrize("kind", KINDS)
def test_sparsegpt_moves_what_stays(kind, decoders, documents, tmp_path):
    source = decoders(kind)
    metrics = pruned(sparsegpt, source, tmp_path / "out", documents, pattern="2:4")
    assert metrics["sparsity"] == 0.5 and metrics["damp"] == 0.01
    before, after = matrices(source), matrices(tmp_path / "out")
    for name, weight_OI in after.items():
        assert (weight_OI.reshape(-1, 4) == 0).sum(dim=1).eq(2).all(), name
        assert not torch.equal(weight_OI, torch.where(weight_OI != 0, before[name], 0)), name
    plain.assert_reads_the_same(tmp_path / "out")


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
