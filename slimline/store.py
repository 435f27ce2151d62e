"""Where models and numbers are kept. The only file that knows MLflow.

A run of a step is an MLflow run; a sealed model is an MLflow LoggedModel, uploaded once, manifest last; its ref is
`runs:/<run id>/model`. An evaluation is an artifact of its run, `runs:/<run id>/evaluation`. Bytes are checked against
their manifest whenever they are read. `MLFLOW_TRACKING_URI` rules; without it the store is `slimline-store/` here:
SQLite and a folder beside it.
"""

# Long because it is the only file that may know MLflow, and so holds all that slimline asks of it.
from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# MLflow reads these while it is imported: no telemetry, no bars and no chatter in a step's log, bounded retries.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where --json goes
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from slimline import __version__, artifact, serve
from slimline.artifact import Manifest
from slimline.errors import ConfigError, DeniedError, StoreError

PREFIX = "slimline."
LIVE = "RUNNING"


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
    """The connection to the store of this process. Raises StoreError when it cannot be reached."""
    try:
        return _client(uri(), home())
    except (MlflowException, OSError) as error:
        raise StoreError(f"the store at {uri()} cannot be opened: {_first_line(error)}. {HINT}") from None


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
        raise StoreError(f"the store at {uri()} refused: {_first_line(error)}. {HINT}") from None


# Runs


def experiment(name: str) -> str:
    """The id of an experiment, made if need be; racing makers get the same one."""
    found = client().get_experiment_by_name(name)
    if found is None:
        location = str(home() / "artifacts" / name) if uri().startswith("sqlite:") else None
        try:
            return str(client().create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client().get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def start_pipeline(name: str, experiment_name: str, recipe: dict[str, Any], command: str) -> str:
    """A parent run for a pipeline run, with its recipe, command and environment as artifacts. Returns its id."""
    with speaking():
        tags = {
            "mlflow.runName": name,
            PREFIX + "pipeline": experiment_name,
            PREFIX + "command": command,
            **_process_tags(),
        }
        run = client().create_run(experiment(experiment_name), tags=tags, run_name=name)
        run_id = str(run.info.run_id)
        log_params(run_id, recipe)
        client().log_dict(run_id, recipe, "recipe.yaml")
        packages = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
        client().log_text(run_id, "\n".join(dict.fromkeys(packages)) + "\n", "environment.txt")
        return run_id


def end(run_id: str, status: str = "FINISHED") -> None:
    with speaking():
        client().set_terminated(run_id, status)


@contextmanager
def step_run(name: str, tags: dict[str, str], config: dict[str, Any]) -> Iterator[str]:
    """A run for one step: nested under the pipeline's, or the very run that Kubeflow injected.

    Marked FINISHED at the end, FAILED on an error and KILLED on an interrupt; a run that was left RUNNING by a dead
    process of this machine is marked KILLED by the next one with the same key.
    """
    parent = os.environ.get("SLIMLINE_PARENT_RUN", "")
    with speaking():
        joined = os.environ.get("MLFLOW_RUN_ID", "")
        if joined:
            run_id = joined
        else:
            where = client().get_run(parent).info.experiment_id if parent else experiment("slimline")
            nested = {"mlflow.parentRunId": parent} if parent else {}
            run_id = str(client().create_run(where, tags=nested, run_name=name).info.run_id)
        _bury_the_dead(tags.get(PREFIX + "key", ""))
        set_tags(run_id, {**tags, PREFIX + "technique": name, **_process_tags()})
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


def note_reuse(name: str, run_id: str) -> None:
    """Write into the pipeline's run that a step was taken from an earlier one."""
    parent = os.environ.get("SLIMLINE_PARENT_RUN", "")
    if parent:
        set_tags(parent, {f"{PREFIX}reused.{name}.{run_id[:8]}": run_id})


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
    with speaking():
        client().log_artifact(run_id, str(file), folder)


def local_artifacts(run_id: str) -> Path | None:
    """The folder of a run's artifacts if it is on this machine."""
    with speaking():
        plain = str(client().get_run(run_id).info.artifact_uri).removeprefix("file://")
    return Path(plain) if plain.startswith("/") else None


def fetch_file(run_id: str, name: str) -> Path:
    """One artifact of a run, as a local file."""
    folder = local_artifacts(run_id)
    try:
        path = folder / name if folder else Path(client().download_artifacts(run_id, name))
    except MlflowException:
        path = None
    if path is None or not path.is_file():
        raise StoreError(
            f"run {run_id} has no {name}: it did not reach its end, or its pipeline makes none (optimize does). "
            "See what it made with `slimline show`."
        )
    return path


# Bytes


def save(run_id: str, path: Path, manifest: Manifest) -> str:
    """Upload a sealed directory once, its manifest last, and return its ref."""
    with speaking():
        if manifest.format == "evaluation":
            _upload(path, lambda folder, sub: client().log_artifacts(run_id, folder, sub), "evaluation")
            return f"runs:/{run_id}/evaluation"
        experiment_id = client().get_run(run_id).info.experiment_id
        model = client().create_logged_model(
            experiment_id, name="model", source_run_id=run_id, tags={PREFIX + "digest": manifest.digest}
        )
        with tempfile.TemporaryDirectory(prefix="slimline-") as scratch:
            folder = Path(scratch) / "mlflow"
            with warnings.catch_warnings():  # that there is no input example: an example would be run to no end
                warnings.simplefilter("ignore")
                mlflow.pyfunc.save_model(
                    path=str(folder),
                    loader_module="slimline.serve",
                    data_path=str(path),
                    signature=signature(manifest.task),
                    streamable=manifest.task == "text-generation",
                    pip_requirements=[f"slimline=={__version__}"],
                    mlflow_model=Model(artifact_path=model.artifact_location, run_id=run_id, model_id=model.model_id),
                )
            inner = next((folder / "data").iterdir())
            if inner.name != "model":
                raise StoreError(f"{path} must be a folder named 'model' to be saved.")
            _upload(folder, lambda f, sub: client().log_model_artifacts(model.model_id, f, sub or None), "", inner)
        client().finalize_logged_model(model.model_id, "READY")
        client().log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        set_tags(run_id, {PREFIX + "model": model.model_id, PREFIX + "digest": manifest.digest})
        return f"runs:/{run_id}/model"


def signature(task: str) -> ModelSignature:
    """What a model takes and gives, as MLflow checks it: text in; label and score, or text, out."""
    text = Schema([ColSpec(DataType.string)])  # without a name, so that a plain list of texts is taken too
    if task == "text-generation":
        known = serve.PARAMETERS.items()
        params = [ParamSpec(name, kind, value, (-1,) if value == [] else None) for name, (kind, value) in known]
        return ModelSignature(text, Schema([ColSpec(DataType.string, "generated")]), ParamSchema(params))
    return ModelSignature(text, Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score")]))


def _upload(folder: Path, put: Any, sub: str, inner: Path | None = None) -> None:
    manifest = (inner or folder) / artifact.MANIFEST
    with tempfile.TemporaryDirectory(prefix="slimline-") as aside:
        last = Path(aside) / artifact.MANIFEST
        if inner is None:  # the caller's own folder: leave it as it is
            copy = Path(aside) / "tree"
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(artifact.MANIFEST))
            shutil.copy2(manifest, last)
            put(str(copy), sub)
            shutil.rmtree(copy)
        else:
            shutil.move(manifest, last)
            put(str(folder), sub)
        put(aside, sub if inner is None else "/".join(filter(None, (sub, f"data/{inner.name}"))))


def fetch(ref: str) -> Path:
    """A local, verified copy of what a ref names: a sealed directory, or a file or folder of this machine as it is."""
    if not ref:
        raise StoreError("an empty ref was given where a model or a file is needed. Name one.")
    if ref.startswith(("runs:", "models:")):
        with speaking():
            place = _place(ref)
        path = _local(place, ref)
        artifact.verify(path)
        return path
    if "://" in ref or ref.startswith("hub:"):
        raise StoreError(
            f"{ref} cannot be fetched by this version. Give a folder, package:NAME/folder, runs:/ or models:/."
        )
    path = Path(ref).expanduser()
    if not path.exists():
        raise StoreError(
            f"{ref} does not exist in {Path.cwd()}. Give a folder, a file, package:NAME/folder, runs:/ or models:/."
        )
    if path.is_dir() and (path / artifact.MANIFEST).is_file():
        artifact.verify(path)
    return path


def _place(ref: str) -> str:
    """The artifact uri behind a ref, down to the folder that holds the manifest."""
    kind, _, rest = ref.partition(":/")
    if kind == "runs":
        run_id, _, folder = rest.strip("/").partition("/")
        run = _get_run(run_id, ref)
        if folder == "evaluation":
            return f"{run.info.artifact_uri}/evaluation"
        model_id = run.data.tags.get(PREFIX + "model")
        if folder != "model" or not model_id:
            raise StoreError(f"{ref} does not resolve: run {run_id} has no finished model. Run the step again.")
        return f"{client().get_logged_model(model_id).artifact_location}/data/model"
    model_id = rest if rest.startswith("m-") else _model_id(version_of(ref), ref)
    return f"{client().get_logged_model(model_id).artifact_location}/data/model"


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
    plain = place.removeprefix("file://")
    if plain.startswith("/"):
        if not Path(plain).is_dir():
            raise StoreError(f"{ref} points to {plain}, which is gone. Run the step again, or restore the folder.")
        return Path(plain)
    cache = home() / "fetched" / hashlib.sha256(f"{uri()} {place}".encode()).hexdigest()[:24]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):
        if not (cache / "model" / artifact.MANIFEST).is_file():
            shutil.rmtree(cache, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
                got = mlflow.artifacts.download_artifacts(artifact_uri=place, dst_path=scratch)
                cache.mkdir()
                shutil.move(got, cache / "model")
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
        try:
            client().get_registered_model(name)
        except MlflowException:
            try:
                client().create_registered_model(name)
            except MlflowException:
                client().get_registered_model(name)  # somebody else made it just now
        if not _versions(name, key):
            client().create_model_version(
                name,
                source=f"models:/{model_id}",
                run_id=run_id,
                model_id=model_id,
                tags={PREFIX + "key": key, **version_tags},
                description=description,
            )
        found = _versions(name, key)
        for double in found[1:]:
            client().set_model_version_tag(name, str(double), PREFIX + "duplicate_of", str(found[0]))
        return found[0]


def _versions(name: str, key: str) -> list[int]:
    found = client().search_model_versions(f"name='{name}' and tags.`{PREFIX}key`='{key}'")
    return sorted(int(v.version) for v in found)


def versions(name: str) -> list[ModelVersion]:
    """All versions of a registered model, oldest first."""
    with speaking():
        return sorted(client().search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))


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
    """What a ref names, read from the store itself and not from this machine's copies. It is not verified."""
    with speaking():
        place = _place(ref)
        if place.removeprefix("file://").startswith("/"):
            return _local(place, ref)
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
    found: list[ModelVersion] = []
    with speaking():
        token = None
        while True:
            page = client().search_model_versions(
                f"name='{name}{LEDGER}'", max_results=200, order_by=["version_number ASC"], page_token=token
            )
            found += page
            token = page.token
            if not token:
                break
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
    where = f"tags.`{PREFIX}key` = '{key}' and attributes.status = '{status}'"
    return list(client().search_runs(experiments, where, order_by=["attributes.start_time ASC"], max_results=20))


def _bury_the_dead(key: str) -> None:
    for run in _with_key(key, LIVE) if key else []:
        host, _, pid = run.data.tags.get(PREFIX + "process", "").partition(":")
        if host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _end_quietly(str(run.info.run_id), "KILLED")


def _end_quietly(run_id: str, status: str) -> None:
    with suppress(MlflowException, StoreError):  # the reason why the step ends is worth more than this
        client().set_terminated(run_id, status)


def _process_tags() -> dict[str, str]:
    return {
        PREFIX + "process": f"{socket.gethostname()}:{os.getpid()}",
        PREFIX + "python": platform.python_version(),
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300]
