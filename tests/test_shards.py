"""Shards: what is written is safetensors to everybody, whole or not there, and an index that lies is not believed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimline import allowlist
from slimline.errors import ModelError
from slimline.shards import DTYPES, Weights, Writer
from tests.decoders import make_decoder
from tests.test_decoder import shard


@pytest.fixture
def sharded(tmp_path):
    """A decoder in three shards."""
    folder = make_decoder("llama", tmp_path / "llama")
    shard(folder)
    return folder


def index(folder):
    return json.loads((folder / allowlist.INDEX).read_text())


def test_the_index_places_every_tensor_and_says_how_many_bytes(sharded, tmp_path):
    whole = load_file(make_decoder("llama", tmp_path / "again") / "model.safetensors")
    found = index(sharded)
    assert found["weight_map"].keys() == whole.keys()
    assert found["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    weights = Weights(sharded)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_is_what_safetensors_makes_of_it(name, tmp_path):
    dtype = getattr(torch, name.removeprefix("torch."))
    tensors = {"matrix": torch.arange(6).reshape(2, 3).to(dtype), "byte": torch.tensor([7], dtype=torch.uint8)}
    tensors |= {"scalar": torch.tensor(1).to(dtype), "turned": torch.arange(6).reshape(2, 3).to(dtype).T}
    Writer(tmp_path, 1).write(0, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[key].float(), value.float()) for key, value in tensors.items())
    assert all(found[key].dtype == value.dtype for key, value in tensors.items())
    assert allowlist.tensors(tmp_path).keys() == tensors.keys()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "theirs.safetensors").stat().st_size == (tmp_path / "model.safetensors").stat().st_size


def test_a_tensor_is_rounded_to_its_type_while_it_is_written(tmp_path):
    tensor = torch.tensor([1.00390625, 3.0])  # 1 + 2^-8, which bfloat16 has not
    Writer(tmp_path, 1).write(0, {"a": tensor, "b": tensor}, {"a": torch.bfloat16})
    found = load_file(tmp_path / "model.safetensors")
    assert found["a"].dtype == torch.bfloat16 and found["a"].tolist() == [1.0, 3.0]
    assert found["b"].dtype == torch.float32 and found["b"].tolist() == tensor.tolist()


def test_what_is_to_be_remembered_lies_in_the_shard_and_bothers_nobody(tmp_path):
    writer = Writer(tmp_path, 2)
    writer.write(1, {"a": torch.ones(2)}, numbers={"error": 0.1})
    assert writer.numbers(1) == {"error": 0.1}
    with safe_open(str(writer.file(1)), framework="pt") as part:
        assert part.metadata()["format"] == "pt" and part.get_tensor("a").tolist() == [1, 1]


def test_a_part_is_finished_only_when_it_is_whole(tmp_path):
    writer = Writer(tmp_path, 2)
    writer.write(0, {"a": torch.ones(1000)})
    assert [writer.finished(i) for i in range(2)] == [True, False]
    whole = writer.file(0).read_bytes()
    writer.file(0).write_bytes(whole[:-1])
    assert not writer.finished(0)
    writer.write(0, {"a": torch.ones(1000)})
    assert writer.finished(0) and writer.file(0).read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == [writer.file(0).name]


def test_a_matrix_is_not_read_before_it_is_asked_for(tmp_path):
    code = (
        "import re, sys\nfrom pathlib import Path\nimport torch\nfrom safetensors.torch import save_file\n"
        "from slimline.shards import Weights, Writer\nhere = Path(sys.argv[1])\n"
        "def own():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text()).group(1)) // 1024\n"
        "save_file({'a': torch.ones(32, 1 << 20, dtype=torch.bfloat16)}, here / 'model.safetensors')\n"
        "(here / 'out').mkdir()\n"
        "before = own()\nweights = Weights(here)\nraw = weights.raw('a')\nopened = own() - before\n"
        "Writer(here / 'out', 1).write(0, {'a': raw})\nprint(opened, own() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    opened, written = map(int, done.stdout.split())
    assert opened < 8 and written < 8, "64 MiB of weights, passed through as they are mapped"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1 << 26


def test_a_shard_that_is_missing_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00003.safetensors, which .*index.json names. Copy all"):
        Weights(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    with pytest.raises(ModelError, match=rf"00002-of-00003.safetensors holds '{name}', which .* places elsewhere"):
        Weights(sharded)


def test_an_index_that_swaps_two_shards_is_refused(sharded):
    found = index(sharded)
    names = list(found["weight_map"])
    one, other = names[0], next(n for n in names if found["weight_map"][n] != found["weight_map"][names[0]])
    placed = found["weight_map"] | {one: found["weight_map"][other], other: found["weight_map"][one]}
    (sharded / allowlist.INDEX).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ModelError, match=r"which model.safetensors.index.json places elsewhere. Copy both again"):
        Weights(sharded)


def test_an_index_that_promises_a_tensor_nobody_holds_is_refused(sharded):
    found = index(sharded)
    found["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    (sharded / allowlist.INDEX).write_text(json.dumps(found))
    with pytest.raises(ModelError, match=r"names 'model.layers.9.mlp.up_proj.weight', which no shard holds"):
        Weights(sharded)
