"""Keys and values of 8 bits: scales measured, rounding as compressed-tensors has it, texts by token and whole."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slimline import activations, data, decoder, hf, keys_values, language, packed, passages, technique, window
from slimline.attention import sliding_window
from slimline.errors import ModelError
from slimline.quantize import fp8_w8a8, kv_cache, rtn
from slimline.shards import Weights
from tests.decoders import make_decoder, make_documents, seal_decoder

TOKENS = torch.arange(40).reshape(2, 20) % 29


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("documents") / "documents.parquet")


def options(documents, **more):
    return kv_cache.Config(data=str(documents), **({"windows": 4, "length": 16} | more))


def cached(source, out, documents, **more):
    out.mkdir()
    return kv_cache.run(source, out, options(documents, **more))


def logits(model, ids=TOKENS):
    with torch.no_grad():
        model = model if isinstance(model, torch.nn.Module) else decoder.load(model)
        return model(torch.as_tensor(ids), use_cache=False).logits


def in_cache(model, ids):
    """[(keys, values)] of every layer, out of transformers' own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.as_tensor(ids), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def scales(folder):
    return load_file(sorted(folder.glob("*.safetensors"))[-1])


def set_scales(folder, number):
    file = sorted(folder.glob("*.safetensors"))[-1]
    save_file({name: torch.full_like(scale, number) for name, scale in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("kind", keys_values.FAMILIES)
def test_scales_are_the_largest_keys_and_values_of_the_text(kind, documents, tmp_path):
    source = make_decoder(kind, tmp_path / "source")
    numbers = cached(source, tmp_path / "out", documents)
    largest = in_cache(decoder.load(source), passages.draw(source, options(documents)))
    found, peaks = scales(tmp_path / "out"), torch.tensor([[p.abs().max() for p in pair] for pair in largest])
    assert len(found) == 4 and {(s.dtype, s.shape) for s in found.values()} == {(torch.float32, (1,))}
    for i, (key, value) in enumerate(peaks.tolist()):
        assert found[f"model.layers.{i}.self_attn.k_scale"].item() * 448 == pytest.approx(key, rel=1e-5)
        assert found[f"model.layers.{i}.self_attn.v_scale"].item() * 448 == pytest.approx(value, rel=1e-5)
    assert [numbers["largest_key"], numbers["largest_value"]] == pytest.approx(peaks.amax(0).tolist(), rel=1e-5)
    assert numbers["calibration_tokens"] == 64


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "fp8") for kind in keys_values.FAMILIES), ("llama", "int8"), ("phi", "int8")]
)
def test_transformers_reads_the_folder_and_rounds_to_the_same_numbers(kind, form, documents, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    source = make_decoder(kind, tmp_path / "source")
    numbers = cached(source, tmp_path / "out", documents, form=form)
    settings = QuantizationConfig.model_validate(hf.read_config(tmp_path / "out")["quantization_config"])
    assert settings.config_groups == {} and settings.kv_cache_scheme.num_bits == 8
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(theirs), logits(tmp_path / "out"), atol=1e-6)
    lost = {"fp8": 2**-4 / 3**0.5, "int8": 0.01}[form]  # the largest error of a step of E4M3, evenly spread
    assert 0.5 * lost < min(numbers["key_error"], numbers["value_error"])
    assert max(numbers["key_error"], numbers["value_error"]) < 1.2 * lost
    moved = logits(tmp_path / "out") - logits(source)
    assert 1e-4 < moved.norm() / logits(source).norm() < 3 * lost


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_what_is_cached_is_the_nearest_that_8_bits_hold(form, documents, tmp_path):
    source = make_decoder("llama", tmp_path / "source", layers=1)
    cached(source, tmp_path / "out", documents, form=form, windows=1, length=2)
    ((keys, values),), ((near_keys, near_values),) = (
        in_cache(decoder.load(folder), TOKENS) for folder in (source, tmp_path / "out")
    )
    if form == "fp8":
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        every = every[every.isfinite()]
    else:
        every = torch.arange(-128, 128).double()
    found = scales(tmp_path / "out")
    for name, whole, near in (("k_scale", keys, near_keys), ("v_scale", values, near_values)):
        grid = every * found[f"model.layers.0.self_attn.{name}"].double()
        assert bool((whole.abs() > grid.max()).any()), "two tokens are too few to have seen the largest"
        assert (near.double().unsqueeze(-1) - grid).abs().amin(-1).max() < 1e-6, "nothing lies between"
        best = (whole.double().unsqueeze(-1) - grid).abs().amin(-1)
        assert torch.allclose((whole.double() - near).abs(), best, atol=1e-6)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_numbers_that_8_bits_hold_change_no_answer_at_all(form, documents, tmp_path):
    still = {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e30}  # positions turn nothing
    source = make_decoder("llama", tmp_path / "source", layers=1, rms_norm_eps=0.0, rope_parameters=still)
    state = load_file(source / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    table = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.randint(0, 2, table.shape, generator=draw) * 2.0 - 1  # of length 1
    state["model.layers.0.input_layernorm.weight"] = torch.ones(64)
    for name in ("k_proj", "v_proj"):  # every key and value is a sign times a whole number up to 7
        rows = torch.zeros(32, 64)
        rows[torch.arange(32), torch.randperm(64, generator=draw)[:32]] = torch.arange(32) % 7 + 1.0
        state[f"model.layers.0.self_attn.{name}.weight"] = rows
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    cached(source, out, documents, form=form)
    if form == "fp8":
        assert {scale.item() for scale in scales(out).values()} == {2**-6}  # 7 / 448
    else:
        assert not torch.equal(logits(out), logits(source)), "7 is 127.5 steps of its own scale"
        set_scales(out, 2**-3)
    assert torch.equal(logits(out), logits(source))
    assert not torch.equal(logits(set_scales(out, 0.11)), logits(source))


@pytest.mark.parametrize("kind", keys_values.FAMILIES)
def test_token_by_token_is_as_all_at_once(kind, documents, tmp_path):
    more = {"sliding_window": 6} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    source = make_decoder(kind, tmp_path / "source", **more)
    cached(source, tmp_path / "out", documents)
    model = language.load(seal_decoder(tmp_path / "out"), threads=1)
    ids = TOKENS.tolist()
    state = model.prefill([row[:8] for row in ids], room=12)
    found = [state.logits_BV]
    for _ in range(12):
        following = state.logits_BV.argmax(1)
        ids = [[*row[: state.length], int(token)] for row, token in zip(ids, following)]
        state = model.step(state)
        found.append(state.logits_BV)
    whole = model.logits(ids)[:, 7:]
    np.testing.assert_allclose(np.stack(found, 1), whole, atol=5e-5)
    assert np.abs(whole - logits(source, ids)[:, 7:].numpy()).max() > 1e-3
    begun = torch.tensor(ids)[:1, :8]
    said = model.model.generate(
        begun, attention_mask=torch.ones_like(begun), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert said.tolist() == ids[:1], "and as transformers goes on by itself"


def test_packed_weights_stay_packed(documents, tmp_path):
    from transformers import AutoModelForCausalLM

    source, four, out = make_decoder("llama", tmp_path / "source"), tmp_path / "four", tmp_path / "out"
    four.mkdir()
    rtn.run(source, four, rtn.Config(bits=4, group_size=32))
    cached(four, out, documents)
    before, after = (hf.read_config(folder)["quantization_config"] for folder in (four, out))
    assert before | {"kv_cache_scheme": keys_values.scheme("float")} == after
    for name, tensor in Weights(four).found.items():
        assert torch.equal(Weights(out).raw(name), Weights(four).raw(name)), (name, tensor)
    assert set(Weights(out).stored()) - set(Weights(four).stored()) == set(scales(out))
    moved = logits(out) - logits(four)
    assert 1e-4 < moved.norm() / logits(four).norm() < 0.2
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.allclose(logits(theirs), logits(out), atol=1e-5)


def test_keys_are_measured_behind_the_rounding_of_inputs(documents, tmp_path):
    source, eight = make_decoder("llama", tmp_path / "source"), tmp_path / "eight"
    eight.mkdir()
    fp8_w8a8.run(source, eight, fp8_w8a8.Config())
    cached(eight, tmp_path / "out", documents)
    tokens_NT = passages.draw(eight, options(documents))
    for i, pair in enumerate(in_cache(decoder.load(eight), tokens_NT)):
        for name, whole in zip(("k_scale", "v_scale"), pair):
            scale = scales(tmp_path / "out")[f"model.layers.{i}.self_attn.{name}"]
            assert scale.item() == pytest.approx(activations.scale(whole.abs().max(), "float").item(), rel=1e-5)


@pytest.mark.parametrize("first", ["window", "cache"])
def test_a_window_with_sinks_may_have_it_too(first, documents, tmp_path):
    source, half, out = make_decoder("llama", tmp_path / "source"), tmp_path / "half", tmp_path / "out"
    out.mkdir()
    slide = sliding_window.Config(window=9, sinks=3)
    if first == "window":
        half.mkdir()
        sliding_window.run(source, half, slide)
        kv_cache.run(half, out, options(documents))
    else:
        cached(source, half, documents)
        sliding_window.run(half, out, slide)
    model, without = decoder.load(out), decoder.load(source)
    found = torch.stack(list(window.stream(model, TOKENS.split(1, dim=1), window.cache(model))), 1)
    torch.testing.assert_close(found, logits(model), atol=5e-5, rtol=1e-3)
    assert (logits(model)[:, :9] - logits(without)[:, :9]).abs().max() > 1e-3, "rounded, and not only cut"


def test_the_weights_are_copied_and_the_scales_repeat_themselves(documents, tmp_path):
    source = make_decoder("qwen2", tmp_path / "source")
    for side in ("first", "second"):
        cached(source, tmp_path / side, documents)
    names = {file.name for file in (tmp_path / "first").iterdir()}
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"} <= names
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in names)
    copied = (tmp_path / "first" / "model-00001-of-00002.safetensors").read_bytes()
    assert copied == (source / "model.safetensors").read_bytes()
    assert len(data.documents(documents, "calibration").texts) > 1


def test_a_model_without_such_a_cache_is_refused(documents, tmp_path):
    for kind in ("gpt2", "opt"):
        source = make_decoder(kind, tmp_path / kind)
        with pytest.raises(ModelError, match=f"is a {kind} model, for which no server reads scales"):
            cached(source, tmp_path / f"{kind}-out", documents)
    source = make_decoder("llama", tmp_path / "llama", layers=1)
    cached(source, tmp_path / "once", documents)
    with pytest.raises(ModelError, match="keeps keys and values in 8 bits already"):
        cached(tmp_path / "once", tmp_path / "twice", documents)


@pytest.mark.parametrize("export", ["onnx", "genai", "gguf"])
def test_no_exporter_drops_it_in_silence(export, documents, tmp_path):
    cached(make_decoder("llama", tmp_path / "source", layers=1), tmp_path / "cached", documents)
    module = technique.find(f"export.{export}")
    given = {"data": "unread"} if "data" in module.Config.model_fields else {}
    with pytest.raises(ModelError, match="keeps keys and values in 8 bits, of which .* knows nothing"):
        module.run(tmp_path / "cached", tmp_path / "out", technique.configure(module, given))


@pytest.mark.parametrize(
    "change", [{"num_bits": 4}, {"symmetric": False}, {"strategy": "attn_head"}, {"dynamic": True}]
)
def test_another_way_of_rounding_is_refused(change, documents, tmp_path):
    cached(make_decoder("llama", tmp_path / "source", layers=1), tmp_path / "out", documents)
    file = tmp_path / "out/config.json"
    values = json.loads(file.read_text())
    values["quantization_config"]["kv_cache_scheme"] |= change
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="rounds keys and values in a way that is not known here"):
        decoder.load(tmp_path / "out")


def test_scales_and_settings_belong_together(documents, tmp_path):
    source, out = make_decoder("llama", tmp_path / "source", layers=1), tmp_path / "out"
    cached(source, out, documents)
    settings = hf.read_config(out)["quantization_config"]
    assert not packed.Packing(settings, "x").there, "a model of floats"
    decoder.copy_rest(source, out, {"quantization_config": None})
    with pytest.raises(ModelError, match=r"holds model.layers.0.self_attn.[kv]_scale, .*, which its family has not"):
        decoder.load(out)
    (source / "config.json").write_text(json.dumps(hf.read_config(source) | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=r"has no model.layers.0.self_attn.k_scale"):
        decoder.load(source)
