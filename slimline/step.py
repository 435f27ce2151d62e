"""Run one technique on one model: fetch, transform, seal, save, record. The one shell around pure techniques.

A step is known by what goes in: its key is the digest of source, technique, config, data, seed and code. A finished run
with that key is reused; anything else leaves nothing behind that could be mistaken for a result. A technique with
RESUMES finds what its killed forerunner had finished (unfinished.py).
"""

# Long because reuse, running, sealing and saying what went wrong must hold together, or a killed step leaves a half.
from __future__ import annotations

import ast
import errno
import hashlib
import importlib.util
import json
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from slimline import allowlist, artifact, attempt, decoder, engine, probe, progress, store, technique, unfinished
from slimline.artifact import Manifest, Stage
from slimline.errors import ConfigError, ModelError, SlimlineError, StoreError
from slimline.fetch import local
from slimline.technique import BaseConfig, Metrics, Technique


class Input(NamedTuple):
    """Something that goes into a step: its ref, where it lies now, its digest, and its manifest if it is sealed."""

    ref: str
    path: Path
    digest: str
    manifest: Manifest | None


def run(name: str, source: str, options: dict[str, Any], offered: dict[str, Any] | None = None) -> tuple[str, Metrics]:
    """Run 'stage.method' on what `source` names. Returns the ref of the result and its metrics.

    The method `none` passes the ref through, and an evaluation of nothing, an empty ref, is nothing. What is `offered`
    is taken by techniques that have such an option. Options that are None or "" are left to their defaults. A finished
    step with equal inputs is reused. Raises a SlimlineError of the kind that fits.
    """
    if name.endswith(".none") or (not source and name.startswith("evaluate.")):
        progress.emit("passed", name)
        return source, {}
    with reporting(name):
        module = technique.find(name)
        given = technique.taken(module, options, offered or {})
        config = technique.configure(module, {k: v for k, v in given.items() if v is not None and v != ""})
        origin = resolve(source)
        found = origin.manifest.format if origin.manifest else "path"
        if module.NEEDS not in ("any", found):
            raise ModelError(_misfit(name, module.NEEDS, source, found))
        seconds = {key: _resolve_option(getattr(config, key)) for key in technique.stored_fields(type(config))}
        return perform(
            name, config, {"source": origin}, seconds, code_digest(module.__name__),
            lambda out, tell: _transform(module, config, origin, seconds, out, tell), resumes=_resumes(module),
        )  # fmt: skip


def perform(
    name: str,
    config: BaseConfig,
    sources: dict[str, Input],
    options: dict[str, list[Input]],
    code: str,
    make: Callable[[Path, technique.Listener], Made],
    resumes: bool = False,
) -> tuple[str, Metrics]:
    """Return the finished run with this key, or make, seal, save and then mark finished."""
    key = _key(name, config, {key: value.digest for key, value in sources.items()}, options, code)
    if found := _reusable(key):
        return _reused(name, found)
    data = {key: _digest_of(inputs) for key, inputs in options.items() if inputs}
    tags = {
        "key": key,
        "source": next(iter(sources.values())).ref,
        **{f"data.{k}": v for k, v in data.items()},
    }
    with _workplace(name, key, resumes) as out:
        if resumes and (found := _reusable(key)):  # by a process that this one has waited for
            return _reused(name, found)
        with store.step_run(
            name, {store.PREFIX + k: v for k, v in tags.items()}, config.model_dump(mode="json")
        ) as run_id:
            for value in (*sources.values(), *(i for inputs in options.values() for i in inputs)):
                if value.manifest is None:
                    store.log_data(run_id, value.path, value.digest, name)
                else:
                    store.link_input(run_id, value.ref)
            manifest = _left_sealed(out, key)
            if manifest is None:
                start = time.perf_counter()
                made = make(out, _teller(name))
                manifest = _seal(out, made, name, config, data, code, time.perf_counter() - start)
            stage = manifest.history[-1]
            peak = float(stage.peak_memory_bytes)
            numbers = {**stage.metrics, "step_seconds": stage.seconds, "step_peak_memory_bytes": peak}
            try:
                store.log_metrics(run_id, numbers)
                ref = store.save(run_id, out, manifest)
            except StoreError:
                if not resumes:  # whose folder stays as it is
                    unfinished.keep(store.home() / "unfinished", f"sealed-{key}", out)
                raise
    progress.emit("end", name, ref=ref, reused=False, seconds=stage.seconds, metrics=numbers)
    return ref, numbers


def _left_sealed(out: Path, key: str) -> Manifest | None:
    """What an earlier try has made and sealed, and could not save as the store was away: now in `out`."""
    unfinished.take(store.home() / "unfinished", f"sealed-{key}", out)
    if not (out / artifact.MANIFEST).is_file():
        return None
    try:
        return artifact.verify(out)
    except StoreError:
        (out / artifact.MANIFEST).unlink()
        return None


WAITS = "waiting for another process that runs this very step"


def _key(name: str, config: BaseConfig, sources: dict[str, str], options: dict[str, list[Input]], code: str) -> str:
    data = {key: _digest_of(inputs) for key, inputs in options.items() if inputs}
    plain = {k: v for k, v in config.model_dump(mode="json").items() if k not in options}
    return hashlib.sha256(_canonical([name, sources, plain, data, code])).hexdigest()


def _reused(name: str, found: str) -> tuple[str, Metrics]:
    store.note_reuse(name, store.run_id_of(found))
    metrics = store.metrics(store.run_id_of(found))
    progress.emit("end", name, ref=found, reused=True, seconds=0.0, metrics=metrics)
    return found, metrics


@contextmanager
def _workplace(name: str, key: str, resumes: bool) -> Iterator[Path]:
    """The folder to make a result in: one that is found again after a kill if the technique can go on in it."""
    tell = _teller(name)
    with ExitStack() as stack:
        if resumes:
            place = store.home() / "unfinished"
            yield stack.enter_context(unfinished.kept(place, f"step-{key}", lambda: tell(WAITS, 0, 0, "")))
            return
        out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slimline-"))) / "model"
        out.mkdir()
        yield out


class Made(NamedTuple):
    """What `perform` needs to know of what was made, to seal it."""

    metrics: Metrics
    format: artifact.Format
    task: str
    labels: tuple[str, ...]
    base: str
    parent: str
    history: tuple[Stage, ...]


def run_on_folder(
    name: str, source: Path, out: Path, options: dict[str, Any], watch: Callable[[dict[str, Any]], None]
) -> Metrics:
    """Run one technique on a folder into a new folder, with no store: what `slimline step` does.

    What a killed run of a technique with RESUMES has finished lies beside `out`, as .slimline-unfinished-...
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Name a folder that does not.")
    out = out.absolute()  # programs that a technique starts work elsewhere
    module = technique.find(name)
    config = technique.configure(module, options)
    origin = resolve(str(source))
    given = origin.manifest.format if origin.manifest else "path"
    if module.NEEDS not in ("any", given):
        raise ModelError(_misfit(name, module.NEEDS, str(source), given))
    seconds = {key: _resolve_option(getattr(config, key)) for key in technique.stored_fields(type(config))}
    data = {key: _digest_of(inputs) for key, inputs in seconds.items() if inputs}
    watch({"event": "start", "step": name})

    def tell(what: str, done: int, total: int, note: str) -> None:
        watch({"event": "progress", "step": name, "what": what, "done": done, "total": total, "note": note})

    code = code_digest(module.__name__)
    with _beside(out, _resumes(module), _key(name, config, {"source": origin.digest}, seconds, code), tell) as made_in:
        if out.exists():
            raise ConfigError(f"{out} was made by another process meanwhile.")
        start = time.perf_counter()
        made = _transform(module, config, origin, seconds, made_in, tell)
        cost = time.perf_counter() - start
        _seal(made_in, made, name, config, data, code, cost)
        made_in.rename(out)
    watch({"event": "end", "step": name, "reused": False, "seconds": cost})
    return made.metrics


@contextmanager
def _beside(out: Path, resumes: bool, key: str, tell: technique.Listener) -> Iterator[Path]:
    """A folder on the disk of `out` to make it in. Raises StoreError if there is no writing there."""
    if resumes:
        name = f".slimline-unfinished-{out.name}-{key[:16]}"
        with unfinished.kept(out.parent, name, lambda: tell(WAITS, 0, 0, "")) as folder:
            yield folder
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=".slimline-")
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror or error}. Name another folder.") from None
    with scratch as path:
        (Path(path) / "model").mkdir()
        yield Path(path) / "model"


def _resumes(module: Technique) -> bool:
    return bool(getattr(module, "RESUMES", False))


def _seal(
    out: Path, made: Made, name: str, config: BaseConfig, data: dict[str, str], code: str, cost: float
) -> Manifest:
    stage = Stage(
        technique=name,
        config=config.model_dump(mode="json"),
        metrics=made.metrics,
        parent=made.parent,
        data=data,
        seed=int(getattr(config, "seed", 0)),
        code=code,
        seconds=cost,
        peak_memory_bytes=probe.peak_memory_bytes(),
    )
    return artifact.seal(
        out, format=made.format, task=made.task, labels=made.labels, base=made.base,
        history=(*made.history, stage), runtime=engine.facts(out),
    )  # fmt: skip


def _transform(
    module: Technique,
    config: BaseConfig,
    origin: Input,
    seconds: dict[str, list[Input]],
    out: Path,
    tell: technique.Listener,
) -> Made:
    paths = {key: _paths(getattr(config, key), inputs) for key, inputs in seconds.items()}
    with technique.listening(tell):
        try:
            metrics = module.run(origin.path, out, config.model_copy(update=paths))
        except Exception as error:
            if known := _out_of_memory(module, error):
                raise known from error
            raise
    before = origin.manifest
    labels = _labels(out) or (before.labels if before else ())
    return Made(
        metrics={key: float(value) for key, value in metrics.items()},
        format=module.GIVES,  # type: ignore[arg-type]
        task=decoder.TASK if _generates(out, before) else "text-classification" if labels else "",
        labels=labels,
        base=before.base if before else origin.ref,
        parent=origin.digest,
        history=before.history if before else (),
    )


def resolve(ref: str) -> Input:
    """What a ref names, here and verified. A file of weights stands for the folder that it lies in."""
    path = local.locate(ref) if ref.startswith("package:") else store.fetch(ref)
    path = path.parent if path.is_file() and path.suffix in (".safetensors", *allowlist.PICKLES) else path
    sealed = path.is_dir() and (path / artifact.MANIFEST).is_file()
    manifest = artifact.read(path) if sealed else None
    return Input(ref, path, manifest.digest if manifest else artifact.digest(path), manifest)


def code_digest(module: str) -> str:
    """Digest of a module's source and of all slimline modules it imports, at any depth and inside functions too."""
    whole = hashlib.sha256()
    for name in sorted(imported_modules(module) - PLUMBING):
        whole.update(name.encode() + (_source(name) or b""))
    return whole.hexdigest()


def imported_modules(module: str) -> set[str]:
    """The module and the slimline modules that it imports, found in the source without running any of it."""
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += _imports((_source(name) or b"").decode())
    return seen


def _source(name: str) -> bytes | None:
    spec = importlib.util.find_spec(name)
    found = spec is not None and spec.origin and spec.origin.endswith(".py")
    return Path(str(spec.origin)).read_bytes() if spec and found else None


# What carries and describes a technique without changing its numbers: an edit here must not throw hours away.
PLUMBING = {"slimline", "slimline.errors", "slimline.artifact", "slimline.technique"}


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "slimline")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "slimline":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if _is_module(whole) else str(node.module)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def reporting(name: str) -> Iterator[None]:
    """Tell the watcher that a step starts and, if it fails, why; a full disk is said as what it is."""
    progress.emit("start", name)
    attempt.refuse_in_vain(name)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    with telling(name):
        yield


@contextmanager
def telling(name: str) -> Iterator[None]:
    """Tell the watcher why a step failed, if it does."""
    try:
        yield
    except SlimlineError as error:
        progress.emit("error", name, kind=type(error).__name__, message=str(error))
        attempt.note(name, type(error).__name__, str(error))
        raise
    except Exception as error:
        known = _disk_full(error)
        message = str(known) if known else f"{name} failed unexpectedly: {type(error).__name__}: {error}"
        kind = "StoreError" if known else "SlimlineError"
        progress.emit("error", name, kind=kind, message=message, traceback=traceback.format_exc())
        attempt.note(name, kind, message)
        if known:
            raise known from error
        raise


@contextmanager
def timed(name: str) -> Iterator[Metrics]:
    """`reporting`, for a step that is no technique: at its end the watcher is told how long it took.

    What is put into the numbers that this yields is told as well.
    """
    with reporting(name):
        start, numbers = time.perf_counter(), dict[str, float]()
        yield numbers
        seconds = time.perf_counter() - start
        progress.emit("end", name, reused=False, seconds=seconds, **({"metrics": numbers} if numbers else {}))


def _disk_full(error: BaseException | None) -> StoreError | None:
    """StoreError if the reason, at any depth, is that no space was left; libraries wrap it in errors of their own."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
            sign in str(error) for sign in ("No space left", "disk is full", "File too large", "os error 28")
        ):
            free = ", ".join(
                f"{shutil.disk_usage(place).free / 1e6:.0f} MB free in {place}"
                for place in dict.fromkeys([Path(tempfile.gettempdir()), store.home().parent])
            )
            return StoreError(f"the disk is full ({free}). Make room, or set TMPDIR and SLIMLINE_STORE elsewhere.")
        error = error.__cause__ or error.__context__
    return None


NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "(os error 12)", "bad_alloc")


def _out_of_memory(module: Technique, error: BaseException | None) -> StoreError | None:
    """StoreError if the reason, at any depth, is that no memory was left on the machine or its GPU."""
    while error is not None:
        said = str(error)
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"MemoryError", "OutOfMemoryError"} or any(sign in said for sign in NO_MEMORY):
            name = module.__name__.removeprefix("slimline.")
            where = f" while {technique.doing()}" if technique.doing() else ""
            goes_on = " What is finished is kept: the same command goes on there." if _resumes(module) else ""
            return StoreError(
                f"{name} ran out of memory{where} ({' '.join(said.split())[:160] or type(error).__name__}). Give it "
                f"less at a time, such as fewer or shorter windows of text, or a machine with more.{goes_on}"
            )
        error = error.__cause__ or error.__context__
    return None


def _reusable(key: str) -> str | None:
    run_id = store.find_finished(key)
    if run_id is None:
        return None
    for ref in (f"runs:/{run_id}/model", f"runs:/{run_id}/evaluation"):
        try:
            store.fetch(ref)
            return ref
        except SlimlineError:
            continue  # changed or gone since: make it again rather than hand it on
    return None


def _teller(name: str) -> technique.Listener:
    def tell(what: str, done: int, total: int, note: str) -> None:
        progress.emit("progress", name, what=what, done=done, total=total, note=note)

    return tell


def _resolve_option(value: Any) -> list[Input]:
    return [resolve(ref) for ref in ([value] if isinstance(value, str) else value) if ref]


def _paths(value: Any, inputs: list[Input]) -> Any:
    if isinstance(value, str):
        return str(inputs[0].path) if inputs else ""
    return tuple(str(i.path) for i in inputs)


def _digest_of(inputs: list[Input]) -> str:
    return (
        inputs[0].digest if len(inputs) == 1 else hashlib.sha256("".join(i.digest for i in inputs).encode()).hexdigest()
    )


def _generates(out: Path, before: Manifest | None) -> bool:
    if (out / "config.json").is_file():
        return decoder.is_decoder(out)
    return bool(before and before.task == decoder.TASK)


def _labels(out: Path) -> tuple[str, ...]:
    file = out / "config.json"
    if not file.is_file() or decoder.is_decoder(out):
        return ()
    table = json.loads(file.read_text(encoding="utf-8")).get("id2label") or {}
    return tuple(str(table[key]) for key in sorted(table, key=int))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _misfit(name: str, needs: str, source: str, given: str) -> str:
    if given == "path":
        return f"{name} needs a sealed {needs} model but {source} is a plain folder. Bring it in with fetch.local."
    if needs == "path":
        return f"{name} takes a plain folder but {source} is a sealed {given} model. Leave it out: fetch_method=none."
    if given == "tensorrt":
        where = "before export.tensorrt"
    else:
        where = "before export" if needs == "hf" else "after export" if needs == "onnx" else "elsewhere"
    return f"{name} needs {needs} but {source} is {given}. Put this step {where}."
