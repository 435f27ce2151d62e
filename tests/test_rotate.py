"""Turning a model's inner spaces: nothing that it answers changes, and what comes after rounds less away."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimline import decoder, hf, rotation
from slimline.errors import ConfigError, ModelError
from slimline.quantize import rotate, rtn
from slimline.shards import Weights
from tests.decoders import KINDS, make_decoder, seal_decoder

NORMS_THAT_ONLY_SCALE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
TOKENS = torch.arange(40).reshape(2, 20) % 29


def turned(source, out, **options):
    out.mkdir()
    return rotate.run(source, out, rotate.Config(**options))


def logits(folder):
    with torch.no_grad():
        return decoder.load(folder)(TOKENS).logits


def same(first, second):
    return (logits(first) - logits(second)).abs().max() <= 4e-6 * logits(first).abs().max()


@pytest.mark.parametrize("size", [1, 2, 4, 12, 16, 20, 28, 36, 40, 44, 60, 64, 80, 96, 576, 896, 960])
def test_rows_of_a_hadamard_matrix_are_signs_and_orthogonal(size):
    found = rotation.hadamard(size)
    assert np.array_equal(np.abs(found), np.ones((size, size)))
    assert np.array_equal(found @ found.T, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 6, 10, 52])
def test_a_size_without_a_hadamard_matrix_is_refused_with_a_way_out(size):
    with pytest.raises(ConfigError, match=f"size {size} here. Ask for form='random'"):
        rotation.hadamard(size)


@pytest.mark.parametrize("form", ["hadamard", "random"])
def test_a_matrix_is_orthogonal_and_drawn_by_its_seed(form):
    first = rotation.matrix(36, form, 0)
    assert np.allclose(first @ first.T, np.eye(36), atol=1e-14)
    assert np.array_equal(first, rotation.matrix(36, form, 0))
    assert not np.allclose(first, rotation.matrix(36, form, 1))


def test_a_hadamard_matrix_spreads_an_outlier_evenly():
    outlier = np.eye(576)[7] * 24
    assert np.allclose(np.abs(outlier @ rotation.matrix(576, "hadamard", 3)), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_turned_model_answers_as_before(kind, tied, tmp_path):
    source = make_decoder(kind, tmp_path / "source", tied=tied)
    numbers = turned(source, tmp_path / "out")
    assert numbers == {"stream": float(kind in NORMS_THAT_ONLY_SCALE and not tied), "heads": 1.0, "untied": 0.0}
    assert same(source, tmp_path / "out")
    before, after = Weights(source), Weights(tmp_path / "out")
    assert sorted(before.stored()) == sorted(after.stored()), "a tied head stays tied"
    value = f"{decoder.FAMILIES[kind].layers}.0.{decoder.FAMILIES[kind].value}.weight"
    assert not torch.allclose(before.read(value), after.read(value))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_an_untied_head_lets_the_stream_be_turned(kind, tmp_path):
    source = make_decoder(kind, tmp_path / "source", tied=True)
    assert turned(source, tmp_path / "out", untie=True) == {"stream": 1.0, "heads": 1.0, "untied": 1.0}
    assert same(source, tmp_path / "out")
    assert hf.read_config(tmp_path / "out")["tie_word_embeddings"] is False
    weights = Weights(tmp_path / "out")
    assert "lm_head.weight" in weights
    gain = weights.read("model.norm.weight") + (1 if kind == "gemma" else 0)
    assert torch.equal(gain, torch.ones(64)), "the last norm has moved into the head"


def test_a_tied_head_that_is_stored_twice_is_stored_once_more_in_its_own_form(tmp_path):
    source = make_decoder("llama", tmp_path / "source", tied=True)
    state = load_file(source / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    turned(source, tmp_path / "out", untie=True)
    assert same(source, tmp_path / "out")


def test_the_stream_of_a_tied_model_is_turned_only_on_request_which_says_what_it_costs(tmp_path):
    source = make_decoder("llama", tmp_path / "source", tied=True)
    with pytest.raises(ConfigError, match="7,424 bytes more. Ask for untie=true"):  # 29 words * 64 * 4
        turned(source, tmp_path / "out", stream="yes")


@pytest.mark.parametrize(
    ("kind", "why"),
    [("gpt2", "norms subtract a mean"), ("gemma3_text", "norm post_attention_layernorm stands between")],
)
def test_a_stream_that_cannot_be_turned_is_refused_with_the_reason(kind, why, tmp_path):
    source = make_decoder(kind, tmp_path / "source")
    with pytest.raises(ModelError, match=why):
        turned(source, tmp_path / "out", stream="yes")


@pytest.mark.parametrize("kind", ["qwen2", "phi", "gpt2", "opt"])
def test_the_biases_of_values_are_turned_with_them(kind, tmp_path):
    source = make_decoder(kind, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    loud = {name: tensor + 1 for name, tensor in state.items() if name.endswith(".bias") and "attn" in name}
    assert loud
    save_file(state | loud, source / "model.safetensors")
    turned(source, tmp_path / "out", form="random")
    assert same(source, tmp_path / "out")


def test_a_channel_that_stands_out_costs_less_once_it_was_turned(tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", layers=1, tied=False))
    state = load_file(source / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, 5] *= 30
        if name.endswith("layernorm.weight"):
            tensor[5] /= 30
    save_file(state, source / "model.safetensors")
    turned(source, tmp_path / "turned")
    losses = {}
    for name, folder in (("plain", source), ("turned", tmp_path / "turned")):
        (tmp_path / f"{name}-rtn").mkdir()
        rtn.run(folder, tmp_path / f"{name}-rtn", rtn.Config(group_size=32))
        losses[name] = float((logits(tmp_path / f"{name}-rtn") - logits(source)).square().mean())
    assert losses["turned"] < 0.8 * losses["plain"]


def test_turning_repeats_itself_and_is_steered_by_its_seed(tmp_path):
    source = make_decoder("llama", tmp_path / "source", tied=False)
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        turned(source, tmp_path / name, seed=seed)
    first, second, other = (
        (tmp_path / n / "model-00001-of-00003.safetensors").read_bytes() for n in ("first", "second", "other")
    )
    assert first == second != other


def test_weights_of_sixteen_bits_stay_so(tmp_path):
    source = make_decoder("llama", tmp_path / "source", tied=False)
    state = {k: v.bfloat16() for k, v in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors")
    turned(source, tmp_path / "out")
    weights = Weights(tmp_path / "out")
    assert {weights.raw(name).dtype for name in weights.stored()} == {torch.bfloat16}
