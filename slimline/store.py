"""Where models and numbers are kept. The only file that knows MLflow.

A run of a step is an MLflow run; a sealed model is an MLflow LoggedModel, uploaded once, manifest last; its ref is
`runs:/<run id>/model`. An evaluation is an artifact of its run, `runs:/<run id>/evaluation`. Bytes are checked against
their manifest while they come from a server (fetched.py), and whenever they are read from a store of this machine.
`MLFLOW_TRACKING_URI` rules; without it the store is `slimline-store/` here: SQLite and a folder beside it. A server
that is away is asked again (retry.py); what it might have made before its answer was lost is looked for before it is
asked to make it again.
"""

# Long because it is the only file that may know MLflow, and so holds all that slimline asks of it.
from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# MLflow reads these while it is imported: no telemetry, no bars and no chatter in a step's log, and no retries of its
# own, which would repeat what must happen once (retry.py does it, and knows what may be repeated).
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where --json goes
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
import requests
import yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.credentials import get_default_host_creds

from slimline import __version__, artifact, fetched, retry, serve, transfer
from slimline.artifact import Manifest
from slimline.errors import ConfigError, DeniedError, StoreError

PREFIX = "slimline."
LIVE = "RUNNING"
PIPELINE_RUN = PREFIX + "pipeline_run"
"""The tag that ties a run here to a run of Kubeflow's."""
REQUEST = PREFIX + "request"
"""Names one request to make something, so that it is known again if the answer was lost."""


def by_key(key: str) -> str:
    """The tag under which a run or a version with this key is found.

    The key is in the tag's name: MLflow's tables have an index by name, and none by value, so that a search for
    `slimline.key = ...` would read a tag of every run there is.
    """
    return f"{PREFIX}key.{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def home() -> Path:
    """The folder of this machine's own part of the store: SQLite, artifacts, fetched copies, the promotion ledger."""
    return Path(os.environ.get("SLIMLINE_STORE", "slimline-store")).absolute()


def uri() -> str:
    """The tracking server, or the SQLite file beside the artifacts."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@lru_cache(maxsize=8)
def _client(where: str, root: Path) -> MlflowClient:
    if where.startswith("sqlite:"):
        root.mkdir(parents=True, exist_ok=True)
        # One process migrates a fresh database; the others wait: two at once leave it half made.
        with FileLock(root / "migrate.lock"):
            client = MlflowClient(where)
            client.search_experiments(max_results=1)
    else:
        ping(where)
        client = MlflowClient(where)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(where)
    if given is None:  # MLflow writes it down there, and a folder asked for next would not be looked at
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return client


def client() -> MlflowClient:
    """The connection to the store of this process. Raises StoreError when it cannot be reached.

    What a server has no answer for is asked again, except what makes something new (see `_once`).
    """
    where = uri()

    def opened() -> MlflowClient:
        try:
            return _client(where, home())
        except (MlflowException, OSError) as error:
            raise StoreError(f"the store at {where} cannot be opened: {_first_line(error)}. {HINT}") from None

    if not where.startswith("http"):
        return opened()
    if not retry.patient():  # a person waits, and may have mistyped it
        return Patient(opened())  # type: ignore[return-value]
    away = retry.again(opened, lambda e: str(e).split(". ")[0] if isinstance(e, StoreError) else "", _server())
    return Patient(away)  # type: ignore[return-value]


class Patient:
    """An MlflowClient that repeats what a server has not answered, if it may be repeated."""

    def __init__(self, made: MlflowClient) -> None:
        self.made = made

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.made, name)
        if name.startswith("create_") or name == "log_outputs" or not callable(call):
            return call
        return lambda *given, **named: retry.again(lambda: call(*given, **named), _passing, _server())


def _server() -> str:
    return f"the tracking server at {uri()}"


PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")


def _passing(error: Exception) -> str:
    """Why an error of MLflow's may go by, in a few words; nothing if it will not."""
    if not isinstance(error, MlflowException) or error.error_code not in PASSING or not uri().startswith("http"):
        return ""
    said = str(error)
    answered = re.search(r"too many (\d+) error", said)
    system = re.search(r"\[Errno \d+\] ([\w ]+)", said)
    cause = re.search(r"Read timed out|RemoteDisconnected|ConnectionResetError", said)
    if answered:
        return f"it answers {answered[1]}"
    return system[1] if system else cause[0] if cause else _first_line(error)[-160:]


def _once(make: Callable[[], Any], find: Callable[[], list[Any]], drop: Callable[[Any], Any] = lambda _: None) -> Any:
    """What `make` makes, once, though its answer may be lost: it is looked for before it is made again.

    If it is there twice all the same, for a request may come late, the first of what `find` lists stays.
    """
    tries = 0

    def attempt() -> Any:
        nonlocal tries
        tries += 1
        there = find() if tries > 1 else []
        made = there[0] if there else make()
        if tries > 1:
            first, *others = find() or [made]
            for double in others:
                drop(double)
            return first
        return made

    return retry.again(attempt, _passing, _server())


HINT = "Check MLFLOW_TRACKING_URI, or run `slimline doctor`."


def ping(where: str) -> None:
    """Raise StoreError unless a tracking server answers within five seconds."""
    if not where.startswith("http"):
        return
    try:
        with urllib.request.urlopen(f"{where.rstrip('/')}/health", timeout=5):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):  # it answered: sign-in is checked by the first real call
            return
        raise StoreError(f"the tracking server at {where} answers {error.code} {error.reason}. {HINT}") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"the tracking server at {where} cannot be reached ({_first_line(error)}). {HINT}") from None


@contextmanager
def speaking() -> Iterator[None]:
    """MLflow's own errors, said as StoreError."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED") or "error code 401" in str(error):
            raise StoreError(
                f"{_server()} does not take the sign-in of this process (401). Check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
            ) from None
        raise StoreError(f"the store at {uri()} refused: {_first_line(error)}. {HINT}") from None


# Runs


def experiment(name: str) -> str:
    """The id of an experiment, made if need be; racing makers get the same one."""
    found = client().get_experiment_by_name(name)
    if found is None:
        location = str(home() / "artifacts" / name) if uri().startswith("sqlite:") else None
        try:
            return str(
                _once(
                    lambda: client().create_experiment(name, artifact_location=location),
                    lambda: [e.experiment_id for e in [client().get_experiment_by_name(name)] if e],
                )
            )
        except MlflowException:
            found = client().get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def start_pipeline(name: str, pipeline: str, recipe: dict[str, Any], command: str) -> str:
    """The run that a pipeline run's steps hang under, with its recipe, command and environment. Returns its id.

    It is a new one on this machine, the one of this Kubeflow run on a cluster, and the one that Kubeflow's own MLflow
    plug-in has made, where it is on.
    """
    with speaking():
        tags = {PREFIX + "pipeline": pipeline, PREFIX + "command": command, **_process_tags()}
        tags = tags if joined_run() else {"mlflow.runName": name, **tags}
        if run_id := pipeline_run():
            set_tags(run_id, tags)
        else:
            run_id = _create_run(experiment(pipeline), name, tags)
        log_params(run_id, recipe)
        packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
        with tempfile.TemporaryDirectory(prefix="slimline-") as scratch:
            folder = Path(scratch)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            (folder / "environment.txt").write_text("\n".join(dict.fromkeys(packages)) + "\n", encoding="utf-8")
            _send(_artifacts(run_id), {file.name: file for file in folder.iterdir()})
        return run_id


def _create_run(experiment_id: str, name: str, tags: dict[str, str]) -> str:
    request = uuid.uuid4().hex
    asked = {**tags, REQUEST: request}

    def find() -> list[Run]:
        where = f"tags.`{REQUEST}` = '{request}'"
        return sorted(client().search_runs([experiment_id], where, max_results=10), key=lambda run: run.info.run_id)

    run = _once(
        lambda: client().create_run(experiment_id, tags=asked, run_name=name),
        find,
        lambda double: client().delete_run(double.info.run_id),
    )
    return str(run.info.run_id)


def end(run_id: str, status: str = "FINISHED") -> None:
    with speaking():
        client().set_terminated(run_id, status)


def pipeline_run() -> str:
    """The id of the run that the steps of this pipeline run hang under; "" for a step on its own.

    The launcher of this machine names it. On a cluster it is what Kubeflow's MLflow plug-in has put this step's run
    under, or else the run with the tag of this Kubeflow run, found or made.
    """
    if named := os.environ.get("SLIMLINE_PARENT_RUN", ""):
        return named
    if joined := joined_run():
        return tags(joined).get("mlflow.parentRunId", "")
    key = os.environ.get("SLIMLINE_PIPELINE_RUN", "")
    if not key:
        return ""
    parts = (os.environ.get("SLIMLINE_NAMESPACE", ""), os.environ.get("SLIMLINE_PIPELINE", "slimline"))
    return _run_of(uri(), "/".join(filter(None, parts)), key)


@lru_cache(maxsize=8)
def _run_of(where: str, experiment_name: str, key: str) -> str:
    """The run with this key. The first step of a pipeline makes it and all others wait for that; if an answer was lost
    and there are two, everybody takes the older.
    """
    with speaking():
        place = experiment(experiment_name)

        def found() -> list[Run]:
            return list(client().search_runs([place], f"tags.`{by_key(key)}` = '1'"))

        if not found():
            _create_run(place, experiment_name, {PIPELINE_RUN: key, by_key(key): "1"})
        return str(min((run.info.start_time, run.info.run_id) for run in found())[1])


def joined_run() -> str:
    """The run that Kubeflow's MLflow plug-in has made for this step in this very store; "" without one."""
    run_id = os.environ.get("MLFLOW_RUN_ID", "")
    return run_id if run_id and _is_here(uri(), run_id) else ""


@lru_cache(maxsize=8)
def _is_here(where: str, run_id: str) -> bool:
    with speaking():
        try:
            client().get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False  # the plug-in works on another server than we do
        return True


def close_pipeline(run_id: str, status: str) -> list[str]:
    """End a pipeline's run, and what was still at work under it. Returns the names of those steps.

    What Kubeflow's MLflow plug-in has made is left to it.
    """
    with speaking():
        place = client().get_run(run_id).info.experiment_id
        where = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = '{LIVE}'"
        mine = joined_run()
        lost = [run for run in client().search_runs([place], where) if run.info.run_id != mine]
        if not mine:
            for run in lost:
                client().set_terminated(run.info.run_id, "KILLED")
            client().set_terminated(run_id, status)
    return [str(run.data.tags.get(PREFIX + "technique") or run.info.run_name) for run in lost]


def page_of(run_id: str = "", name: str = "", version: int | str = "") -> str:
    """Where MLflow shows a run or a version: SLIMLINE_MLFLOW_URL, or the tracking server. "" if it has no page."""
    base = (os.environ.get("SLIMLINE_MLFLOW_URL") or uri()).rstrip("/")
    if not base.startswith("http"):
        return ""
    if name:
        return f"{base}/#/models/{name}/versions/{version}"
    with speaking():
        return f"{base}/#/experiments/{client().get_run(run_id).info.experiment_id}/runs/{run_id}"


@contextmanager
def step_run(name: str, tags: dict[str, str], config: dict[str, Any]) -> Iterator[str]:
    """A run for one step: nested under the pipeline's, or the very run that Kubeflow injected.

    Marked FINISHED at the end, FAILED on an error and KILLED on an interrupt; a run that was left RUNNING by a dead
    process of this machine is marked KILLED by the next one with the same key.
    """
    with speaking():
        joined, parent = joined_run(), pipeline_run()
        key = tags.get(PREFIX + "key", "")
        tags = {**tags, **({by_key(key): "1"} if key else {}), PREFIX + "technique": name, **_process_tags()}
        _bury_the_dead(key)
        if joined:
            run_id = joined
            set_tags(run_id, tags)
        else:
            where = client().get_run(parent).info.experiment_id if parent else experiment("slimline")
            nested = {"mlflow.parentRunId": parent} if parent else {}
            run_id = _create_run(where, name, {**nested, **{k: str(v)[:8000] for k, v in tags.items()}})
        log_params(run_id, config)
    try:
        yield run_id
    except (KeyboardInterrupt, SystemExit):
        _end_quietly(run_id, "KILLED")
        raise
    except BaseException:
        _end_quietly(run_id, "FAILED")
        raise
    if not joined:
        end(run_id)


def find_finished(key: str) -> str | None:
    """The oldest finished run of the step with this key, in any experiment."""
    with speaking():
        runs = _with_key(key, "FINISHED")
    return str(runs[0].info.run_id) if runs else None


def ended_runs(since_s: float) -> Iterator[tuple[str, float, str, dict[str, str], dict[str, float]]]:
    """Runs that ended after a time, in any experiment, the first first: id, end, status, tags, metrics."""
    with speaking():
        experiments = [e.experiment_id for e in client().search_experiments()]
    asked: dict[str, Any] = {"order_by": ["attributes.end_time ASC"], "max_results": 1000}
    where = f"attributes.end_time > {int(since_s * 1000)}"
    found = _pages(lambda **page: client().search_runs(experiments, where, **asked, **page)) if experiments else ()
    for run in found:
        info, data = run.info, run.data
        yield str(info.run_id), info.end_time / 1000, str(info.status), dict(data.tags), dict(data.metrics)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All that a search of MLflow's finds, asked for page by page. Raises StoreError."""
    token = None
    while True:
        with speaking():
            page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def note_reuse(name: str, run_id: str) -> None:
    """Write into the pipeline's run that a step was taken from an earlier one."""
    if parent := pipeline_run():
        set_tags(parent, {f"{PREFIX}reused.{name}.{run_id[:8]}": run_id})
    if joined := joined_run():  # which is this step's, and empty
        set_tags(joined, {PREFIX + "technique": name, PREFIX + "reused": run_id})


def log_params(run_id: str, params: dict[str, Any]) -> None:
    """Parameters under our own prefix, cut to what MLflow takes."""
    entries = [Param(PREFIX + key, str(value)[:6000]) for key, value in params.items()]
    with speaking():
        for at in range(0, len(entries), 100):
            client().log_batch(run_id, params=entries[at : at + 100])


def log_metrics(run_id: str, metrics: dict[str, float]) -> None:
    now = int(time.time() * 1000)
    entries = [Metric(key, float(value), now, 0) for key, value in metrics.items()]
    with speaking():
        client().log_batch(run_id, metrics=entries)


def metrics(run_id: str) -> dict[str, float]:
    with speaking():
        return {key: float(value) for key, value in client().get_run(run_id).data.metrics.items()}


def set_tags(run_id: str, tags: dict[str, str]) -> None:
    with speaking():
        client().log_batch(run_id, tags=[RunTag(key, str(value)[:8000]) for key, value in tags.items()])


def tags(run_id: str) -> dict[str, str]:
    with speaking():
        return dict(client().get_run(run_id).data.tags)


def log_data(run_id: str, path: Path, digest: str, context: str) -> None:
    """Tie a data set to a run as an MLflow dataset, by name, digest and place."""
    source = json.dumps({"uri": str(path)})
    entity = Dataset(name=path.name, digest=digest[:36], source_type="local", source=source)
    with speaking():
        client().log_inputs(run_id, datasets=[DatasetInput(entity, [InputTag("mlflow.data.context", context)])])


def log_file(run_id: str, file: Path, folder: str | None = None) -> None:
    """Keep a file among the artifacts of a run."""
    with speaking():
        _send(_artifacts(run_id), {f"{folder}/{file.name}" if folder else file.name: file})


def save_data(run_id: str, file: Path, digest: str) -> str:
    """Keep a data set with a run, and return its ref, runs:/<run id>/data/<name>: the same bytes for whoever reads."""
    with speaking():
        _send(f"{_artifacts(run_id)}/data", {file.name: file})
        set_tags(run_id, {f"{DATA}{file.name}": digest})
    return f"runs:/{run_id}/data/{file.name}"


DATA = PREFIX + "saved."
"""Of the tag that has the digest of a data set, before its file's name."""


def _saved_data(run_id: str, name: str, ref: str) -> Path:
    with speaking():
        run = _get_run(run_id, ref)
        wanted = run.data.tags.get(DATA + name, "")
        if not wanted:
            raise StoreError(f"{ref} does not resolve at {uri()}: the run keeps no such data. {HINT}")
        where = _where(f"{run.info.artifact_uri}/data")
        if where is None:
            raise StoreError(f"{ref} is in a kind of store that data cannot be read back from. Name the file itself.")
        path = where.path / name if isinstance(where, transfer.Folder) else home() / "fetched" / wanted[:24] / name
        if not isinstance(where, transfer.Folder) and not path.is_file():
            transfer.download(where, {name: (path, None)})
    if not path.is_file() or artifact.digest(path) != wanted:
        raise StoreError(f"{ref} is not what was saved: it was changed or deleted. Start the pipeline again.")
    return path


def local_artifacts(run_id: str) -> Path | None:
    """The folder of a run's artifacts if it is on this machine."""
    with speaking():
        plain = str(client().get_run(run_id).info.artifact_uri).removeprefix("file://")
    return Path(plain) if plain.startswith("/") else None


def fetch_file(run_id: str, name: str) -> Path:
    """One artifact of a run, as a local file."""
    uri_of_run = _artifacts(run_id)
    where = _where(uri_of_run)
    if isinstance(where, transfer.Folder):
        path = where.path / name
    else:
        path = home() / "fetched" / "files" / run_id / name
        try:
            if where is None:
                path = Path(client().download_artifacts(run_id, name))
            else:
                transfer.download(where, {name: (path, None)})
        except transfer.Gone:
            path.unlink(missing_ok=True)
        except MlflowException:
            path = Path()
    if not path.is_file():
        raise StoreError(
            f"run {run_id} has no {name}: it did not reach its end, or its pipeline makes none (optimize does). "
            "See what it made with `slimline show`."
        )
    return path


def _artifacts(run_id: str) -> str:
    with speaking():
        return str(client().get_run(run_id).info.artifact_uri)


# Bytes


def save(run_id: str, path: Path, manifest: Manifest) -> str:
    """Upload a sealed directory once, its manifest last, and return its ref.

    A model is READY, and so to be found, when all of it is there; one that is not is taken away again if it can be.
    """
    with speaking():
        run = client().get_run(run_id)
        names = {name: path / name for name in manifest.files}
        if manifest.format == "evaluation":
            place = f"{run.info.artifact_uri}/evaluation"
            _send(place, names)
            _send(place, {artifact.MANIFEST: path / artifact.MANIFEST})
            set_tags(run_id, {PREFIX + "digest": manifest.digest})
            return f"runs:/{run_id}/evaluation"
        model = _create_model(run.info.experiment_id, run_id, manifest)
        try:
            with tempfile.TemporaryDirectory(prefix="slimline-") as scratch:
                described = _describe(Path(scratch), model, run_id, manifest)
                _send(model.artifact_location, {f"data/model/{name}": file for name, file in names.items()} | described)
            _send(model.artifact_location, {f"data/model/{artifact.MANIFEST}": path / artifact.MANIFEST})
            client().finalize_logged_model(model.model_id, "READY")
        except BaseException:
            _discard(model)
            raise
        _once(
            lambda: client().log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)]),
            lambda: [o for o in _outputs(run_id) if o.model_id == model.model_id],
        )
        set_tags(run_id, {PREFIX + "model": model.model_id, PREFIX + "digest": manifest.digest})
        return f"runs:/{run_id}/model"


def _outputs(run_id: str) -> list[LoggedModelOutput]:
    outputs = client().get_run(run_id).outputs
    return list(outputs.model_outputs) if outputs else []


def _create_model(experiment_id: str, run_id: str, manifest: Manifest) -> LoggedModel:
    request = uuid.uuid4().hex
    named = {PREFIX + "digest": manifest.digest, REQUEST: request}

    def find() -> list[LoggedModel]:
        found = client().search_logged_models([experiment_id], f"tags.`{REQUEST}` = '{request}'")
        return sorted(found, key=lambda model: model.model_id)

    made: LoggedModel = _once(
        lambda: client().create_logged_model(experiment_id, name="model", source_run_id=run_id, tags=named),
        find,
        lambda double: client().delete_logged_model(double.model_id),
    )
    return made


def _describe(scratch: Path, model: LoggedModel, run_id: str, manifest: Manifest) -> dict[str, Path]:
    """What MLflow wants beside a model, written around an empty folder: the bytes go from where they are."""
    (scratch / "model").mkdir()
    described = Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id)
    with warnings.catch_warnings():  # that there is no input example: an example would be run to no end
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            path=str(scratch / "mlflow"),
            loader_module="slimline.serve",
            data_path=str(scratch / "model"),
            signature=signature(manifest.task),
            streamable=manifest.task == "text-generation",
            pip_requirements=[f"slimline=={__version__}"],
            mlflow_model=described,
        )
    described.model_size_bytes = manifest.size_bytes
    described.save(str(scratch / "mlflow" / "MLmodel"))
    return {file.name: file for file in (scratch / "mlflow").iterdir() if file.is_file()}


def _discard(model: LoggedModel) -> None:
    """Take a model that never became READY away, with its bytes, as well as the store answers."""
    with suppress(Exception):  # the reason why it was not finished is worth more than this
        where = _where(model.artifact_location)
        if where is not None:
            where.remove()
    with suppress(Exception):
        _client(uri(), home()).delete_logged_model(model.model_id)


def _send(place: str, files: dict[str, Path]) -> None:
    """Upload files to their names below an artifact uri."""
    where = _where(place)
    if where is not None:
        transfer.upload(where, files)
        return
    for name, file in files.items():  # a kind of store that only MLflow knows
        repository: Any = get_artifact_repository(place)
        repository.log_artifact(str(file), name.rpartition("/")[0] or None)


def _where(place: str) -> transfer.Place | None:
    """Where an artifact uri leads this process, or None if only MLflow knows."""
    return transfer.place(place, _session, uri())


def _session() -> requests.Session:
    """A session that is signed in to the tracking server as MLflow's own client is."""
    known = get_default_host_creds(uri())  # type: ignore[no-untyped-call]
    session = requests.Session()
    session.verify, session.cert = known.verify, known.client_cert_path
    if known.username and known.password:
        session.auth = (known.username, known.password)
    elif known.token:
        session.headers["Authorization"] = f"Bearer {known.token}"
    return session


def signature(task: str) -> ModelSignature:
    """What a model takes and gives, as MLflow checks it: text in; label and score, or text, out."""
    text = Schema([ColSpec(DataType.string)])  # without a name, so that a plain list of texts is taken too
    if task == "text-generation":
        known = serve.PARAMETERS.items()
        params = [ParamSpec(name, kind, value, (-1,) if value == [] else None) for name, (kind, value) in known]
        return ModelSignature(text, Schema([ColSpec(DataType.string, "generated")]), ParamSchema(params))
    return ModelSignature(text, Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")]))


def fetch(ref: str) -> Path:
    """A local, verified copy of what a ref names: a sealed directory, or a file or folder of this machine as it is."""
    if not ref:
        raise StoreError("an empty ref was given where a model or a file is needed. Name one.")
    if kept := re.fullmatch(r"runs:/(\w+)/data/([^/]+)", ref):
        return _saved_data(kept[1], kept[2], ref)
    if ref.startswith("s3://"):
        return fetched.snapshot(home() / "fetched", ref)
    if ref.startswith(("runs:", "models:")):
        with speaking():
            place, digest = _place(ref)
        path = _local(place, ref)
        if digest and artifact.read(path).digest != digest:
            raise StoreError(
                f"{ref} is not what was saved: its manifest has changed. Run the step again, or restore the files."
            )
        return path
    if "://" in ref or ref.startswith("hub:"):
        raise StoreError(
            f"{ref} cannot be fetched by this version. Give a folder, package:NAME/folder, s3://, runs:/ or models:/."
        )
    path = Path(ref).expanduser()
    if not path.exists():
        raise StoreError(
            f"{ref} does not exist in {Path.cwd()}. Give a folder, a file, package:NAME/folder, runs:/ or models:/."
        )
    if path.is_dir() and (path / artifact.MANIFEST).is_file():
        artifact.verify(path)
    return path


def _place(ref: str) -> tuple[str, str]:
    """The artifact uri behind a ref, down to the folder that holds the manifest, and the digest that was saved."""
    kind, _, rest = ref.partition(":/")
    if kind == "runs":
        run_id, _, folder = rest.strip("/").partition("/")
        run = _get_run(run_id, ref)
        if folder == "evaluation":
            return f"{run.info.artifact_uri}/evaluation", run.data.tags.get(PREFIX + "digest", "")
        model_id = run.data.tags.get(PREFIX + "model")
        if folder != "model" or not model_id:
            raise StoreError(f"{ref} does not resolve: run {run_id} has no finished model. Run the step again.")
    else:
        model_id = rest if rest.startswith("m-") else _model_id(version_of(ref), ref)
    model = client().get_logged_model(model_id)
    return f"{model.artifact_location}/data/model", model.tags.get(PREFIX + "digest", "")


def _model_id(version: ModelVersion, ref: str) -> str:
    model_id = version.model_id or str(version.source).removeprefix("models:/")
    if not model_id.startswith("m-"):
        raise StoreError(
            f"{ref} was not registered by slimline: its source is {version.source}. Bring it in with fetch.local."
        )
    return model_id


def run_id_of(ref: str) -> str:
    """The run that made what a ref names."""
    if ref.startswith("runs:/"):
        return ref.removeprefix("runs:/").split("/")[0]
    with speaking():
        if ref.startswith("models:/m-"):
            return str(client().get_logged_model(ref.removeprefix("models:/")).source_run_id)
        return str(version_of(ref).run_id)


def _get_run(run_id: str, ref: str) -> Run:
    try:
        return client().get_run(run_id)
    except MlflowException:
        raise StoreError(f"{ref} does not resolve at {uri()}: no run {run_id}. {HINT}") from None


def _local(place: str, ref: str) -> Path:
    """A checked copy on this machine: the folder itself, or what was fetched from a server."""
    where = _where(place)
    if isinstance(where, transfer.Folder):
        if not where.path.is_dir():
            raise StoreError(f"{ref} points to {where.path}, which is gone. Run the step again, or restore the folder.")
        artifact.verify(where.path)
        return where.path
    cache = home() / "fetched" / hashlib.sha256(f"{uri()} {place}".encode()).hexdigest()[:24]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):
        if where is not None:
            return fetched.copy(cache, where)
        if not (cache / "model" / artifact.MANIFEST).is_file():
            shutil.rmtree(cache, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
                got = mlflow.artifacts.download_artifacts(artifact_uri=place, dst_path=scratch)
                cache.mkdir()
                shutil.move(got, cache / "model")
        artifact.verify(cache / "model")
    return cache / "model"


def link_input(run_id: str, ref: str) -> None:
    """Draw the edge from a model to the run that read it, as MLflow shows it."""
    if ref.startswith("runs:/") and ref.endswith("/model"):
        model_id = tags(run_id_of(ref)).get(PREFIX + "model")
        if model_id:
            with speaking():
                client().log_inputs(run_id, models=[LoggedModelInput(model_id)])


# The registry


def version_of(ref: str) -> ModelVersion:
    """The registered version behind models:/name@alias or models:/name/number."""
    rest = ref.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    try:
        if at:
            return client().get_model_version_by_alias(name, alias)
        name, _, number = rest.partition("/")
        return client().get_model_version(name, number)
    except MlflowException:
        raise StoreError(f"{ref} does not resolve at {uri()}. {HINT}") from None


def register(name: str, ref: str, key: str, version_tags: dict[str, str], description: str) -> int:
    """A version of `name` for the model behind `ref`, made once per key: found again, and the lowest wins a race."""
    check_name(name)
    run_id = run_id_of(ref)
    model_id = tags(run_id)[PREFIX + "model"]
    with _permitted(name):
        found = _versions(name, key)
        if not found:
            _have_model(name)
            _once(
                lambda: client().create_model_version(
                    name,
                    source=f"models:/{model_id}",
                    run_id=run_id,
                    model_id=model_id,
                    tags={PREFIX + "key": key, by_key(key): "1", **version_tags},
                    description=description,
                ),
                lambda: _versions(name, key),
            )
            found = _versions(name, key)
        for double in found[1:]:
            client().set_model_version_tag(name, str(double), PREFIX + "duplicate_of", str(found[0]))
        return found[0]


def _have_model(name: str) -> None:
    """Make a registered model unless it is there: found out by trying, as to read one is to read all its versions."""

    def make() -> None:
        try:
            client().create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    retry.again(make, _passing, _server())


def _versions(name: str, key: str) -> list[int]:
    found = client().search_model_versions(f"name='{name}' and tags.`{by_key(key)}`='1'")
    return sorted(int(v.version) for v in found)


def versions(name: str) -> list[ModelVersion]:
    """All versions of a registered model, oldest first."""
    with speaking():
        return sorted(client().search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))


def registered() -> Iterator[tuple[str, dict[str, int]]]:
    """Every registered model but the ledgers: its name, and the version behind each alias."""
    for model in _pages(lambda **page: client().search_registered_models(max_results=100, **page)):
        if not model.name.endswith(LEDGER):
            yield model.name, {alias: int(version) for alias, version in model.aliases.items()}


def newest_version_tags(name: str, count: int = 20) -> list[dict[str, str]]:
    """The tags of a model's newest versions, the newest first."""
    with speaking():
        found = client().search_model_versions(f"name='{name}'", max_results=count, order_by=["version_number DESC"])
        return [dict(version.tags) for version in found]


def alias(name: str, which: str) -> int | None:
    """The version an alias points to, or None."""
    try:
        return int(client().get_model_version_by_alias(name, which).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise StoreError(f"the store at {uri()} refused: {_first_line(error)}. {HINT}") from None


def set_alias(name: str, which: str, version: int | None) -> None:
    """Point an alias to a version, or remove it. The champion's is moved by ledger.py alone."""
    with _permitted(name):
        if version is not None:
            client().set_registered_model_alias(name, which, str(version))
        elif alias(name, which) is not None:
            client().delete_registered_model_alias(name, which)


def unset_alias(name: str, which: str) -> None:
    """Remove an alias, if that is allowed: MLflow asks more for removing one (MANAGE) than for moving it (EDIT)."""
    with suppress(DeniedError):
        set_alias(name, which, None)


def has_version(name: str, version: int) -> bool:
    """Whether a version is there and was not deleted."""
    with speaking():
        try:
            return str(client().get_model_version(name, str(version)).status) == "READY"
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise


def tag_version(name: str, version: int, tags: dict[str, str]) -> None:
    with _permitted(name):
        for key, value in tags.items():
            client().set_model_version_tag(name, str(version), key, value)


def describe_version(name: str, version: int, description: str) -> None:
    """What MLflow's page says of a version, in Markdown; DESCRIPTION characters at most."""
    with _permitted(name):
        client().update_model_version(name, str(version), description[:DESCRIPTION])


DESCRIPTION = 5000
"""Characters of a description, and of a tag of a version, that MLflow's tables have room for."""


def fetch_again(ref: str, scratch: Path) -> Path:
    """What a ref names, read from the store itself and not from this machine's copies. Of a folder here, unverified."""
    with speaking():
        place, _ = _place(ref)
        where = _where(place)
        if isinstance(where, transfer.Folder):
            return where.path
        if where is not None:
            return fetched.copy(scratch, where)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=place, dst_path=str(scratch)))


LEDGER = ".ledger"
"""What follows a model's name in that of its ledger. No model can have it: check_name allows no dot."""


def append(name: str, tags: dict[str, str], description: str) -> None:
    """Write the next entry of a model's ledger. MLflow numbers entries as it numbers versions: no number comes twice.

    An entry is a version that has no bytes. Its source names the version it is about, and is not to be loaded.
    """
    book = name + LEDGER
    with _permitted(book):
        try:
            client().get_registered_model(book)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            with suppress(MlflowException):  # somebody else made it just now
                client().create_registered_model(
                    book, {PREFIX + "ledger_of": name},
                    f"Every move of the champion of {name}, in order. Not a model: see `slimline ledger {name}`.",
                )  # fmt: skip
        own = {PREFIX + key: value[:DESCRIPTION] for key, value in tags.items()}
        about = f"slimline:/ledger-entry/{name}/{tags.get('to') or 'none'}"  # a server takes absolute paths alone
        client().create_model_version(book, about, tags=own, description=description[:DESCRIPTION])


def entries(name: str) -> list[tuple[int, float, dict[str, str]]]:
    """A model's ledger: number, time by the clock of the database, and tags of each entry, in the order of numbers."""
    where, asked = f"name='{name}{LEDGER}'", dict[str, Any](max_results=200, order_by=["version_number ASC"])
    found = _pages(lambda **page: client().search_model_versions(where, **asked, **page))
    plain = [
        (int(v.version), v.creation_timestamp / 1000, {k.removeprefix(PREFIX): str(t) for k, t in v.tags.items()})
        for v in found
    ]
    return sorted(plain, key=lambda entry: entry[0])


def mark(name: str, number: int, tags: dict[str, str]) -> None:
    """Add to an entry of a model's ledger."""
    tag_version(name + LEDGER, number, {PREFIX + key: value for key, value in tags.items()})


@contextmanager
def _permitted(name: str) -> Iterator[None]:
    """As `speaking`, and a missing permission is said as what it is."""
    try:
        yield
    except MlflowException as error:
        if error.error_code == "PERMISSION_DENIED":
            who = os.environ.get("MLFLOW_TRACKING_USERNAME", "whoever signs in here")
            raise DeniedError(
                f"{who} may not change the registered model {name} at {uri()}. Ask for EDIT on it (docs/promotion.md)."
            ) from None
        with speaking():
            raise


def check_name(name: str) -> None:
    """Raise ConfigError for a registry name that MLflow or a file system would not take."""
    if not name or len(name) > 200 or any(c in name for c in "/:.\\%'\"`@ ") or not name.isprintable():
        raise ConfigError(f"{name!r} cannot name a registered model. Use letters, digits, - and _.")


# Small things


def _with_key(key: str, status: str) -> list[Run]:
    experiments = [e.experiment_id for e in client().search_experiments()]
    where = f"tags.`{by_key(key)}` = '1' and attributes.status = '{status}'"
    return list(client().search_runs(experiments, where, order_by=["attributes.start_time ASC"], max_results=20))


def _bury_the_dead(key: str) -> None:
    for run in _with_key(key, LIVE) if key else []:
        host, _, pid = run.data.tags.get(PREFIX + "process", "").partition(":")
        if host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            for model in client().search_logged_models([run.info.experiment_id], _made_by(run.info.run_id)):
                if model.status != LoggedModelStatus.READY:
                    _discard(model)
            _end_quietly(str(run.info.run_id), "KILLED")


def _made_by(run_id: str) -> str:
    return f"source_run_id = '{run_id}'"


def _end_quietly(run_id: str, status: str) -> None:
    with suppress(
        MlflowException, StoreError
    ):  # the reason why the step ends is worth more than this, and than waiting
        _client(uri(), home()).set_terminated(run_id, status)


def _process_tags() -> dict[str, str]:
    return {
        PREFIX + "process": f"{socket.gethostname()}:{os.getpid()}",
        PREFIX + "python": platform.python_version(),
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300]
