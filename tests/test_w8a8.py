"""Weights and activations of 8 bits: smoothed whole numbers and E4M3 floats, run as a server will run them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimline import activations, data, decoder, equivalent, hf, language, layerwise, packed
from slimline.errors import ConfigError, ModelError
from slimline.quantize import fp8_w8a8, smoothquant
from slimline.shards import Weights
from tests.decoders import KINDS, make_decoder, make_documents

TOKENS = torch.arange(40).reshape(2, 20) % 29
BOTH = {"smoothquant": smoothquant, "fp8_w8a8": fp8_w8a8}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


def eight_bits(name, source, out, documents, **options):
    out.mkdir()
    module = BOTH[name]
    return module.run(source, out, module.Config(data=str(documents), windows=8, length=16, **options))


def logits(model):
    with torch.no_grad():
        return (decoder.load(model) if not isinstance(model, torch.nn.Module) else model)(TOKENS).logits


def share_lost(folder, source):
    return float((logits(folder) - logits(source)).norm() / logits(source).norm())


def test_whole_numbers_worked_by_hand():
    near = activations.by_token(torch.tensor([[255.0, 100.9, -255.0, 1.0], [0, 0, 0, 0]]), "int")  # a step is 2
    assert near.tolist() == [[254.0, 100.0, -256.0, 0.0], [0, 0, 0, 0]]
    fixed = activations.rounded(torch.tensor([3.2, 1000.0, -1000.0]), torch.tensor([2.0]), "int")
    assert fixed.tolist() == [4.0, 254.0, -256.0], "what lies beyond the calibrated range is cut"


def test_floats_of_eight_bits_worked_by_hand():
    near = activations.by_token(torch.tensor([[448.0, 17.0, 18.9, -0.0015]]), "float")  # a step is 2 from 16 to 32
    assert near.tolist() == [[448.0, 16.0, 18.0, -(2**-9)]], "2^-9 is the smallest there is"
    assert activations.rounded(torch.tensor([900.0]), torch.tensor([2.0]), "float").tolist() == [2 * 448.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BOTH)
def test_every_family_keeps_its_answers(name, kind, documents, tmp_path):
    source = make_decoder(kind, tmp_path / "source")
    numbers = eight_bits(name, source, tmp_path / "out", documents)
    lost = {"smoothquant": 0.008, "fp8_w8a8": 0.03}[name]  # 1 / 127.5 / sqrt(12) of a peak, and 2^-4 / sqrt(3)
    assert 0.5 * lost < numbers["relative_error"] < 1.2 * lost
    assert 0 < share_lost(tmp_path / "out", source) < 8 * lost


@pytest.mark.parametrize("scaled", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("name", BOTH)
def test_transformers_rounds_weights_and_inputs_to_the_same_numbers(name, kind, scaled, documents, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    eight_bits(name, make_decoder(kind, tmp_path / "source"), tmp_path / "out", documents, activations=scaled)
    settings = hf.read_config(tmp_path / "out")["quantization_config"]
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    assert scheme.input_activations.dynamic is (scaled == "dynamic")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(theirs), logits(tmp_path / "out"), atol=1e-6)
    weights = Weights(tmp_path / "out")
    floats = decoder.frame(tmp_path / "out")
    floats.load_state_dict({n: weights.read(n).float() for n in weights.floats()}, strict=False, assign=True)
    floats.tie_weights()
    assert not torch.allclose(logits(floats), logits(tmp_path / "out"), atol=1e-3), "inputs are rounded as well"


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_alone_changes_no_answer_and_says_what_activations_become(kind, documents, tmp_path):
    source = make_decoder(kind, tmp_path / "source")
    (tmp_path / "out").mkdir()
    texts = data.documents(documents, "calibration").texts
    tokens_NT = language.windows(language.Tokenizer(source), texts, 16, 4)
    for layer in layerwise.walk(source, tmp_path / "out", tokens_NT):
        before = layer.outputs().clone()
        measure = lambda layer=layer: layer.measure(  # noqa: E731
            layer.kind.maps, lambda inputs: inputs.abs().amax(0), lambda one, other: one.maximum(other)
        )
        given = measure()
        said = smoothquant.smooth(layer, given, 0.7, kind)
        found = measure()
        for name in layer.kind.maps:
            assert torch.allclose(found[name], said[name].float(), rtol=1e-4, atol=1e-5), name
        assert not torch.allclose(given[layer.kind.query], found[layer.kind.query], rtol=0.01)
        assert torch.allclose(layer.outputs(), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
        layer.store()


def test_a_factor_by_the_formula():
    found = smoothquant.factors(torch.tensor([64.0, 0.0, 3.0]), torch.tensor([0.25, 1.0, 0.0]), 0.5)
    assert found.tolist() == [8.0 / 0.5, 1.0, 1.0], "a channel that says nothing is left alone"
    assert smoothquant.factors(torch.tensor([64.0]), torch.tensor([0.25]), 1.0).tolist() == [64.0]


def loud_channel(folder, factor):
    """A norm that makes one channel so much louder, and readers that make good for it."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 5] /= factor
        if name.endswith("layernorm.weight"):
            tensor[5] *= factor
    save_file(state, folder / "model.safetensors")
    return folder


def test_an_outlier_ruins_whole_numbers_and_smoothing_saves_them(documents, tmp_path, monkeypatch):
    source = loud_channel(make_decoder("llama", tmp_path / "source"), 100)
    eight_bits("smoothquant", source, tmp_path / "smooth", documents)
    monkeypatch.setattr(smoothquant, "smooth", lambda layer, largest, *_: largest)
    eight_bits("smoothquant", source, tmp_path / "rough", documents)
    assert share_lost(tmp_path / "smooth", source) < 0.4 * share_lost(tmp_path / "rough", source)


def test_values_that_queries_share_get_one_factor(documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source", layers=1, heads=4, groups=2)
    (tmp_path / "out").mkdir()
    tokens_NT = TOKENS.numpy()
    layer = next(layerwise.walk(source, tmp_path / "out", tokens_NT))
    assert equivalent.values(layer) == (slice(0, 32), 4, 2, 16)
    before = layer.weight("self_attn.o_proj").clone()
    given = layer.measure(layer.kind.maps, lambda inputs: inputs.abs().amax(0), lambda one, other: one.maximum(other))
    smoothquant.smooth(layer, given, 0.5, "llama")
    factor_HD = (layer.weight("self_attn.o_proj") / before)[0].reshape(4, 16)
    assert torch.allclose(factor_HD[0], factor_HD[1], rtol=1e-4) and torch.allclose(
        factor_HD[2], factor_HD[3], rtol=1e-4
    )
    assert not torch.allclose(factor_HD[0], factor_HD[2], rtol=1e-2)


def test_e4m3_weights_are_the_nearest_there_are():
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8).unsqueeze(1)
    parts, gone = fp8_w8a8.pack(weight_OI)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    steps_OI = weight_OI / parts[packed.SCALE]
    best_OI = (steps_OI.unsqueeze(2) - every).abs().amin(2)
    assert torch.allclose((steps_OI - parts[".weight"].float()).abs(), best_OI, atol=1e-4)
    assert steps_OI.abs().amax(1).tolist() == pytest.approx([448] * 8)
    near_OI = parts[".weight"].float() * parts[packed.SCALE]
    assert gone == pytest.approx(float((near_OI - weight_OI).double().square().sum()))


def test_fixed_scales_need_text(tmp_path):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    with pytest.raises(ConfigError, match="needs data to calibrate on"):
        fp8_w8a8.run(source, tmp_path, fp8_w8a8.Config(activations="static"))


@pytest.mark.parametrize("name", BOTH)
def test_it_repeats_itself(name, documents, tmp_path):
    source = make_decoder("qwen2", tmp_path / "source", layers=1)
    for side in ("first", "second"):
        eight_bits(name, source, tmp_path / side, documents, activations="static")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "change", [{"num_bits": 4}, {"symmetric": False}, {"strategy": "group"}, {"type": "nothing"}, {"dynamic": False}]
)
def test_inputs_rounded_in_another_way_are_refused(change, documents, tmp_path):
    eight_bits("smoothquant", make_decoder("llama", tmp_path / "source", layers=1), tmp_path / "out", documents)
    file = tmp_path / "out/config.json"
    values = json.loads(file.read_text())
    values["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= change
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="rounds its inputs in a way that is not known here"):
        decoder.load(tmp_path / "out")


def test_a_lost_input_scale_is_named(documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    eight_bits("fp8_w8a8", source, tmp_path / "out", documents, activations="static")
    state = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    del state["model.layers.0.mlp.up_proj.input_scale"]
    (tmp_path / "out/model.safetensors.index.json").unlink()
    save_file(state, tmp_path / "out/model.safetensors")
    with pytest.raises(ModelError, match=r"has no model.layers.0.mlp.up_proj.input_scale"):
        decoder.load(tmp_path / "out")


def test_targets_are_classes_names_or_patterns():
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    for target, there in (("Linear", True), ("a.b", True), ("a", False), ("re:.*b$", True), ("re:c", False)):
        settings = {"config_groups": {"group_0": {"targets": [target], "input_activations": inputs}}}
        assert (activations.asked(settings, "a.b", "x") == ("int", True)) is there
    assert activations.asked({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "a.b", "x") is None
