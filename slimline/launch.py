"""The client side of Kubeflow: compile a pipeline, and run a compiled one here. The only file that imports kfp.

`kfp.local` walks the pipeline; each step runs in a process of its own, forked from one server that has imported the
slow libraries once. Starting Python and importing torch, MLflow and kfp anew would cost each of twenty steps 6 s. Or it
runs in a container of its own (containers.py), as on a cluster.
"""

# Long because a run is one story: check, warm up, run, follow, and say how it ended.
from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from slimline import errors, portable, recipe, store
from slimline.containers import LAST, Containers, argument, engine, inputs, require_readable
from slimline.errors import ConfigError, SlimlineError

Event = dict[str, Any]
Watcher = Callable[[Event], None]


class Outcome(NamedTuple):
    """What a run came to: its parent run, its log, its seconds in all and inside techniques, its summary if the
    pipeline makes one, and the ref of the model that was stored last.
    """

    run_id: str
    log: Path
    seconds: float
    technique_seconds: float
    summary: Event
    ref: str


class Place(NamedTuple):
    """Where steps run: in processes of this machine, or in containers on a network that reaches the store."""

    containers: bool = False
    network: str | None = None


def run(
    pipeline: str, values: dict[str, Any], watch: Watcher, command: str | None = None, place: Place = Place()
) -> Outcome:
    """Run a compiled pipeline on this machine and return what came of it.

    The recipe is checked first; then the steps run in order, each reused if it has finished before with equal inputs.
    Raises the SlimlineError that a step ended with; everything up to that step stays finished.
    """
    file = recipe.pipeline_file(pipeline)
    compiled = portable.read(file)
    spec = compiled.spec
    values = recipe.check(spec, values)
    if "name" in values:
        store.check_name(values["name"])
    start = time.monotonic()
    name = str(spec["pipelineInfo"]["name"])
    if place.containers:
        require_readable(inputs(values))
    else:
        _warm_up()
    store.client()
    run_id = store.start_pipeline(f"{name} {values.get('name', '')}".strip(), name, values, command or _command())
    if "margin" in values:  # the limits are fixed before anything is measured
        store.set_tags(run_id, {store.PREFIX + "limits": recipe.limits(values).digest()})
    folder = store.home() / "runs" / run_id
    folder.mkdir(parents=True)
    log, events = folder / "log.txt", folder / "events.jsonl"
    events.touch()
    steps = [step for step in recipe.steps(spec, values) if step.name not in ("begin", LAST)]
    watch({"event": "run", "run_id": run_id, "log": str(log), "steps": len(steps)})
    for text in portable.notes(compiled, place.containers) if pipeline not in recipe.pipelines() else ():
        watch({"event": "note", "text": text})
    environment = {
        **os.environ, "SLIMLINE_PARENT_RUN": run_id, "SLIMLINE_PROGRESS": str(events),
        "MLFLOW_TRACKING_URI": store.uri(), "SLIMLINE_STORE": str(store.home()), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    worker: Worker | Containers = Worker(log, environment)
    if place.containers:
        worker = Containers(log, environment, values, spec, place.network)
    status = "FAILED"
    seen: list[Event] = []

    def note(event: Event) -> None:
        seen.append(event)
        watch(event)

    try:
        with following(events, note):
            _execute(for_one_machine(spec, folder / "pipeline.yaml"), values, folder, worker)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    except RuntimeError as error:
        raise worker.failure or _reason(seen, log, worker.exit_code, error) from None
    finally:
        store.end(run_id, status)
    summary = next((event for event in reversed(seen) if event["event"] == "summary"), {})
    inside = sum(event.get("seconds", 0.0) for event in seen if event["event"] == "end")
    ref = next((event["ref"] for event in reversed(seen) if event.get("ref")), "")
    return Outcome(run_id, log, time.monotonic() - start, inside, summary, ref)


def compile(pipeline: str, out: Path, images: Path | None = None, cache: str = "") -> None:
    """Write a compiled pipeline: from its Python source if `pipeline` is a .py file, else the one that comes along.

    `images` is what `make images` wrote: the steps then name the images that were built, by digest where it is known.
    `cache` is a PersistentVolumeClaim that every step mounts.

    Raises ConfigError for a pipeline that would not mean the same here and on a cluster (portable.py).
    """
    if pipeline.endswith(".py"):
        _compile_source(pipeline, out)
    else:
        shutil.copyfile(recipe.pipeline_file(pipeline), out)
    try:
        if images is not None:
            out.write_text(portable.with_images(out.read_text(encoding="utf-8"), images, pipeline), encoding="utf-8")
        if cache:
            out.write_text(portable.with_cache(out.read_text(encoding="utf-8"), cache), encoding="utf-8")
        portable.require(portable.read(out), pipeline)
    except ConfigError:
        out.unlink()
        raise


def for_one_machine(spec: dict[str, Any], out: Path) -> Path:
    """The pipeline as kfp.local is to run it: a step that failed here would fail again, after a pause."""
    whole = copy.deepcopy(spec)
    for dag in (whole["root"], *whole["components"].values()):
        for task in dag.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    out.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return out


def _compile_source(pipeline: str, out: Path) -> None:
    if not Path(pipeline).is_file():
        raise ConfigError(f"{pipeline} does not exist. Give a pipeline's name or its .py file.")
    root = str(Path(pipeline).resolve().parent.parent)
    out.unlink(missing_ok=True)
    kfp = [sys.executable, "-c", "from kfp.cli.__main__ import main; main()", "dsl", "compile"]
    made = subprocess.run(
        [*kfp, "--disable-execution-caching-by-default", "--py", pipeline, "--output", str(out)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    if made.returncode or not out.is_file():
        last = (made.stderr.strip() or made.stdout.strip()).split("\n")[-1]
        raise ConfigError(f"{pipeline} does not compile: {last}")


def _execute(file: Path, values: dict[str, Any], folder: Path, worker: Worker | Containers) -> None:
    try:
        from kfp import components, local
        from kfp.local import docker_task_handler, subprocess_task_handler
    except ImportError:
        raise ConfigError("running a pipeline needs kfp. Install it with `pip install 'slimline[launch]'`.") from None

    runner: Any
    ready: contextlib.AbstractContextManager[None]
    if isinstance(worker, Containers):
        runner, handler, name, ready = local.DockerRunner(), docker_task_handler, "run_docker_container", engine()
    else:
        runner = local.SubprocessRunner(use_venv=False)
        handler, name, ready = subprocess_task_handler, "run_local_subprocess", contextlib.nullcontext()
    with (
        ready,
        worker.log.open("a", encoding="utf-8") as handle,
        tempfile.TemporaryDirectory(prefix="slimline-", ignore_cleanup_errors=True) as scratch,
    ):
        worker.scratch = Path(scratch)
        local.init(runner, pipeline_root=str(folder / "kfp"), workspace_root=scratch, raise_on_error=True)
        plain = getattr(handler, name)
        setattr(handler, name, worker.run)
        try:
            with contextlib.redirect_stdout(handle), contextlib.redirect_stderr(handle):
                components.load_component_from_file(str(file))(**values)
        finally:
            setattr(handler, name, plain)
            worker.stop()


def _warm_up() -> None:
    """Start the server that steps are forked from; it imports while this process opens the store."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["slimline._warm"])
    forkserver.ensure_running()


class Worker:
    """Runs the command of a lightweight component in a process forked from a server that has the libraries loaded."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log, self.environment, self.scratch = log, environment, Path(tempfile.gettempdir())
        self.exit_code, self.failure = 0, None
        self.context = multiprocessing.get_context("forkserver")
        self.process: Any = None

    def run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Kfp's own `sh -ec <script> <source> <arguments>`, without the shell. Returns the exit code."""
        from kfp.dsl import component_factory

        script = next(i for i, part in enumerate(full_command) if component_factory.EXECUTOR_MODULE in part)
        source, arguments = full_command[script + 1], full_command[script + 2 :]
        if self.exit_code and argument(arguments, "--function_to_execute") != LAST:
            return self.exit_code  # kfp.local goes on with what does not depend on the step that failed
        module = Path(tempfile.mkdtemp(dir=self.scratch)) / "ephemeral_component.py"
        module.write_text(source, encoding="utf-8")
        argv = ["executor", "--component_module_path", str(module), *arguments]
        environment = {**(env_vars or {}), **self.environment, "_KFP_RUNTIME": "true"}
        self.process = self.context.Process(target=_task, args=(argv, environment, str(self.log)))
        self.process.start()
        self.process.join()
        code = int(self.process.exitcode)
        self.exit_code = self.exit_code or code
        return code

    def stop(self) -> None:
        """End the step that still runs, if any, and give it time to say so in the store."""
        if self.process is not None and self.process.is_alive():
            self.process.terminate()
            self.process.join(20)
            self.process.kill()


def _task(argv: list[str], environment: dict[str, str], log: str) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM: a step does not outlive a killed run
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = argv
    from kfp.dsl import executor_main

    executor_main.executor_main()


@contextlib.contextmanager
def following(file: Path, tell: Callable[[Event], Any]) -> Iterator[None]:
    """Hand every event to `tell` as it is written, and all that are left at the end."""
    stop = threading.Event()

    def follow() -> None:
        with file.open(encoding="utf-8") as handle:
            part = ""
            while True:
                last = stop.is_set()
                for line in handle:
                    part += line
                    if part.endswith("\n"):
                        tell(json.loads(part))
                        part = ""
                if last:
                    return
                stop.wait(0.2)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _reason(seen: list[Event], log: Path, exit_code: int, error: Exception) -> SlimlineError:
    since: list[Event] = []
    for event in seen:
        since = [event] if event["event"] == "start" else [*since, event]
    told = next((event for event in since if event["event"] == "error"), None)
    where = f"step {since[0]['step']}" if since and "step" in since[0] else "the pipeline"
    if told and told["kind"] != "SlimlineError":
        return errors.by_name(told["kind"], told["message"])
    if told:
        return SlimlineError(f"{told['message']}. The log is {log}.")
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return errors.StoreError(
            f"{where} was ended by {name} (out of memory?). Run the same command again: finished steps are reused. "
            f"The log is {log}."
        )
    return SlimlineError(f"{where} failed unexpectedly: {str(error)[:200]} The log is {log}.")


def _command() -> str:
    return shlex.join(["slimline", *sys.argv[1:]])
