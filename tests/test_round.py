"""Learned rounding: never far from the nearest, never worse on what it learned on, the same every time."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from slimline import data, decoder, grid, language, layerwise
from slimline.packed import Integers, Scheme
from slimline.quantize import round as rounding
from slimline.quantize import rtn
from slimline.shards import Weights
from tests.decoders import KINDS, make_decoder, make_documents

TOKENS = torch.arange(40).reshape(2, 20) % 29


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


def config(documents, **options):
    small = {"group_size": 16, "windows": 16, "length": 16, "steps": 20, "arithmetic": "float32"}
    return rounding.Config(data=str(documents), **small | options)


def learned(source, out, documents, **options):
    out.mkdir()
    return rounding.run(source, out, config(documents, **options))


def logits(folder):
    with torch.no_grad():
        return decoder.load(folder)(TOKENS).logits


def matrices(folder):
    """Every packed matrix in whole numbers, by name."""
    weights = Weights(folder)
    found = {name: weights.integers(name) for name in weights.floats()}
    return {name: integers for name, integers in found.items() if integers}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_errs_less_than_with_the_nearest_numbers(kind, documents, tmp_path):
    source = make_decoder(kind, tmp_path / "source")
    numbers = learned(source, tmp_path / "out", documents)
    assert numbers["bits"] == 4
    assert 0 < numbers["relative_error"] < 0.95 * numbers["relative_error_nearest"]
    assert len(matrices(tmp_path / "out")) == 2 * len(decoder.FAMILIES[kind].maps)
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 2, "group_size": 0}, {"search": False}])
def test_no_weight_is_rounded_past_the_number_on_its_other_side(options, documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    learned(source, tmp_path / "out", documents, **options)
    before, moved = Weights(source), 0
    for name, (whole, bits) in matrices(tmp_path / "out").items():
        weight_OI = before.read(name)
        steps = weight_OI.reshape(*whole.scale_OG.shape, -1) / whole.scale_OG.float().unsqueeze(2)
        steps = steps if whole.zero_OG is None else steps + whole.zero_OG.float().unsqueeze(2)
        inside = steps.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert (whole.numbers_OI.reshape(steps.shape) - inside).abs().max() <= 1 + 1e-4
        nearest = grid.nearest(weight_OI, whole.scale_OG, whole.zero_OG, bits)
        away = (whole.numbers_OI.int() - nearest.int()).abs()
        assert away.max() <= 1
        moved += int(away.sum())
    assert moved > 0


def test_the_error_starts_at_the_nearest_numbers_and_ends_at_what_the_result_makes(documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source")
    options = config(documents)
    texts = data.documents(documents, "calibration").texts
    tokens_NT = language.windows(language.Tokenizer(source), texts, 16, 16, 0)
    (tmp_path / "out").mkdir()
    for layer in layerwise.walk(source, tmp_path / "out", tokens_NT, original=True):
        own = {name: layer.weight(name).clone() for name in layer.kind.maps}
        loud = layer.measure(layer.kind.maps, lambda inputs: inputs.square().mean(0))
        found, (first, last, _) = rounding.learn(layer, options)
        assert all(torch.equal(layer.weight(name), own[name]) for name in own), "weights are left as they were"

        def error(matrices, layer=layer):
            for name, whole in matrices.items():
                layer.weight(name).copy_(whole.floats())
            return float((layer.outputs() - layer.target_NTW).double().square().sum())

        nearest = {}
        for name, weight_OI in own.items():
            scale_OG, _ = grid.fit(weight_OI, options.scheme, loud[name])
            nearest[name] = Integers(grid.nearest(weight_OI, scale_OG, None, 4), scale_OG, None)
        assert first == pytest.approx(error(nearest), rel=1e-4)
        assert last == pytest.approx(error(found), rel=1e-4)
        assert last < first
        layer.store()


def test_learning_at_a_rate_that_only_harms_gives_the_nearest_numbers(documents, tmp_path, monkeypatch):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    asked = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: [-gradient for gradient in asked(*args)])  # uphill
    numbers = learned(source, tmp_path / "out", documents, rate=0.5)
    assert numbers["relative_error"] == numbers["relative_error_nearest"] > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_rounding_that_is_not_there(symmetric):
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(6, 32, generator=draw)
    scheme = Scheme(3, 8, symmetric)
    part = rounding.rounding()(weight_OI, *grid.fit(weight_OI, scheme), scheme)
    part.offset_OGC.data.uniform_(-0.5, 0.5, generator=draw)
    part.factor_EOG.data.uniform_(0.6, 1.1, generator=draw)
    asked_OI = torch.randn(6, 32, generator=draw)
    found = torch.autograd.grad((part(weight_OI) * asked_OI).sum(), list(part.parameters()))

    offset = part.offset_OGC.detach().clone().requires_grad_()
    factor = part.factor_EOG.detach().clone().requires_grad_()
    through = lambda value, near: value + (near - value).detach()  # noqa: E731
    base, zero = part.scale_OG, part.zero_OG
    if symmetric:
        scale = base * factor[0]
        scale, zero = through(scale, scale.half().float()), torch.zeros_like(base)
    else:
        low, high = (-4 - zero) * base * factor[0], (3 - zero) * base * factor[1]
        scale = (high - low) / 7
        scale = through(scale, scale.half().float())
        zero = -4 - low / scale
        zero = through(zero, zero.round()).clamp(-4, 3)
    steps = weight_OI.reshape(6, 4, 8) / scale.unsqueeze(2) + offset
    whole = through(steps, steps.round()) + zero.unsqueeze(2)
    made = ((whole.clamp(-4, 3) - zero.unsqueeze(2)) * scale.unsqueeze(2)).flatten(1)
    expected = torch.autograd.grad((made * asked_OI).sum(), [offset, factor])
    assert torch.equal(part(weight_OI), made)
    assert torch.allclose(found[0] * scale.unsqueeze(2), expected[0], atol=1e-6)
    assert torch.allclose(found[1], expected[1], atol=1e-4, rtol=1e-4)
    assert (expected[0] == 0).any() and (expected[1] != 0).any()


def test_it_repeats_itself_and_another_seed_sees_other_text(documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        learned(source, tmp_path / name, documents, seed=seed)
    first, second, other = (
        (tmp_path / n / "model-00001-of-00002.safetensors").read_bytes() for n in ("first", "second", "other")
    )
    assert first == second != other


def test_it_goes_on_after_the_layers_that_a_killed_run_has_left(documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source")
    learned(source, tmp_path / "whole", documents)
    (tmp_path / "resumed").mkdir()
    shutil.copyfile(tmp_path / "whole/model-00001-of-00003.safetensors", tmp_path / "resumed/part-00000.safetensors")
    rounding.run(source, tmp_path / "resumed", config(documents))
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("options", "loss"), [({}, 1e-5), ({"symmetric": False, "bits": 3}, 1e-2)])
def test_transformers_reads_the_same_model(options, loss, documents, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    learned(make_decoder("llama", tmp_path / "source"), tmp_path / "out", documents, **options)
    # The library makes no room for packed zero points unless it reads weights as floats, which it then does in float16.
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if options else {}
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **how)(TOKENS).logits
    assert torch.allclose(theirs, logits(tmp_path / "out"), atol=loss)


def test_layers_that_each_err_less_make_a_model_that_errs_less_on_other_text(documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source")
    texts = data.documents(documents, "test").texts
    tokens = torch.as_tensor(language.windows(language.Tokenizer(source), texts, 16, 16))
    learned(source, tmp_path / "learned", documents, steps=40)
    (tmp_path / "nearest").mkdir()
    rtn.run(source, tmp_path / "nearest", rtn.Config(group_size=16))
    with torch.no_grad():
        whole = decoder.load(source)(tokens).logits
        errors = [
            float((decoder.load(tmp_path / name)(tokens).logits - whole).square().mean())
            for name in ("learned", "nearest")
        ]
    assert errors[0] < 0.9 * errors[1]


def test_arithmetic_is_chosen_by_what_the_processor_says_of_itself(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda there=there: there)
        assert rounding.lower_arithmetic("auto", "cpu") is there
    assert rounding.lower_arithmetic("bfloat16", "cpu") and not rounding.lower_arithmetic("float32", "cpu")


def test_a_layer_is_itself_again_when_learning_fails(documents, tmp_path, monkeypatch):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    tokens_NT = np.zeros((2, 8), dtype=np.int64)
    (tmp_path / "out").mkdir()
    layer = next(layerwise.walk(source, tmp_path / "out", tokens_NT, original=True))
    monkeypatch.setattr(rounding, "squared_error", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rounding.learn(layer, config(documents))
    assert not any(parametrize.is_parametrized(layer.map(name)) for name in layer.kind.maps)
