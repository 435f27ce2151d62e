import hashlib
import json

import pytest

from slimline import artifact
from slimline.errors import ModelError, StoreError
from tests.stores import sealed


@pytest.fixture
def model(tmp_path):
    sealed(tmp_path / "model")
    return tmp_path / "model"


def test_a_sealed_directory_is_verified_and_says_its_size(model):
    manifest = artifact.verify(model)
    assert manifest.weights_bytes == (model / "model.safetensors").stat().st_size
    assert manifest.size_bytes == manifest.weights_bytes + (model / "config.json").stat().st_size
    assert manifest == artifact.read(model)


def test_the_digest_is_sha256_over_sorted_names_and_digests(tmp_path):
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    lines = "".join(f"{n}\0{hashlib.sha256(v).hexdigest()}\n" for n, v in (("a", b"1"), ("b", b"2")))
    assert artifact.digest(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_directory_without_a_manifest_is_unfinished(tmp_path):
    with pytest.raises(ModelError, match="did not finish"):
        artifact.read(tmp_path)


@pytest.mark.parametrize("position", [0, 10, -1])
def test_a_changed_byte_is_refused_and_the_file_named(model, position):
    file = model / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[position] ^= 1
    file.write_bytes(bytes(whole))
    with pytest.raises(StoreError, match=r"model\.safetensors has changed"):
        artifact.verify(model)


def test_a_truncated_a_missing_and_an_added_file_are_refused(model):
    (model / "extra.txt").write_text("x")
    with pytest.raises(StoreError, match=r"extra\.txt was added"):
        artifact.verify(model)
    (model / "extra.txt").unlink()
    (model / "config.json").unlink()
    with pytest.raises(StoreError, match=r"config\.json is missing"):
        artifact.verify(model)


def test_two_files_that_changed_places_are_refused(model):
    one, two = model / "config.json", model / "model.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(StoreError, match="has changed"):
        artifact.verify(model)


def test_a_symbolic_link_is_refused_although_the_bytes_are_right(model, tmp_path):
    (model / "config.json").rename(tmp_path / "elsewhere.json")
    (model / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(StoreError, match="symbolic link"):
        artifact.verify(model)


def test_a_manifest_that_was_edited_to_fit_other_bytes_is_refused(model):
    (model / "config.json").write_text("{}")
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["files"]["config.json"] = {
        "size_bytes": 2,
        "sha256": hashlib.sha256(b"{}").hexdigest(),
    }
    (model / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="does not match its own files"):
        artifact.verify(model)


def test_a_manifest_that_is_not_json_is_said_to_be_none(model):
    (model / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="not a manifest"):
        artifact.read(model)
