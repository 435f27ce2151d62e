"""Fixtures for all tests: stores.py has stores, servers.py real servers, tiny.py models, kubeflow.py a cluster."""

import os

# Before anything imports torch, which looks once: tiny tensors gain nothing from a second thread, and lose much when
# something else has the processor. Tests say the same everywhere: what a GPU makes of techniques is make gpu-check's.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
from hypothesis import settings

from tests.servers import (  # noqa: F401
    postgres,
    proxied_server,
    proxied_store,
    remote_store,
    s3_server,
    tracking_server,
)
from tests.stores import fresh_store, migrated  # noqa: F401
from tests.tiny import make_data, make_tiny, seal_tiny

settings.register_profile("untimed", deadline=None)  # a test asserts nothing about time
settings.load_profile("untimed")


@pytest.fixture
def tiny_bert(tmp_path):
    """A sealed BERT classifier with two labels and three layers."""
    return seal_tiny(make_tiny("bert", tmp_path / "tiny_bert"))


@pytest.fixture
def tiny_encoder(tmp_path):
    """A sealed bare BERT encoder, without a head."""
    from slimline import artifact

    folder = make_tiny("bert", tmp_path / "tiny_encoder", head=False)
    artifact.seal(folder, format="hf", task="", labels=(), base="made for a test")
    return folder


@pytest.fixture
def tiny_data(tmp_path):
    """480 texts of uneven length that can be learned, split already."""
    return make_data(tmp_path / "tiny.parquet")


@pytest.fixture
def kubeflow():
    """A Kubeflow for one team, which answers over HTTP and holds every request to the published description."""
    from tests.kubeflow import Kubeflow

    with Kubeflow() as standing:
        yield standing
    assert standing.wrong == []


@pytest.fixture
def cluster(kubeflow):
    """A client of it that gives up soon."""
    from tests.kubeflow import client

    return client(kubeflow)


def pytest_collection_modifyitems(items):
    """The longest file comes first: begun last, it would keep one worker busy while the other has nothing left."""
    items.sort(key=lambda item: item.path.name != "test_launch.py")
