"""Packed weights are read as compressed-tensors means them; what is not read is refused."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimline import hf, packed
from slimline.errors import ConfigError, ModelError
from slimline.quantize import llmcompressor
from tests.tiny import make_data, make_tiny


def settings(bits=4, **changed):
    groups = {"group_0": {"weights": {"num_bits": bits, "symmetric": True, **changed}}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def pack(numbers_RC, bits):
    """The words of numbers in [-2^(bits-1), 2^(bits-1)), by the format's definition, one number at a time."""
    each = 32 // bits
    words = []
    for row in numbers_RC:
        padded = [*row, *[-(2 ** (bits - 1))] * (-len(row) % each)]
        line = []
        for at in range(0, len(padded), each):
            word = sum((n + 2 ** (bits - 1)) << (bits * i) for i, n in enumerate(padded[at : at + each]))
            line.append(word - 2**32 if word >= 2**31 else word)
        words.append(line)
    return torch.tensor(words, dtype=torch.int32)


def matrix(numbers_RC, scale_RG, bits):
    return {
        "a.weight_packed": pack(numbers_RC, bits),
        "a.weight_scale": torch.tensor(scale_RG),
        "a.weight_shape": torch.tensor([len(numbers_RC), len(numbers_RC[0])]),
    }


def test_a_matrix_worked_by_hand():
    weights = {
        "a.weight_packed": torch.tensor([[0xF798]], dtype=torch.int32),
        "a.weight_scale": torch.tensor([[0.5, 2.0]]),
        "a.weight_shape": torch.tensor([1, 4]),
        "a.bias": torch.tensor([3.0]),
    }
    found = packed.unpack(weights, settings(), "here")
    assert sorted(found) == ["a.bias", "a.weight"]
    assert found["a.weight"].tolist() == [[0.0, 0.5, -2.0, 14.0]]  # 8-8, 9-8 by 0.5; 7-8, 15-8 by 2


@given(data=st.data(), bits=st.sampled_from([4, 8]), rows=st.integers(1, 3), groups=st.integers(1, 3))
def test_every_number_comes_back_times_its_scale(data, bits, rows, groups):
    size = data.draw(st.integers(1, 6))
    number = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    row = st.lists(number, min_size=size * groups, max_size=size * groups)
    numbers = data.draw(st.lists(row, min_size=rows, max_size=rows))
    scales = [[2.0 ** -(r + g) for g in range(groups)] for r in range(rows)]
    found = packed.unpack(matrix(numbers, scales, bits), settings(bits), "here")["a.weight"]
    wanted = [[n * scales[r][c // size] for c, n in enumerate(line)] for r, line in enumerate(numbers)]
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    "form",
    [{"quant_method": "gptq"}, settings(bits=9), settings() | {"format": "nvfp4-pack-quantized"}],
)
def test_another_form_is_refused_with_its_name(form):
    with pytest.raises(ModelError, match="folder is quantized already"):
        packed.unpack({}, form, "folder")


def test_a_packed_model_answers_as_the_floats_it_stands_for_and_is_saved_as_floats(tmp_path):
    """8 bits, one scale a row: a tiny BERT whose rounded twin is saved both ways."""
    source = make_tiny("bert", tmp_path / "source")
    weights, whole = load_file(source / "model.safetensors"), {}
    for name, value in list(weights.items()):
        if "encoder.layer" in name and value.ndim == 2:
            scale_R1 = value.abs().amax(dim=1, keepdim=True) / 127
            numbers = (value / scale_R1).round().int()
            stem = name.removesuffix(".weight")
            whole |= {f"{stem}.{k.removeprefix('a.')}": v for k, v in matrix(numbers.tolist(), [[0.0]], 8).items()}
            whole[f"{stem}.weight_scale"] = scale_R1
            weights[name] = numbers * scale_R1
        else:
            whole[name] = value
    save_file({k: v.contiguous() for k, v in weights.items()}, source / "model.safetensors")
    twin = make_tiny("bert", tmp_path / "packed")
    save_file({k: v.contiguous() for k, v in whole.items()}, twin / "model.safetensors")
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"quantization_config": settings(8)}))

    texts = ["a fine film", "dull", "the plot is very long and cold"]
    tokenizer = hf.tokenizer(source, 64)
    read = hf.load(twin)
    assert (hf.logits(read, tokenizer, texts) == hf.logits(hf.load(source), tokenizer, texts)).all()
    (tmp_path / "saved").mkdir()
    hf.save(read, twin, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (hf.logits(hf.load(tmp_path / "saved"), tokenizer, texts) == hf.logits(read, tokenizer, texts)).all()


def test_groups_that_do_not_fill_a_matrix_are_named_with_a_size_that_does(tmp_path):
    model = hf.load(make_tiny("bert", tmp_path / "m", width=24))
    with pytest.raises(ConfigError, match=r"group_size 32 does not divide the 24 columns of bert.encoder.layer.0") as e:
        llmcompressor.quantizable(model, 32)
    assert str(e.value).endswith("Ask for group_size=24.")
    assert len(llmcompressor.quantizable(model, 24)) == 3 * 6  # query, key, value, mixed, up and down of each layer


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_layers_are_found_whatever_the_encoder_around_them_is_called(family, tmp_path):
    model = hf.load(make_tiny(family, tmp_path / "m"))
    pattern = re.compile(llmcompressor.target(model).removeprefix("re:"))
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    found = [name for name in linear if pattern.match(name)]
    assert found == llmcompressor.quantizable(model, 8) and len(found) == 18
    assert all(pattern.match(f"bert.{name.partition('.')[2]}") for name in found)


def test_without_the_library_the_image_that_has_it_is_named(tmp_path):
    out = tmp_path / "out"
    config = llmcompressor.Config(data=str(make_data(tmp_path / "data.parquet")))
    with pytest.raises(ConfigError, match=r"not here \(llmcompressor.*image slimline-llm"):
        llmcompressor.run(make_tiny("bert", tmp_path / "m"), out, config)
    assert not out.exists()
