"""A real SQLite store for each test, copied from one that was migrated once."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from slimline import artifact, store

WEIGHTS = b"not really weights, but bytes to keep"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """A store that MLflow has made its tables in: 3 s, once for all tests."""
    home = tmp_path_factory.mktemp("migrated") / "slimline-store"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("SLIMLINE_STORE", str(home))
        store.client()
    return home


VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SLIMLINE_PARENT_RUN", "SLIMLINE_PROGRESS")
"""Of the surroundings, which would lead a test to another store."""


@contextmanager
def standing_in(folder: Path):
    """Work in a folder, with a store of its own below it, for as long as a module's tests need it."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        patch.setenv("SLIMLINE_STORE", str(folder / "slimline-store"))
        patch.chdir(folder)
        yield folder


@pytest.fixture
def fresh_store(migrated, tmp_path, monkeypatch) -> Path:
    """An empty store in the test's own folder, which is also the working directory."""
    home = tmp_path / "slimline-store"
    shutil.copytree(migrated, home)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLIMLINE_STORE", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def sealed(folder: Path, weights: bytes = WEIGHTS, format: str = "hf") -> artifact.Manifest:
    """A sealed directory that is enough for a store, which never looks inside."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "negative", "1": "positive"}}))
    (folder / "model.safetensors").write_bytes(weights)
    return artifact.seal(
        folder, format=format, task="text-classification", labels=("negative", "positive"), base="made here"
    )


def saved(folder: Path, key: str = "", weights: bytes = WEIGHTS) -> str:
    """The ref of a sealed directory that a finished step has saved."""
    manifest = sealed(folder / "model", weights)
    with store.step_run("made", {store.PREFIX + "key": key}, {}) as run_id:
        return store.save(run_id, folder / "model", manifest)
