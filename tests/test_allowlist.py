import contextlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from slimline import allowlist
from slimline.errors import ModelError
from tests.decoders import make_decoder

EMBEDDING = "embeddings.word_embeddings.weight"
CONFIG = {"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 1, "_name_or_path": "somebody/bert"}
WEIGHTS = {EMBEDDING: np.ones((3, 4), np.float32), "dense.weight": np.ones((4, 4), np.float16)}
TOKENIZER = {"model": {"vocab": {"[PAD]": 0, "a": 1, "b": 2}}, "added_tokens": [{"id": 0}]}


def build(folder: Path, config=CONFIG, weights=WEIGHTS, tokenizer=TOKENIZER) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(weights, folder / "model.safetensors")
    return folder


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        allowlist.check(folder)


@pytest.fixture
def model(tmp_path):
    return build(tmp_path / "model")


def test_a_plain_model_passes_whatever_harmless_lies_beside_it(model):
    (model / "README.md").write_text("hello")
    (model / "pytorch_model.bin").write_bytes(b"left behind")
    allowlist.check(model)
    assert allowlist.tensors(model)[EMBEDDING].shape == (3, 4)


@pytest.mark.parametrize(
    "key",
    ["auto_map", "trust_remote_code", "text_trust_remote_code", "_attn_implementation_internal", "custom_pipelines"],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_key_that_names_code_is_refused_at_any_depth(key, name, nested, model):
    content = {**CONFIG, "sub": [{"deep": {key: "x/y--z"}}]} if nested else {**CONFIG, key: "x/y--z"}
    (model / name).write_text(json.dumps(content))
    refused(model, f"{name}: the key '{key}'")


def test_attention_from_a_repository_is_refused_and_the_libraries_own_is_not(tmp_path):
    refused(build(tmp_path / "a", {**CONFIG, "attn_implementation": "somebody/kernel"}), "'attn_implementation'")
    allowlist.check(build(tmp_path / "b", {**CONFIG, "attn_implementation": "sdpa"}))


@pytest.mark.parametrize("name", ["modeling.py", "sub/helper.PY", "fast.so"])
def test_code_in_the_folder_is_refused(name, model):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("")
    refused(model, "is code")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_nothing_in_a_hostile_folder_runs(model, tmp_path):
    canary = tmp_path / "it ran"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    refused(model, "is a pickle.*weights_only=True.*save_file")
    (model / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    refused(model, "is code")
    assert not canary.exists()


def test_a_link_is_refused(model):
    (model / "vocab.txt").symlink_to("/etc/hostname")
    refused(model, "symbolic link")


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({**CONFIG, "model_type": "mamba"}, "model_type is 'mamba'.*bert, roberta.*llama"),
        ({**CONFIG, "quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ([], "a JSON list, not an object"),
    ],
)
def test_a_config_of_another_kind_is_refused(config, sentence, tmp_path):
    refused(build(tmp_path / "model", config), sentence)


@pytest.mark.parametrize("kind", ["llama", "gemma", "opt", "gpt2"])
def test_what_is_asked_of_an_encoder_is_asked_of_a_decoder(kind, tmp_path):
    folder = make_decoder(kind, tmp_path / kind)
    allowlist.check(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x--y.Z"}}))
    refused(folder, "the key 'auto_map' can name code")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"custom_generate": "somebody/decoding"}')
    refused(folder, "generation_config.json: the key 'custom_generate' can name code")
    (folder / "generation_config.json").unlink()
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    save_file({**weights, name: weights[name][:28]}, folder / "model.safetensors")
    refused(folder, "knows token 28, but the embedding has 28 rows")


def test_a_config_that_is_not_json_is_refused(model):
    (model / "config.json").write_text("model_type: bert")
    refused(model, "config.json is not JSON")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name, model):
    (model / name).unlink()
    refused(model, f"has no {name}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_weight_that_is_not_finite_is_named(value, kind, tmp_path):
    broken = np.ones((4, 4), kind)
    broken[2, 1] = value
    refused(build(tmp_path / "model", weights={**WEIGHTS, "dense.weight": broken}), "'dense.weight' holds NaN")


@pytest.mark.parametrize("bits, fine", [(0x3F80, True), (0x7F7F, True), (0x7F80, False), (0xFFC0, False)])
def test_bfloat16_is_read_bit_by_bit(bits, fine, tmp_path):
    file = tmp_path / "model.safetensors"
    text = json.dumps({"w": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bits.to_bytes(2, "little"))
    if fine:
        allowlist._finite("w", allowlist.header(file)["w"])
    else:
        with pytest.raises(ModelError, match="'w' holds NaN or infinity"):
            allowlist._finite("w", allowlist.header(file)["w"])


def test_a_tensor_without_elements_is_named(tmp_path):
    weights = {**WEIGHTS, "none": np.zeros((0, 4), np.float32)}
    refused(build(tmp_path / "model", weights=weights), "'none' has no elements")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    more = {**TOKENIZER, "added_tokens": [{"id": 3}]}
    refused(build(tmp_path / "model", tokenizer=more), "knows token 3, but the embedding has 3 rows")


def test_a_truncated_file_says_how_many_bytes_are_missing(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    refused(model, f"truncated: {len(whole):,} bytes expected, {len(whole) - 5:,} found")


def test_a_header_of_a_thousand_million_entries_is_not_read(model):
    (model / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    refused(model, "truncated")


def shard(model: Path, names: list[str]) -> None:
    (model / "model.safetensors").unlink()
    for (key, value), name in zip(WEIGHTS.items(), names):
        save_file({key: value}, model / Path(name).name)
    (model / allowlist.INDEX).write_text(json.dumps({"weight_map": dict(zip(WEIGHTS, names))}))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_shards_are_taken_when_all_are_there(model):
    shard(model, SHARDS)
    allowlist.check(model)
    (model / SHARDS[1]).unlink()
    refused(model, f"lacks {SHARDS[1]}")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors"])
def test_a_shard_outside_the_folder_is_refused(name, model):
    shard(model, [SHARDS[0], name])
    refused(model, "not a plain .safetensors file name")


@given(st.data())
def test_a_damaged_safetensors_file_raises_a_model_error_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    build(folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    if data.draw(st.booleans(), label="truncate"):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        refused(folder, "model.safetensors")
    else:
        at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
        file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        with contextlib.suppress(ModelError):
            allowlist.check(folder)
    shutil.rmtree(folder)
