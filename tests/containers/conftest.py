"""A container engine for the whole session: Docker's, or Podman's service. The images come from `make images`."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from slimline import containers

ROOT = Path(__file__).parent.parent.parent
IMAGES = json.loads((ROOT / "build" / "images.json").read_text())
KINDS = ("cpu", "language", "tensorrt", "llm", "mlflow")
CPU, LANGUAGE, TENSORRT, LLM, MLFLOW = (IMAGES[f"slimline-{name}:0.1.0"] for name in KINDS)


@pytest.fixture(scope="session")
def client():
    import docker

    with containers.engine():
        yield docker.from_env(timeout=120)


@pytest.fixture
def inside(client):
    """Runs a command in an image as a step would be run, and returns what it printed."""

    def run(image, *command, **options):
        import docker

        name, *arguments = command
        plain = {"read_only": True, "network_mode": "none"}
        container = client.containers.create(image, arguments, entrypoint=[name], **{**plain, **options})
        try:
            container.start()
            code = container.wait()["StatusCode"]
            said = container.logs()  # afterwards: Podman may lose the end of what is followed
        finally:
            container.remove(force=True, v=True)
        if code:
            raise docker.errors.ContainerError(container, code, command, image, said)
        return said.decode()

    return run


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with a tiny model, data and a recipe of seconds, which the images' user may read."""
    from tests.stores import VARIABLES
    from tests.test_launch import parameters

    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLIMLINE_STORE", str(tmp_path / "slimline-store"))
    monkeypatch.chdir(tmp_path)
    values = parameters(tmp_path)
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path)], check=True)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)  # pytest's own folders are their owner's alone
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def slimline(*arguments, cwd, **options):
    """The command line, as a user types it."""
    command = [sys.executable, "-m", "slimline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, **options)


@pytest.fixture
def tracking_server(client, tmp_path_factory):
    """The mlflow image on a network of its own, from which nothing else can be reached. Yields (uri, network)."""
    import docker

    name = "slimline-test-store"
    for old in client.networks.list(names=[name]):
        old.remove()
    network = client.networks.create(name, internal=True)
    kept = ["--backend-store-uri", "sqlite:////tmp/mlflow.db", "--artifacts-destination", "/tmp/artifacts"]
    options = {"detach": True, "read_only": True, "network": name, "tmpfs": {"/tmp": "mode=1777"}}
    server = client.containers.run(MLFLOW, [*kept, "--workers", "1", "--allowed-hosts", "*"], **options)
    try:
        server.reload()
        address = server.attrs["NetworkSettings"]["Networks"][name]["IPAddress"]
        uri = f"http://{address}:5000"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(server.logs().decode()[-2000:])
        yield uri, name
    finally:
        server.remove(force=True, v=True)
        try:
            network.remove()
        except docker.errors.APIError as error:
            pytest.fail(f"a step is still on the network: {error}")
