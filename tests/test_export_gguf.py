"""export.gguf: read back by fetch.gguf and by the gguf package and, where LLAMACPP_PYTHON names one, by llama.cpp."""

import json
import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from slimline import artifact, gguf_header, gguf_tokenizer, step
from slimline.errors import ModelError
from slimline.export import gguf as export
from slimline.fetch import gguf as fetch
from tests import ggufs

ROOT = Path(__file__).parent.parent
LLAMACPP = os.environ.get("LLAMACPP_PYTHON")
llamacpp = pytest.mark.skipif(not LLAMACPP, reason="LLAMACPP_PYTHON names no Python with llama-cpp-python")

KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
    "phi3": {"sliding_window": None},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "tie_word_embeddings": True},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def folder_of(folder, kind="llama", **settings):
    """A sealed model of the kind, with the tests' tokenizer beside it."""
    model = ggufs.make_model(kind, **{**KINDS[kind], **settings})
    fetched = folder.parent / "tokenizer"
    fetched.mkdir()
    file = ggufs.write(folder.parent / "tokenizer.gguf", ggufs.make_model())
    gguf_tokenizer.save(gguf_header.read(file), fetched)
    folder.mkdir()
    tied = model.config.tie_word_embeddings
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((fetched / name).read_bytes())
    artifact.seal(folder, format="hf", task="", labels=(), base="made for a test")
    return folder


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_floats_come_back_bit_by_bit_and_text_becomes_the_same_tokens(kind, tmp_path, out):
    source = folder_of(tmp_path / "source", kind)
    assert export.run(source, out, export.Config(type="f32"))["weight_error"] == 0
    (tmp_path / "back").mkdir()
    fetch.run(out / "model.gguf", tmp_path / "back", fetch.Config())
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    exact = not kind.startswith("gemma")  # whose norms have had 1 added and taken away again
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[k], after[k], rtol=0, atol=0 if exact else 1e-6) for k in before)
    texts = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, tmp_path / "back")]
    assert all(texts[0].encode(text).ids == texts[1].encode(text).ids for text in ggufs.TEXTS)
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["chat_template"] == ggufs.TEMPLATE
    settings = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "bos_token_id", "n_head"):
        if name in settings[1] and settings[0][name] is not None:
            assert settings[0][name] == settings[1][name], name


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tensors_are_the_bytes_that_llama_cpps_converter_writes(kind, stored, tmp_path, out):
    source = folder_of(tmp_path / "source", kind)
    export.run(source, out, export.Config(type=stored, head=stored))
    theirs = gguf.GGUFReader(ggufs.write(tmp_path / "theirs.gguf", ggufs.make_model(kind), stored.upper()))
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert ours.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert ours[tensor.name].tensor_type == tensor.tensor_type and np.array_equal(
            ours[tensor.name].data, tensor.data
        )


def test_the_settings_are_those_that_llama_cpps_converter_writes(tmp_path, out):
    export.run(folder_of(tmp_path / "source"), out, export.Config(type="q8_0"))
    ours = gguf_header.read(out / "model.gguf").fields
    theirs = gguf_header.read(ggufs.write(tmp_path / "theirs.gguf", ggufs.make_model())).fields
    assert {key: ours.get(key) for key in theirs} == theirs
    assert ours["general.file_type"] == 7 and ours["llama.rope.dimension_count"] == 16


def test_llama_3s_slowed_turns_are_a_tensor_and_come_back(tmp_path, out):
    source = folder_of(tmp_path / "source", rope_parameters=LLAMA3, head_dim=64)
    export.run(source, out, export.Config(type="f32"))
    (tmp_path / "back").mkdir()
    fetch.run(out / "model.gguf", tmp_path / "back", fetch.Config())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"] == LLAMA3


def test_the_head_is_spared_where_the_rest_has_four_bits(tmp_path, out):
    metrics = export.run(folder_of(tmp_path / "source"), out, export.Config(type="q4_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert (kinds["output.weight"], kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"]) == (
        "Q8_0",
        "Q8_0",
        "Q4_0",
    )
    assert 4.5 < metrics["bits_per_weight"] < 8.5 and 0.01 < metrics["weight_error"] < 0.1


def test_rows_that_blocks_do_not_fill_are_f16(tmp_path, out):
    export.run(folder_of(tmp_path / "source", intermediate_size=80), out, export.Config(type="q8_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_read_as_what_they_are(dtype, tmp_path, out):
    source = folder_of(tmp_path / "source")
    state = {k: v.to(dtype) for k, v in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors")
    export.run(source, out, export.Config(type="f32"))
    (tmp_path / "back").mkdir()
    fetch.run(out / "model.gguf", tmp_path / "back", fetch.Config())
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], state[name].float()) for name in state)


def test_as_a_step_it_is_sealed_as_gguf_and_its_weights_are_counted(tmp_path):
    step.run_on_folder("export.gguf", folder_of(tmp_path / "source"), tmp_path / "sealed", {}, lambda event: None)
    manifest = artifact.verify(tmp_path / "sealed")
    assert manifest.format == "gguf" and manifest.weights_bytes == (tmp_path / "sealed/model.gguf").stat().st_size
    with pytest.raises(ModelError, match="needs hf but .* is gguf"):
        step.run_on_folder("export.gguf", tmp_path / "sealed", tmp_path / "again", {}, lambda event: None)


# What is refused


def changed(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mamba"}, "is of a mamba model. GGUF is written of: llama, qwen2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', where llama.cpp takes 'silu' for granted"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by 'dynamic'"),
        ({"intermediate_size": 128}, r"mlp.down_proj.weight is \[64, 96\], but config.json asks for \[64, 128\]"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(values, said, tmp_path, out):
    source = folder_of(tmp_path / "source")
    changed(source / "config.json", **values)
    with pytest.raises(ModelError, match=said):
        export.run(source, out, export.Config())


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, r"no name for \(Whitespace\). Known here: gpt-2, smollm, llama-bpe"),
        ("pre_tokenizer", None, "no name for"),
        ("normalizer", {"type": "Lowercase"}, r"is a BPE \(normalizer Lowercase\). GGUF is written of byte-level BPE"),
        ("model", {"type": "Unigram", "vocab": []}, "is a Unigram"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(part, value, said, tmp_path, out):
    source = folder_of(tmp_path / "source")
    changed(source / "tokenizer.json", **{part: value})
    with pytest.raises(ModelError, match=said):
        export.run(source, out, export.Config())


@pytest.mark.parametrize(
    ("rule", "whole"), [("llama-bpe", True), ("qwen2", False), ("gpt-2", False), ("smollm", False)]
)
def test_a_rule_that_came_in_goes_out_under_its_name(rule, whole, tmp_path):
    gguf_tokenizer.save(gguf_header.read(ggufs.write(tmp_path / "m.gguf", ggufs.make_model(), pre=rule)), tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert gguf_tokenizer.rule_of(tokenizer, "") == rule and tokenizer["model"]["ignore_merges"] == whole


# llama.cpp itself


@llamacpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_logits_of_transformers(kind, tmp_path, out):
    check_against_llama_cpp(folder_of(tmp_path / "source", kind), out, tmp_path, 2e-3)


@llamacpp
def test_llama_cpp_slows_llama_3s_turns_as_transformers_does(tmp_path, out):
    settings = {**LLAMA3, "original_max_position_embeddings": 64}
    check_against_llama_cpp(folder_of(tmp_path / "source", rope_parameters=settings, head_dim=64), out, tmp_path, 2e-3)


def check_against_llama_cpp(source, out, scratch, tolerance):
    from transformers import AutoModelForCausalLM

    export.run(source, out, export.Config(type="f32"))
    ids = np.random.default_rng(0).integers(3, len(ggufs.tokens()), 100).tolist()
    (scratch / "windows.json").write_text(json.dumps([ids]))
    command = [LLAMACPP, ROOT / "benchmarks/llamacpp.py", scratch / "windows.json", out / "model.gguf"]
    sizes = ["--prefill", "16", "--decode", "4", "--repeats", "1", "--cache", "f32", "--logits", scratch]
    done = subprocess.run([*map(str, [*command, *sizes])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        ours = model(torch.tensor([ids])).logits[0].numpy()
    theirs = np.load(scratch / "model.npy")
    assert np.abs(ours - theirs).max() / np.abs(ours).max() <= tolerance
