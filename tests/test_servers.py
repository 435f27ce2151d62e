"""The servers that other tests lean on are what they are said to be."""

import urllib.error
import urllib.request

import pytest

from slimline import artifact, store
from tests.stores import saved


def test_a_model_goes_to_the_bucket_and_comes_back_through_a_server_with_sign_in(remote_store, tmp_path):
    ref = saved(tmp_path)
    assert artifact.verify(store.fetch(ref)).digest == artifact.digest(tmp_path / "model")
    model_id = store.tags(store.run_id_of(ref))["slimline.model"]
    names = [key for key in remote_store.s3.keys(remote_store.bucket) if model_id in key]
    assert {name.rpartition("/")[2] for name in names} >= {"MLmodel", "manifest.json", "model.safetensors"}


def test_the_server_lets_nobody_in_without_a_password(tracking_server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{tracking_server.uri}/api/2.0/mlflow/experiments/search?max_results=1")
    assert refused.value.code == 401


def test_a_bucket_that_was_not_made_is_not_made_by_writing_to_it(s3_server):
    with pytest.raises(s3_server.client().exceptions.NoSuchBucket):
        s3_server.client().put_object(Bucket="nobody-made-it", Key="a", Body=b"a")
