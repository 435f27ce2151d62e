"""Two pipelines at once, each step in a container, on MLflow with sign-in, PostgreSQL and S3, all of them real."""

import pytest

from tests.test_remote import (  # noqa: F401
    test_nothing_is_left_half_done_and_every_object_in_the_bucket_belongs_to_something,
    test_two_pipelines_at_once_each_end_with_the_champion_that_one_alone_would_make,
    two_at_once,
)


@pytest.fixture(scope="module")
def world(client, tmp_path_factory, postgres, s3_server):
    folder = tmp_path_factory.mktemp("remote")
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # pytest's own folders are their owner's alone
    with two_at_once(folder, postgres, s3_server, "--docker") as made:
        yield made
