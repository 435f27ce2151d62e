"""Moving bytes to and from a real S3 store and a real tracking server, on good days and bad ones."""

import hashlib
import random
import threading

import pytest

from slimline import transfer
from slimline.artifact import File
from slimline.errors import StoreError
from tests.faults import ENDLESS, Fault, Faults
from tests.servers import PASSWORD, USER

SMALL, LARGE = b"a small file\n" * 50, random.Random(0).randbytes(3 * transfer.PART_BYTES + 12_345)


def described(data: bytes) -> File:
    return File(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture(scope="module")
def bucket(s3_server):
    return s3_server.bucket("transfer")


@pytest.fixture
def s3(s3_server, bucket, monkeypatch, tmp_path):
    """A bucket behind a proxy that spoils things, and a folder of two files, one of them in several parts."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "20")
    (tmp_path / "small").write_bytes(SMALL)
    (tmp_path / "large").write_bytes(LARGE)
    with Faults(s3_server.port) as proxy:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def here(s3, bucket, tmp_path):
    return transfer.Bucket(f"s3://{bucket}/{tmp_path.name}")


def sent(tmp_path):
    return {"deep/small": tmp_path / "small", "large": tmp_path / "large"}


def fetched(here, folder):
    wanted = {
        "deep/small": (folder / "deep" / "small", described(SMALL)),
        "large": (folder / "large", described(LARGE)),
    }
    transfer.download(here, wanted)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BOTH = {"deep/small": SMALL, "large": LARGE}


def test_files_of_one_part_and_of_several_come_back_as_they_were(s3, here, tmp_path):
    transfer.upload(here, sent(tmp_path))
    assert s3.seen("PUT .*partNumber=4") == 1
    assert fetched(here, tmp_path / "back") == BOTH
    assert s3.seen("GET .*/large") == 4


SENDING = {
    "503 SlowDown": Fault("503", "PUT .*partNumber=2", times=4, code="SlowDown"),
    "a connection that is closed": Fault("refuse", "PUT .*small", times=2),
    "an answer that is lost": Fault("lose", "POST .*uploadId", times=1),
    "503 when a part upload begins": Fault("503", "POST .*uploads", times=2, code="ServiceUnavailable"),
}


@pytest.mark.parametrize("what", SENDING)
def test_an_upload_that_is_disturbed_arrives_whole(s3, here, tmp_path, what):
    s3.add(SENDING[what])
    transfer.upload(here, sent(tmp_path))
    assert s3.faults[0].times == 0
    assert fetched(here, tmp_path / "back") == BOTH


COMING = {
    "503 SlowDown": Fault("503", "GET .*large", times=4, code="SlowDown"),
    "a body that is cut short": Fault("cut", "GET .*large", times=2, at=100_000),
    "a small body that is cut short": Fault("cut", "GET .*small", times=2, at=100),
    "a byte that is turned over": Fault("damage", "GET .*small"),
    "a store that stalls in the middle": Fault("stall", "GET .*large", at=200_000, seconds=3),
}


@pytest.mark.parametrize("what", COMING)
def test_a_download_that_is_disturbed_arrives_whole(s3, here, tmp_path, monkeypatch, what):
    monkeypatch.setattr(transfer, "READ_S", 1)
    transfer.upload(here, sent(tmp_path))
    s3.add(COMING[what])
    assert fetched(here, tmp_path / "back") == BOTH
    assert s3.faults[0].times == 0


def test_what_is_not_what_was_sealed_is_refused_and_nothing_of_it_is_left(s3, here, tmp_path):
    transfer.upload(here, sent(tmp_path))
    wrong = described(SMALL[:-1] + b"!")
    with pytest.raises(StoreError, match=r"deep/small has changed since it was sealed"):
        transfer.download(here, {"deep/small": (tmp_path / "back" / "small", wrong)})
    assert list((tmp_path / "back").iterdir()) == []


def test_a_store_that_stays_away_ends_in_one_sentence_after_the_limit(s3, here, tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "2")
    s3.add(Fault("503", "PUT", times=ENDLESS, code="SlowDown"))
    with pytest.raises(
        StoreError, match=r"s3://transfer/.* did not answer as it should for 2 s \(.*SlowDown.*same com"
    ):
        transfer.upload(here, {"small": tmp_path / "small"})


def test_files_that_have_arrived_are_not_fetched_again_for_one_that_has_not(s3, here, tmp_path):
    transfer.upload(here, sent(tmp_path))
    before = s3.seen("GET .*large")
    s3.add(Fault("cut", "GET .*small", times=5, at=10))
    assert fetched(here, tmp_path / "back") == BOTH
    assert s3.seen("GET .*large") == before + 4


def test_credentials_that_expire_in_the_middle_are_said_and_what_arrived_stays(s3, here, tmp_path):
    s3.add(Fault("403", "PUT", times=ENDLESS, spare=1, code="ExpiredToken"))
    with pytest.raises(StoreError, match=r"refuses the credentials of this process \(ExpiredToken\). Renew them"):
        transfer.upload(here, {"a": tmp_path / "small", "b": tmp_path / "small", "c": tmp_path / "small"})


def test_credentials_that_are_renewed_meanwhile_are_taken(s3, here, tmp_path):
    s3.add(Fault("403", "PUT", code="ExpiredToken"))
    transfer.upload(here, sent(tmp_path))
    assert fetched(here, tmp_path / "back") == BOTH


def test_a_bucket_that_does_not_exist_is_said_at_once(s3, tmp_path):
    with pytest.raises(StoreError, match=r"the bucket nobody-made-it does not exist at http://127"):
        transfer.upload(transfer.Bucket("s3://nobody-made-it/a"), {"small": tmp_path / "small"})


def test_a_wrong_key_is_said_at_once(s3, here, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StoreError, match=r"refuses the credentials of this process \(SignatureDoesNotMatch\)"):
        transfer.upload(here, {"small": tmp_path / "small"})


def test_a_place_can_be_emptied_and_its_neighbour_stays(s3, here, bucket, s3_server, tmp_path):
    transfer.upload(here, {"small": tmp_path / "small"})
    neighbour = transfer.Bucket(f"{here.name}-next")
    transfer.upload(neighbour, {"small": tmp_path / "small"})
    here.remove()
    assert list(s3_server.keys(bucket, here.prefix)) == [f"{neighbour.prefix}/small"]


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../out", "..", "a\\b", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(name):
    with pytest.raises(StoreError, match="leads out of its folder"):
        transfer.safe(name)


@pytest.fixture
def proxied(proxied_server, monkeypatch, tmp_path):
    """Artifacts behind a tracking server that is itself behind a proxy that spoils things."""
    import requests

    session = requests.Session()
    session.auth = (USER, PASSWORD)
    monkeypatch.setenv("SLIMLINE_RETRY_SECONDS", "20")
    (tmp_path / "small").write_bytes(SMALL)
    (tmp_path / "large").write_bytes(LARGE)
    with Faults(proxied_server.port) as proxy:
        yield proxy, transfer.Proxied(f"mlflow-artifacts:/{tmp_path.name}", session, proxy.url)


def test_through_the_server_large_files_go_straight_to_the_bucket(proxied, tmp_path):
    proxy, here = proxied
    transfer.upload(here, sent(tmp_path))
    assert (proxy.seen("PUT"), proxy.seen("mpu/create"), proxy.seen("mpu/complete")) == (1, 1, 1)
    assert fetched(here, tmp_path / "back") == BOTH
    assert (proxy.seen("GET .*/artifacts/"), proxy.seen("GET .*/presigned/")) == (1, 1)


def test_a_server_that_signs_nothing_passes_the_bytes_on_itself(proxied, tmp_path):
    proxy, here = proxied
    proxy.add(Fault("501", "mpu/create|presigned", times=ENDLESS))
    transfer.upload(here, sent(tmp_path))
    assert fetched(here, tmp_path / "back") == BOTH
    assert proxy.seen("GET .*/artifacts/") == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("503", "PUT .*small", times=2),
        Fault("lose", "mpu/complete"),
        Fault("refuse", "mpu/create"),
        Fault("cut", "GET .*small", times=2, at=100),
        Fault("503", "GET .*presigned"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.match}",
)
def test_a_server_in_between_that_is_disturbed_does_it_in_the_end(proxied, tmp_path, fault):
    proxy, here = proxied
    proxy.add(fault)
    transfer.upload(here, sent(tmp_path))
    assert fetched(here, tmp_path / "back") == BOTH
    assert proxy.faults[0].times == 0


def test_parts_come_in_order_and_only_a_few_are_held():
    from concurrent.futures import ThreadPoolExecutor

    under_way, most, lock = 0, 0, threading.Lock()

    def part(number):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        return bytes([number])

    with ThreadPoolExecutor(16) as pool:
        got = []
        for data in transfer._in_order(pool, part, list(range(100))):
            got.append(data)
            with lock:
                under_way -= 1
    assert b"".join(got) == bytes(range(100))
    assert most <= transfer.AT_ONCE
