"""Steps in containers: each in its own image, as nobody, on a read-only root, with no network but the store's.

What kfp.local does with Docker, made safe: it lets a container remove itself and takes one that has vanished for a
success. Here a container stays until its exit code is read, and a success counts when its outputs are there.
Docker's engine is used where it answers, else Podman, which speaks the same language on a socket.
"""

# Long because what a container may see and do is one list, and each way of ending needs its own sentence.
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from slimline import recipe
from slimline.errors import ConfigError, SlimlineError, StoreError
from slimline.fetch import local

NOBODY = 10001
"""The user of the images (docker/Dockerfile), who works where the caller is root."""

LIBRARY = "/opt/library"
"""Where the images look for packages; one that a ref names is shown there."""

LAST = "finish"
"""The step that runs however the others ended."""
PASSED = ("AWS_", "MLFLOW_", "SLIMLINE_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "OMP_NUM_THREADS")
LABEL = "slimline.launcher"
POLL_S, LOOK_S = 0.25, 2.0
"""How often a container is asked whether it has ended, and what it has written."""
KILLED, REMOVAL_S = 137, 5.0
"""What a container that was killed exits with, and how long the engine may take to remove it after that."""
PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(.+)'\]\}\}")


@contextlib.contextmanager
def engine() -> Iterator[None]:
    """Within it, DOCKER_HOST names an engine that answers. Raises ConfigError if there is none to be had."""
    import docker

    def answers() -> bool:
        try:
            docker.from_env(timeout=20).ping()
        except docker.errors.DockerException:
            return False
        return True

    if answers():
        yield
        return
    podman = shutil.which("podman")
    if os.environ.get("DOCKER_HOST") or podman is None:
        where = os.environ.get("DOCKER_HOST") or "the usual socket"
        raise ConfigError(
            f"no container engine answers at {where}. Start Docker, or install podman; without --docker, neither is "
            "needed."
        )
    with tempfile.TemporaryDirectory(prefix="slimline-podman-") as folder:
        socket = f"unix://{folder}/socket"
        service = subprocess.Popen(
            [podman, "system", "service", "--time=0", socket], cwd=folder, stderr=subprocess.DEVNULL
        )
        os.environ["DOCKER_HOST"] = socket
        try:
            deadline = time.monotonic() + 20
            while not answers():
                if service.poll() is not None or time.monotonic() > deadline:
                    raise ConfigError("podman does not answer. Try `podman info`, which says what it lacks.")
                time.sleep(0.1)
            yield
        finally:
            del os.environ["DOCKER_HOST"]
            service.terminate()
            service.wait()


class Containers:
    """Runs the steps of one pipeline run, a container each, in the place of kfp's own `run_docker_container`."""

    def __init__(
        self, log: Path, environment: dict[str, str], values: dict[str, Any], spec: dict[str, Any], network: str | None
    ) -> None:
        self.log, self.exit_code = log, 0
        self.failure: SlimlineError | None = None
        self.scratch = Path(tempfile.gettempdir())
        self.home = Path(environment["SLIMLINE_STORE"])
        self.environment = {k: v for k, v in environment.items() if k.upper().startswith(PASSED)}
        self.environment |= {"HOME": "/tmp", "TMPDIR": "/tmp"}
        self.network = network or network_for(environment["MLFLOW_TRACKING_URI"])
        self.inputs = inputs(values)
        self.memory = memory_limits(spec, values)
        self.container: Any = None

    def run(self, client: Any, image: str, command: list[str], volumes: dict[str, Any], **given: Any) -> int:
        """Run one step to its end and return its exit code; what else went wrong is in `failure`."""
        step = argument(command, "--function_to_execute")
        if self.exit_code and step != LAST:
            return self.exit_code  # kfp.local goes on with what does not depend on the step that failed
        try:
            with _telling(step):
                code = self._run(client, image, step, command, volumes, **given)
        except SlimlineError as error:
            self.failure, code = self.failure or error, error.exit_code
        self.exit_code = self.exit_code or code
        return code

    def _run(
        self, client: Any, image: str, step: str, command: list[str], volumes: dict[str, Any], **given: Any
    ) -> int:
        bury_the_dead(client)
        limit = self.memory.get(step)
        with tempfile.TemporaryDirectory(dir=self.scratch, ignore_cleanup_errors=True) as folder:
            options = {
                **given,
                **self._places(Path(folder), volumes),
                **_devices(client),
                "environment": {**given.get("environment", {}), **self.environment},
                "network_mode": self.network,
                "read_only": True,
                "cap_drop": ["ALL"],
                "security_opt": ["no-new-privileges"],
                "labels": {LABEL: str(os.getpid())},
            }
            if limit:
                options |= {"mem_limit": limit, "memswap_limit": limit}
            image = present(client, image)
            try:
                self.container = client.containers.create(image, command, **options)
                return self._watch(step, limit, command)
            finally:
                self.stop()

    def _watch(self, step: str, limit: str | None, command: list[str]) -> int:
        self.container.start()
        code, written = None, 0
        with self.log.open("ab", buffering=0) as handle:
            while code is None:
                code = self._exit_code(LOOK_S)
                written += handle.write(self.container.logs()[written:])
        for_memory = self.container.attrs["State"].get("OOMKilled")
        if code == KILLED and not for_memory:  # some engines do not say; and whoever removes a container kills it first
            time.sleep(REMOVAL_S)
            self.container.reload()
        if for_memory or (code == KILLED and limit):
            asked = f"the {limit} that the pipeline asks for it" if limit else "this machine has"
            raise StoreError(
                f"step {step} was killed for memory: it needed more than {asked}. Raise its memory limit, or give it "
                "less at once (batch_size). Finished steps are reused."
            )
        if code == 0 and (lost := missing_outputs(command)):
            raise StoreError(f"step {step} ended well but left no {', '.join(lost)}. The log is {self.log}.")
        return code

    def _exit_code(self, patience_s: float) -> int | None:
        """The exit code, or nothing if the step still runs after so long.

        Asked for again and again: Podman (4.3) burns a core for whoever waits, and a log that is followed may lose its
        end, or never end where the container has already.
        """
        deadline = time.monotonic() + patience_s
        while True:
            self.container.reload()
            if self.container.status in ("exited", "stopped", "dead"):
                return int(self.container.attrs["State"]["ExitCode"])
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)

    def _places(self, scratch: Path, volumes: dict[str, Any]) -> dict[str, Any]:
        """What the step sees of this machine: its store, its scratch and, read-only, what the recipe names."""
        relabel = ",z" if any(str(volume["mode"]).endswith(",z") for volume in volumes.values()) else ""
        shown = {str(path): {"bind": bind, "mode": "ro" + relabel} for path, bind in self.inputs.items()}
        shown[str(self.home)] = {"bind": str(self.home), "mode": "rw" + relabel}
        here = Path.cwd()
        for name, bind in (("tmp", "/tmp"), ("here", str(here))):
            if name == "here" and any(Path(v["bind"]) in (here, *here.parents) for v in shown.values()):
                continue  # the working directory is there already
            (scratch / name).mkdir()
            shown[str(scratch / name)] = {"bind": bind, "mode": "rw" + relabel}
        for volume in volumes:
            Path(volume).mkdir(parents=True, exist_ok=True)  # or the engine would, as root
        options: dict[str, Any] = {"volumes": {**volumes, **shown}, "working_dir": str(here)}
        if os.getuid():
            options["user"] = f"{os.getuid()}:{os.getgid()}"
        else:
            for path in (self.home, scratch, *map(Path, volumes)):
                hand_over(path)
        return options

    def stop(self) -> None:
        """Remove the step's container, if any; a step that still runs gets time to say so in the store."""
        if self.container is None:
            return
        with contextlib.suppress(requests.exceptions.RequestException):  # gone, or the engine is: bury_the_dead
            self.container.reload()
            if self.container.status == "running":
                with contextlib.suppress(Exception):  # it may have ended by itself meanwhile
                    self.container.exec_run(["sh", "-c", "kill -TERM -1"])  # the first process is kfp's shell: it waits
                    self._exit_code(20)
            self.container.remove(force=True, v=True)
        self.container = None


@contextlib.contextmanager
def _telling(step: str) -> Iterator[None]:
    """Raise StoreError, in a sentence, for what the engine says of a step's container, or if it says no more."""
    import docker

    again = "Run the same command again: finished steps are reused."
    try:
        yield
    except docker.errors.APIError as error:
        if "no such container" in str(error).lower():  # 404 of Docker's, 500 of Podman's
            raise StoreError(f"the container of step {step} was removed by somebody while it ran. {again}") from None
        raise StoreError(f"the container of step {step} did not start: {error.explanation}.") from None
    except requests.exceptions.RequestException as error:
        raise StoreError(f"the container engine no longer answers, at step {step} ({error}). {again}") from None


def network_for(uri: str) -> str:
    """The container network that reaches a store: none for a folder, the machine's own for a server on it."""
    place = urlsplit(uri)
    if not place.scheme.startswith("http"):
        return "none"
    return "host" if place.hostname in ("localhost", "127.0.0.1", "::1") else "bridge"


def inputs(values: Any) -> dict[Path, str]:
    """The files and folders of this machine that a recipe names, at any depth, and where a container sees them."""
    if isinstance(values, dict | list | tuple):
        parts: Iterable[Any] = values.values() if isinstance(values, dict) else values
        return {path: bind for part in parts for path, bind in inputs(part).items()}
    if not isinstance(values, str) or not values:
        return {}
    if values.startswith(local.PACKAGE):
        name = values.removeprefix(local.PACKAGE).partition("/")[0]
        package = local.locate(f"{local.PACKAGE}{name}/")
        return {package: f"{LIBRARY}/{name}"}
    path = Path(values).expanduser().absolute()
    return {path: str(path)} if path.exists() else {}


def require_readable(paths: Iterable[Path]) -> None:
    """Raise ConfigError for a file that nobody but its owner may read: started by root, steps run as another user."""
    if os.getuid():
        return
    for file in (file for path in paths for file in (path, *path.rglob("*"))):
        if not file.stat().st_mode & (stat.S_IXOTH if file.is_dir() else stat.S_IROTH):
            raise ConfigError(
                f"{file} can be read by its owner alone, but started by root, containers run as user {NOBODY}. "
                f"Run `chmod -R a+rX {file}`, or start this as somebody else."
            )


def memory_limits(spec: dict[str, Any], values: dict[str, Any]) -> dict[str, str]:
    """What a compiled pipeline allows each step, by the name of its function, such as 4G."""
    limits = {}
    for step in recipe.steps(spec, values):
        container = spec["deploymentSpec"]["executors"][step.executor].get("container", {})
        resources = container.get("resources", {})
        limit = resources.get("resourceMemoryLimit") or resources.get("memoryLimit")
        if isinstance(limit, str) and (channel := PLACEHOLDER.fullmatch(limit)):
            limit = step.given[channel[1]]
        if limit:
            size = limit if isinstance(limit, str) else f"{int(limit * 1e9)}"
            limits[argument(container["args"], "--function_to_execute")] = size.removesuffix("i")
    return limits


def argument(command: list[str], name: str) -> str:
    """What follows a flag."""
    return command[command.index(name) + 1]


def missing_outputs(command: list[str]) -> list[str]:
    """The outputs that kfp's executor was asked for and did not write."""
    wanted = json.loads(argument(command, "--executor_input"))["outputs"]
    file = Path(wanted["outputFile"])
    wrote = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [name for name in wanted.get("parameters", {}) if name not in wrote.get("parameterValues", {})]


def present(client: Any, image: str) -> str:
    """The image's name, once the engine has it: on a machine with a GPU, slimline-gpu in the place of slimline-cpu."""
    import docker

    if _gpu() and "slimline-cpu" in image:
        with contextlib.suppress(docker.errors.ImageNotFound):
            return str(client.images.get(image.replace("slimline-cpu", "slimline-gpu")).id)
    with contextlib.suppress(docker.errors.ImageNotFound):
        return str(client.images.get(image).id)
    reason = _pull(client, image)
    with contextlib.suppress(docker.errors.ImageNotFound):
        return str(client.images.get(image).id)
    raise StoreError(
        f"the image {image} is not on this machine and cannot be pulled: {reason or 'no registry has it'}. "
        "Build it with `make images`, or sign in to its registry."
    )


def _pull(client: Any, image: str) -> str:
    """Why an image cannot be pulled; empty if it was. Docker says so by status, Podman in what it streams."""
    import docker

    try:
        for line in client.api.pull(image, stream=True, decode=True):
            if "error" in line:
                return str(line["error"]).strip().split("\n")[0]
    except docker.errors.APIError as error:
        return str(error.explanation or error).strip().split("\n")[0]
    return ""


def hand_over(path: Path) -> None:
    """Give what root owns below a path to the images' user; root may still do everything."""
    for name in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a journal of the database comes and goes
            if name.lstat().st_uid == 0:
                os.chown(name, NOBODY, NOBODY, follow_symlinks=False)


def bury_the_dead(client: Any) -> None:
    """Remove what a launcher left behind that was killed outright."""
    for container in client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True):
        if not Path(f"/proc/{container.labels[LABEL]}").exists():
            with contextlib.suppress(Exception):
                container.remove(force=True, v=True)


def _gpu() -> bool:
    try:
        return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def _devices(client: Any) -> dict[str, Any]:
    """All GPUs, where there are any: Docker is asked by capability, Podman by the device's name."""
    import docker

    if not _gpu():
        return {}
    if "Podman" in str(client.version()):
        return {"devices": ["nvidia.com/gpu=all"]}
    return {"device_requests": [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]}
