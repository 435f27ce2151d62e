"""Move files to and from where MLflow keeps artifacts: several at once, in parts, and checked on their way.

Three kinds of place: a folder; a bucket that this process has credentials for (boto3, in parts of 16 MB); a tracking
server that stands before the bucket, which either signs urls for the parts or passes the bytes through. The sha256 of
a file is taken while it arrives, so nothing is read twice; it comes under another name and gets its own when the digest
is right: what has its name is whole. A file that fails is tried again alone (retry.py). Memory is a few parts, whatever
the file's size.
"""

# Long because the three places must keep the same promises: whole or not there, tried again, one sentence.
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from slimline import retry
from slimline.artifact import File
from slimline.errors import ConfigError, StoreError

PART_BYTES = 16 * 2**20
AT_ONCE = 8
CONNECT_S, READ_S = 10, 30
"""A server that says nothing for that long is taken for gone."""
EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired", "InvalidToken", "ExpiredTokenException")
REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403", "401")


class Damaged(Exception):
    """A file did not arrive as it was sealed."""


class Passing(Exception):
    """A failure that may go by, with its reason."""


class Gone(StoreError):
    """There is no such file at that place."""


class Sink:
    """A file that is being written: hashed as it grows, under a name of its own until it is whole."""

    def __init__(self, path: Path, wanted: File | None) -> None:
        self.path, self.wanted = path, wanted
        self.part = path.with_name(f".{path.name}.part")
        self.part.parent.mkdir(parents=True, exist_ok=True)
        self.handle = self.part.open("wb")
        self.sha256, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.handle.write(data)

    def finish(self) -> None:
        """Give the file its name. Raises Damaged if it is not what was wanted."""
        self.handle.close()
        found = File(size_bytes=self.size, sha256=self.sha256.hexdigest())
        if self.wanted is not None and found != self.wanted:
            self.part.unlink()
            raise Damaged(f"{self.path.name} arrived with {found.size_bytes} bytes and another digest than was sealed")
        self.part.replace(self.path)

    def drop(self) -> None:
        self.handle.close()
        self.part.unlink(missing_ok=True)


class Place(Protocol):
    """Where files go and come from. Both calls try every file and return what went wrong, by name."""

    name: str

    def send(self, files: dict[str, Path]) -> dict[str, Exception]: ...

    def receive(self, files: dict[str, Sink]) -> dict[str, Exception]: ...

    def remove(self) -> None:
        """Delete everything below this place, in one try."""

    def passing(self, error: Exception, tries: int) -> str:
        """The reason if the error may go by, else an empty text. Raises StoreError if it is known to stay."""
        ...


def place(uri: str, session: Callable[[], Any], server: str) -> Place | None:
    """The place behind an artifact uri, or None if it is of a kind that only MLflow knows.

    `session` opens a requests.Session that is signed in to the tracking server.
    """
    scheme = urlsplit(uri).scheme
    if uri.startswith("/"):
        return Folder(Path(uri))
    if scheme == "file":
        return Folder(Path(unquote(urlsplit(uri).path)))
    if scheme == "s3":
        return Bucket(uri)
    if scheme == "mlflow-artifacts":
        return Proxied(uri, session(), server)
    return None


def upload(to: Place, files: dict[str, Path]) -> None:
    """Send files to their names; those that fail again, until the limit. Raises StoreError."""
    left, tries = dict(files), 0

    def some() -> None:
        nonlocal tries
        tries += 1
        failed = to.send(left)
        for name in [name for name in left if name not in failed]:
            del left[name]
        _raise_worst(failed, to, tries)

    retry.again(some, _reason, to.name)


def download(come_from: Place, files: dict[str, tuple[Path, File | None]]) -> None:
    """Fetch files to their paths, each checked against its digest while it arrives. Raises StoreError."""
    left, damaged, tries = dict(files), set[str](), 0

    def some() -> None:
        nonlocal tries
        tries += 1
        sinks = {name: Sink(*wanted) for name, wanted in left.items()}
        try:
            failed = come_from.receive(sinks)
            for name in [name for name in sinks if name not in failed]:
                try:
                    sinks[name].finish()
                    del left[name]
                except Damaged as error:
                    failed[name] = error
        finally:
            for sink in sinks.values():
                sink.drop()
        for name in [name for name, error in failed.items() if isinstance(error, Damaged)]:
            if name in damaged:  # twice: it lies there like that
                raise StoreError(
                    f"{come_from.name}/{name} has changed since it was sealed. Run the step again, or restore the file."
                )
            damaged.add(name)
        _raise_worst(failed, come_from, tries)

    retry.again(some, _reason, come_from.name)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Passing) else ""


def _raise_worst(failed: dict[str, Exception], where: Place, tries: int) -> None:
    """Raise one of the errors, first one that will not go by."""
    reasons = []
    for error in failed.values():
        reason = str(error) if isinstance(error, Damaged) else where.passing(error, tries)
        if not reason:
            raise error
        reasons.append(reason)
    if reasons:
        raise Passing(reasons[0])


def versions(of: Bucket) -> dict[str, str]:
    """What `Bucket.versions` says, asked again while the bucket is away. Raises StoreError."""

    def ask() -> dict[str, str]:
        try:
            return of.versions()
        except Exception as error:
            _raise_worst({of.name: error}, of, 3)
            raise

    return retry.again(ask, _reason, of.name)


def safe(name: str) -> str:
    """A file's name inside a model directory. Raises StoreError for one that would lead out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise StoreError(
            f"{name!r} in a manifest leads out of its folder, so nothing of it is fetched. Run the step again."
        )
    return name


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def send(self, files: dict[str, Path]) -> dict[str, Exception]:
        for name, source in files.items():
            goal = self.path / name
            goal.parent.mkdir(parents=True, exist_ok=True)
            part = goal.with_name(f".{goal.name}.part")
            shutil.copyfile(source, part)
            part.replace(goal)
        return {}

    def receive(self, files: dict[str, Sink]) -> dict[str, Exception]:
        for name, sink in files.items():
            with (self.path / name).open("rb") as handle:
                shutil.copyfileobj(handle, sink, PART_BYTES)
        return {}

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def passing(self, error: Exception, tries: int) -> str:
        return ""


class Bucket:
    """A prefix of an S3 bucket, with the settings that MLflow's own client reads from the environment."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.name, self.bucket, self.prefix = uri, parts.netloc, parts.path.strip("/")
        self.endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL") or "S3"
        owner = os.environ.get("MLFLOW_S3_EXPECTED_BUCKET_OWNER")
        self.owner = {"ExpectedBucketOwner": owner} if owner else {}
        self.extra = {**self.owner, **json.loads(os.environ.get("MLFLOW_S3_UPLOAD_EXTRA_ARGS") or "{}")}

    def send(self, files: dict[str, Path]) -> dict[str, Exception]:
        with self._manager() as manager:
            started = {
                name: manager.upload(str(path), self.bucket, self._key(name), extra_args=self.extra)
                for name, path in files.items()
            }
            return _outcomes(started)

    def receive(self, files: dict[str, Sink]) -> dict[str, Exception]:
        # To something that cannot seek, s3transfer writes parts in their order, whenever they arrive.
        with self._manager() as manager:
            started = {
                name: manager.download(self.bucket, self._key(name), sink, extra_args=self.owner)
                for name, sink in files.items()
            }
            return _outcomes(started)

    def versions(self) -> dict[str, str]:
        """Every file below this prefix and the entity tag of its bytes, or one file, named "", if it is one itself."""
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        found = {entry["Key"]: str(entry["ETag"]) for page in pages for entry in page.get("Contents", [])}
        if self.prefix in found:
            return {"": found[self.prefix]}
        below = f"{self.prefix}/" if self.prefix else ""
        return {key.removeprefix(below): tag for key, tag in found.items() if key.startswith(below) and key[-1] != "/"}

    def passing(self, error: Exception, tries: int) -> str:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3UploadFailedError

        if isinstance(error, ClientError):
            return self._passing_answer(error, tries)
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            raise StoreError(
                f"there are no credentials for {self.name}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
                "this process a role."
            ) from None
        failed = (RetriesExceededError, S3DownloadFailedError, S3UploadFailedError)
        known = (*failed, BotoCoreError, Boto3Error, ConnectionError, TimeoutError)
        return _first_line(error) if isinstance(error, known) else ""

    def _passing_answer(self, error: Any, tries: int) -> str:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in EXPIRED and tries < 3:  # whoever renews them may have done so: they are read anew
            return f"its credentials have expired ({code})"
        if code in (*EXPIRED, *REFUSED):
            raise StoreError(
                f"{self.name} refuses the credentials of this process ({code}). Renew them and run the same command "
                "again: finished steps are kept."
            ) from None
        if code == "RequestTimeTooSkewed":
            raise StoreError(f"the clock of this machine is too far from that of {self.endpoint}. Set it.") from None
        if code == "NoSuchBucket":
            raise StoreError(
                f"the bucket {self.bucket} does not exist at {self.endpoint}. Have it made, or give the tracking "
                "server another place for artifacts."
            ) from None
        if code in ("NoSuchKey", "404"):
            raise Gone(f"{self.name} has no such file: it was deleted. Run the step again, or restore it.") from None
        return f"{code} {status}" if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout") else ""

    def remove(self) -> None:
        client = self._client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key("")):
            keys = [{"Key": found["Key"]} for found in page.get("Contents", [])]
            if keys:
                client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})

    @contextlib.contextmanager
    def _manager(self) -> Iterator[Any]:
        client = self._client()
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        config = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=AT_ONCE,
            num_download_attempts=3, io_chunksize=2**20,
        )  # fmt: skip
        try:
            with create_transfer_manager(client, config) as manager:
                yield manager
        finally:
            client.close()

    def _client(self) -> Any:
        """A client in a session of its own: threads share none, and credentials renewed in their file are read anew."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise ConfigError(f"{self.name} needs boto3. Install it with `pip install 'slimline[s3]'`.") from None
        return boto3.session.Session().client(
            "s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
            verify=False if os.environ.get("MLFLOW_S3_IGNORE_TLS", "").lower() in ("true", "1") else None,
            config=Config(
                retries={"mode": "standard", "max_attempts": 3}, connect_timeout=CONNECT_S, read_timeout=READ_S,
                max_pool_connections=2 * AT_ONCE, tcp_keepalive=True,
                s3={"addressing_style": os.environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE") or "auto"},
            ),
        )  # fmt: skip

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"


class Proxied:
    """The artifacts of a tracking server, over its HTTP; parts go straight to the bucket if it signs urls."""

    def __init__(self, uri: str, session: Any, server: str) -> None:
        self.name, self.session, self.plain = uri, session, _plain_session()
        self.api = f"{server.rstrip('/')}/api/2.0/mlflow-artifacts"
        self.prefix = urlsplit(uri).path.strip("/")
        self.signs = True

    def send(self, files: dict[str, Path]) -> dict[str, Exception]:
        return self._each(self._send, files)

    def receive(self, files: dict[str, Sink]) -> dict[str, Exception]:
        return self._each(self._receive, files)

    def remove(self) -> None:
        self._ask("DELETE", f"artifacts/{quote(self.prefix)}")

    def passing(self, error: Exception, tries: int) -> str:
        import requests

        if not isinstance(error, requests.RequestException | ConnectionError | TimeoutError):
            return ""
        status = error.response.status_code if isinstance(error, requests.HTTPError) else 0
        if status in (401, 403):
            raise StoreError(
                f"{self.name} is refused ({status}). Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and "
                "run the same command again: finished steps are kept."
            ) from None
        if status == 404:
            raise Gone(f"{self.name} has no such file: it was deleted. Run the step again, or restore it.") from None
        return _first_line(error) if status == 0 or status >= 500 or status == 429 else ""

    def _each(self, move: Callable[[str, Any, Any], None], files: dict[str, Any]) -> dict[str, Exception]:
        with ThreadPoolExecutor(AT_ONCE) as parts, ThreadPoolExecutor(4) as pool:
            return _outcomes({name: pool.submit(move, name, item, parts) for name, item in files.items()})

    def _send(self, name: str, source: Path, parts: ThreadPoolExecutor) -> None:
        size = source.stat().st_size
        if size <= PART_BYTES or not self._send_parts(name, source, size, parts):
            with source.open("rb") as handle:  # no bytes at all must be sent as such: requests would make them chunks
                body = handle if size else b""
                self._ask("PUT", f"artifacts/{self._path(name)}", data=body, timeout=(CONNECT_S, 10 * READ_S))

    def _send_parts(self, name: str, source: Path, size: int, parts: ThreadPoolExecutor) -> bool:
        """Send a file in parts by signed urls; False if this server signs none."""
        part = max(PART_BYTES, -(-size // 10_000))
        folder, _, file = self._path(name).rpartition("/")
        count = -(-size // part)
        answer = self.session.post(
            f"{self.api}/mpu/create/{folder}", json={"path": file, "num_parts": count}, timeout=(CONNECT_S, READ_S)
        )
        if answer.status_code in (404, 501) or "not supported" in answer.text[:500]:
            return False
        answer.raise_for_status()
        begun = answer.json()
        known = {"path": file, "upload_id": begun["upload_id"]}
        try:
            sent = [
                parts.submit(self._send_part, signed, source, part)
                for signed in sorted(begun["credentials"], key=lambda c: int(c["part_number"]))
            ]
            done = [future.result() for future in sent]
            self._ask("POST", f"mpu/complete/{folder}", json={**known, "parts": done}, timeout=(CONNECT_S, 4 * READ_S))
        except BaseException:
            with contextlib.suppress(Exception):
                self._ask("POST", f"mpu/abort/{folder}", json=known)
            raise
        return True

    def _send_part(self, signed: dict[str, Any], source: Path, part: int) -> dict[str, Any]:
        number = int(signed["part_number"])
        with source.open("rb") as handle:
            handle.seek((number - 1) * part)
            data = handle.read(part)
        answer = self.plain.put(signed["url"], data=data, headers=signed.get("headers"), timeout=(CONNECT_S, READ_S))
        answer.raise_for_status()
        return {"part_number": number, "etag": answer.headers.get("ETag", ""), "url": signed["url"]}

    def _receive(self, name: str, sink: Sink, parts: ThreadPoolExecutor) -> None:
        size = sink.wanted.size_bytes if sink.wanted else 0
        if size > PART_BYTES and self.signs:
            answer = self.session.get(f"{self.api}/presigned/{self._path(name)}", timeout=(CONNECT_S, READ_S))
            if answer.ok:
                signed = answer.json()
                ranges = [(at, min(at + PART_BYTES, size) - 1) for at in range(0, size, PART_BYTES)]
                for data in _in_order(parts, lambda span: self._span(signed, *span), ranges):
                    sink.write(data)
                return
            self.signs = answer.status_code not in (404, 405, 501)
            if self.signs:
                answer.raise_for_status()
        with self._ask("GET", f"artifacts/{self._path(name)}", stream=True) as answer:
            for data in answer.iter_content(2**20):
                sink.write(data)

    def _span(self, signed: dict[str, Any], first: int, last: int) -> bytes:
        """The bytes of a file from first to last. Raises ConnectionError if fewer came."""
        headers = {**(signed.get("headers") or {}), "Range": f"bytes={first}-{last}"}
        answer = self.plain.get(signed["url"], headers=headers, timeout=(CONNECT_S, READ_S))
        answer.raise_for_status()
        data: bytes = answer.content
        if len(data) != last - first + 1:
            raise ConnectionError(f"{len(data)} of {last - first + 1} bytes came")
        return data

    def _ask(self, method: str, path: str, **given: Any) -> Any:
        answer = self.session.request(method, f"{self.api}/{path}", **{"timeout": (CONNECT_S, READ_S), **given})
        answer.raise_for_status()
        return answer

    def _path(self, name: str) -> str:
        return quote(f"{self.prefix}/{name}")


def _plain_session() -> Any:
    """For signed urls: it carries nothing of the tracking server's sign-in, and tries each request three times."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    tries = Retry(3, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None, backoff_factor=0.3)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=2 * AT_ONCE, max_retries=tries))
    session.verify = os.environ.get("MLFLOW_S3_IGNORE_TLS", "").lower() not in ("true", "1")
    return session


def _in_order(pool: ThreadPoolExecutor, call: Callable[[Any], bytes], items: list[Any]) -> Iterator[bytes]:
    """Results in the order of the items, no more than AT_ONCE of them under way or waiting."""
    ahead: deque[Future[bytes]] = deque()
    for item in items:
        if len(ahead) == AT_ONCE:
            yield ahead.popleft().result()
        ahead.append(pool.submit(call, item))
    while ahead:
        yield ahead.popleft().result()


def _outcomes(started: dict[str, Any]) -> dict[str, Exception]:
    failed: dict[str, Exception] = {}
    for name, future in started.items():
        try:
            future.result()
        except Exception as error:
            failed[name] = error
    return failed


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}".rstrip(
        ": "
    )
