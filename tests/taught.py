"""A tiny teacher that knows the documents of tests/decoders.py, and a student that lost a layer: fixtures."""

import json
import shutil

import pytest

from slimline import technique
from slimline.distill import tokens
from tests.decoders import make_decoder, make_documents, seal_decoder

QUICK = {"length": 64, "batch_tokens": 512, "learning_rate": 3e-3, "kept": 8, "validation_tokens": 1024}
QUICK |= {"precision": "fp32"}


@pytest.fixture(scope="module", name="data")
def known_documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("data") / "documents.parquet", rows=600)


@pytest.fixture(scope="module", name="teacher")
def taught_teacher(tmp_path_factory, data):
    """A decoder that has learned the documents."""
    folder = tmp_path_factory.mktemp("teacher")
    fresh, taught = seal_decoder(make_decoder("llama", folder / "fresh", layers=3)), folder / "taught"
    taught.mkdir()
    options = {"data": str(data), "teacher": str(fresh), **QUICK, "kept": 1, "mixing": 0.0}
    tokens.run(fresh, taught, technique.configure(tokens, options | {"steps": 60, "learning_rate": 1e-2}))
    return seal_decoder(taught)


@pytest.fixture(scope="module", name="student")
def shortened_student(tmp_path_factory, teacher):
    """The teacher without its first layer."""
    return without_layer(teacher, tmp_path_factory.mktemp("student") / "student", 0)


def without_layer(source, out, gone):
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("manifest.json"))
    weights, kept = load_file(source / "model.safetensors"), {}
    for name, weight in weights.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) == gone:
                continue
            parts[2] = str(int(parts[2]) - (int(parts[2]) > gone))
        kept[".".join(parts)] = weight
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (out / "config.json").write_text(json.dumps(config))
    return seal_decoder(out)
