"""GPTQ rounds as its paper defines it, loses less than rounding to the nearest, and is read back by others."""

import copy

import numpy as np
import pytest
import torch

from slimline import decoder, grid, layerwise, obq, packed, passages, technique
from slimline.errors import ConfigError, DataError, ModelError
from slimline.packed import Integers, Scheme
from slimline.quantize import gptq, rtn
from tests.decoders import KINDS, make_decoder, make_documents

OUTPUTS, INPUTS, SIZE = 6, 24, 8


@pytest.fixture
def weight_OI():
    return torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hessian_II():
    """Of inputs that go together, some of them much louder than others."""
    draw = torch.Generator().manual_seed(2)
    mixed = torch.randn(INPUTS // 2, INPUTS, dtype=torch.float64, generator=draw)
    x_TI = torch.randn(400, INPUTS // 2, dtype=torch.float64, generator=draw) @ mixed
    x_TI += 0.3 * torch.randn(400, INPUTS, dtype=torch.float64, generator=draw)
    return (x_TI * torch.linspace(0.3, 3, INPUTS).roll(7)).T @ x_TI * torch.linspace(0.3, 3, INPUTS).roll(7)


def naive_obq(weight_OI, hessian_II, whole, bits, order):
    """Optimal Brain Quantization in a given order by its definition: a column, then H^-1 without it, then the next."""
    left, inverse, numbers = weight_OI.clone(), torch.linalg.inv(hessian_II), torch.zeros_like(weight_OI)
    size = weight_OI.shape[1] // whole.scale_OG.shape[1]
    for p in order:
        scale = whole.scale_OG[:, p // size].double()
        zero = 0 if whole.zero_OG is None else whole.zero_OG[:, p // size].double()
        numbers[:, p] = (left[:, p] / scale + zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (left[:, p] - (numbers[:, p] - zero) * scale) / inverse[p, p]
        left -= error[:, None] * inverse[p]
        inverse = inverse - inverse[:, p, None] * inverse[p] / inverse[p, p]
    return numbers.to(torch.int8)


def options(**more):
    return obq.Rounding(**{"data": "unread", "group_size": SIZE, "correction": 0, "sweeps": 0, **more})


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("bits,symmetric", [(4, True), (3, False), (8, False), (2, True)])
def test_blocks_give_the_numbers_of_the_definition(weight_OI, hessian_II, bits, symmetric, block):
    config = options(bits=bits, symmetric=symmetric, block=block)
    made = obq.quantize(weight_OI, obq.Moments(hessian_II), config.scheme, config)
    damped = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(INPUTS)
    scale, zero = grid.fit(weight_OI, config.scheme, damped.diagonal())
    order = hessian_II.diagonal().argsort(descending=True).tolist()
    wanted = naive_obq(weight_OI, damped, Integers(torch.empty(OUTPUTS, INPUTS), scale, zero), bits, order)
    assert order != sorted(order)
    assert torch.equal(made.whole.numbers_OI, wanted)
    assert torch.equal(made.whole.scale_OG, scale)


def test_without_act_order_columns_go_from_left_to_right_on_scales_of_what_is_left(weight_OI, hessian_II):
    config = options(act_order=False, block=5)
    made = obq.quantize(weight_OI, obq.Moments(hessian_II), config.scheme, config)
    damped = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(INPUTS)
    wanted = naive_obq(weight_OI, damped, made.whole, 4, range(INPUTS))
    first, _ = grid.fit(weight_OI[:, :SIZE], config.scheme, damped.diagonal()[:SIZE])
    untouched, _ = grid.fit(weight_OI, config.scheme, damped.diagonal())
    assert torch.equal(made.whole.numbers_OI, wanted)
    assert torch.equal(made.whole.scale_OG[:, :1], first)
    assert not torch.equal(made.whole.scale_OG[:, 1:], untouched[:, 1:])


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_suffers_less_than_by_rounding_to_the_nearest(weight_OI, hessian_II, symmetric, act_order):
    config = options(symmetric=symmetric, act_order=act_order, bits=3)
    made = obq.quantize(weight_OI, obq.Moments(hessian_II), config.scheme, config)
    scale, zero = grid.fit(weight_OI, config.scheme)
    nearest = Integers(grid.nearest(weight_OI, scale, zero, 3), scale, zero)
    assert made.loss < 0.6 * obq.loss(weight_OI, hessian_II, nearest)


@pytest.mark.parametrize("group_size", [SIZE, 0])
def test_every_sweep_lowers_the_loss_and_ends_where_no_single_number_can_be_better(weight_OI, hessian_II, group_size):
    config = options(bits=3, symmetric=False, group_size=group_size)
    whole = obq.quantize(weight_OI, obq.Moments(hessian_II), config.scheme, config).whole
    losses = [obq.loss(weight_OI, hessian_II, whole)]
    for _ in range(12):
        whole = obq.sweep(weight_OI, hessian_II, whole, 3, block=5)
        losses.append(obq.loss(weight_OI, hessian_II, whole))
    assert losses == sorted(losses, reverse=True) and losses[1] < 0.97 * losses[0]
    for column in range(INPUTS):
        for step in (-1, 1):
            other = whole.numbers_OI.clone()
            other[:, column] = (other[:, column] + step).clamp(-4, 3)
            for row in range(OUTPUTS):
                mixed = whole.numbers_OI.clone()
                mixed[row] = other[row]
                assert obq.loss(weight_OI, hessian_II, whole._replace(numbers_OI=mixed)) >= losses[-1] - 1e-9


def test_what_earlier_layers_have_lost_is_made_up_for_by_least_squares(weight_OI):
    draw = torch.Generator().manual_seed(3)
    z_TI = torch.randn(200, INPUTS, dtype=torch.float64, generator=draw)
    x_TI = z_TI + 0.3 * torch.randn(200, INPUTS, dtype=torch.float64, generator=draw)
    order = torch.randperm(INPUTS, generator=draw)
    made = obq.factor(x_TI.T @ x_TI, 1e-12, order)
    added = obq.correction(weight_OI, (z_TI - x_TI).T @ x_TI, made.root_II, order)
    best = torch.linalg.lstsq(x_TI, z_TI @ weight_OI.T).solution.T
    torch.testing.assert_close(weight_OI + added, best, rtol=1e-6, atol=1e-8)


def test_a_silent_input_is_rounded_to_the_nearest(weight_OI, hessian_II):
    hessian_II[:, 5] = hessian_II[5] = 0
    config = options()
    whole = obq.quantize(weight_OI, obq.Moments(hessian_II), config.scheme, config).whole
    assert torch.equal(whole.numbers_OI[:, 5], grid.nearest(weight_OI, whole.scale_OG, None, 4)[:, 5])


def test_inputs_that_are_all_silent_leave_rounding_to_the_nearest(weight_OI):
    made = obq.quantize(weight_OI, obq.Moments(torch.zeros(INPUTS, INPUTS)), Scheme(4, SIZE), options(sweeps=1))
    assert torch.equal(made.whole.numbers_OI, grid.nearest(weight_OI, made.whole.scale_OG, None, 4))


def test_a_singular_hessian_is_damped_tenfold_until_it_can_be_inverted(weight_OI):
    x_TI = torch.ones(3, INPUTS, dtype=torch.float64)
    made = obq.quantize(weight_OI, obq.Moments(x_TI.T @ x_TI), Scheme(4, SIZE), options(damp=1e-19))
    assert 1e-19 < made.damp < 1e-10
    told = obq.metrics(obq.numbers({"a": made, "b": made._replace(damp=1e-19)}), 1e-19)
    assert told["damped_maps"] == 1 and told["most_damping"] == made.damp
    assert torch.isfinite(made.whole.floats()).all()


def test_a_hessian_that_cannot_be_inverted_or_is_not_finite_is_said_by_name():
    order = torch.arange(2)
    with pytest.raises(ModelError, match=r"enters layers.3.fc1 cannot be inverted, even damped by 1e-11 of"):
        obq.factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1e-18, order, "layers.3.fc1")
    with pytest.raises(ModelError, match=r"enters layers.3.fc1 is not finite"):
        obq.factor(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), 0.01, order, "layers.3.fc1")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


def config(documents, **more):
    options = {"data": str(documents), "group_size": 32, "length": 32, "windows": 12}
    return technique.configure(gptq, options | more)


def in_transformers(folder, tokens_NT, dequantize):
    """compressed-tensors 0.20 makes no room for packed zero points: with them only `dequantize` works, in float16."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens_NT)).logits


def logits(folder, tokens_NT):
    with torch.no_grad():
        return decoder.load(folder)(input_ids=torch.as_tensor(tokens_NT), use_cache=False).logits


def entering(folder, name, tokens_NT):
    """[tokens, I]: what enters a map of a whole model in memory."""
    model, heard = decoder.load(folder), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=torch.as_tensor(tokens_NT), use_cache=False)
    return torch.cat(heard)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_moments_are_of_what_enters_a_map_in_the_changed_model_and_in_the_source(kind, tmp_path, documents):
    source, out = make_decoder(kind, tmp_path / "source", layers=3), tmp_path / "out"
    out.mkdir()
    family, tokens = decoder.FAMILIES[kind], passages.draw(source, config(documents, windows=80))
    for layer in layerwise.walk(source, out, tokens, original=True):
        seen = obq.moments(layer, [family.down], copy.deepcopy(layer.module))[family.down]
        if layer.index < 2:
            layer.weight(family.up).mul_(1.5)
        layer.store()
    decoder.copy_rest(source, out)
    z_TI, x_TI = (entering(folder, f"{family.layers}.2.{family.down}", tokens) for folder in (source, out))
    assert (z_TI - x_TI).abs().max() > 0.1
    torch.testing.assert_close(seen.hessian_II, x_TI.T @ x_TI, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(seen.cross_II, (z_TI - x_TI).T @ x_TI, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_answers_nearer_to_its_source_than_rounded_to_the_nearest(kind, tmp_path, documents):
    source = make_decoder(kind, tmp_path / "source")
    ours, nearest = tmp_path / "gptq", tmp_path / "rtn"
    ours.mkdir(), nearest.mkdir()
    numbers = gptq.run(source, ours, config(documents, bits=3, windows=40))
    rtn.run(source, nearest, rtn.Config(bits=3, group_size=32))
    tokens = passages.draw(source, config(documents, split="test"))
    right = logits(source, tokens)
    near, far = ((logits(folder, tokens) - right).square().mean() for folder in (ours, nearest))
    assert near < 0.8 * far
    assert 0 < numbers["relative_error"] < 0.3 and numbers["damped_maps"] == 0


def test_rounding_to_the_nearest_narrows_no_range_beside_zero_points(tmp_path):
    source, found = make_decoder("llama", tmp_path / "source", layers=1), {}
    for symmetric in (True, False):
        for search in (True, False):
            out = tmp_path / f"{symmetric}-{search}"
            out.mkdir()
            rtn.run(source, out, rtn.Config(bits=3, group_size=32, symmetric=symmetric, search=search))
            found[symmetric, search] = logits(out, torch.arange(20)[None])
    assert not torch.equal(found[True, True], found[True, False])
    assert torch.equal(found[False, True], found[False, False])


@pytest.mark.parametrize(
    "more",
    [{"symmetric": False, "bits": 4}, {"act_order": False, "bits": 8}, {"true_sequential": False, "correction": 0}],
    ids=str,
)
def test_transformers_reads_what_was_written_to_the_same_answers(more, tmp_path, documents):
    source, out = make_decoder("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    gptq.run(source, out, config(documents, **more))
    tokens = torch.arange(20)[None]
    dequantize = not more.get("symmetric", True)
    theirs, ours = in_transformers(out, tokens, dequantize), logits(out, tokens)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 if not dequantize else 0.01 * float(ours.std()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_repeats_itself_and_goes_on_where_it_was_killed(kind, tmp_path, documents):
    source = make_decoder(kind, tmp_path / "source", layers=3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    first = gptq.run(source, whole, config(documents))
    tokens = passages.draw(source, config(documents))
    for layer in layerwise.walk(source, killed, tokens, original=True):
        if layer.index == 2:
            break
        rounded = obq.round_layer(layer, dict.fromkeys(layer.kind.maps, Scheme(4, 32)), config(documents))
        layer.numbers = obq.numbers(rounded)
        layer.store({name: packed.pack(one.whole, 4) for name, one in rounded.items()})
    assert 0 < len(list(killed.glob("*.safetensors"))) < len(list(whole.glob("*.safetensors")))
    assert gptq.run(source, killed, config(documents)) == first
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in killed.iterdir()}


def test_other_windows_are_drawn_by_another_seed(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "source")
    first, again, other = (passages.draw(source, config(documents, windows=4, seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other) and first.shape == (4, 32)


def test_text_that_fills_no_window_and_windows_that_no_model_can_hold_are_refused(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "source", positions=4096)
    with pytest.raises(DataError, match="fill no window of 4096"):
        passages.draw(source, config(documents, length=4096))
    with pytest.raises(ConfigError, match="length 4097 is more than the 4096 tokens"):
        passages.draw(source, config(documents, length=4097))


def test_the_tokenizer_of_a_larger_model_is_refused(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "source", vocabulary=12)
    with pytest.raises(ModelError, match=r"gives token \d+, but its embedding has 12 tokens"):
        passages.draw(source, config(documents))


def test_groups_that_do_not_divide_the_inputs_are_refused_before_any_work(tmp_path, documents):
    source = make_decoder("llama", tmp_path / "source")
    with pytest.raises(ConfigError, match="group_size 64 does not divide the 96 inputs"):
        gptq.run(source, tmp_path, config(documents, group_size=64))
