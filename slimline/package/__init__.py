"""Put a sealed model into the form that a serving system loads: one file here is one system.

    triton    a model repository: texts in, label and score out, as everywhere in slimline
    kserve    an InferenceService, and what lies behind its storage uri
    vllm      a plain Hugging Face folder, and the arguments that serve it

The model is verified first; the folder appears whole or not at all. What is written names the ref and the digest that
it was made from, and holds copies: nothing points back to the store.
"""

from __future__ import annotations

import importlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from slimline import artifact, store
from slimline.artifact import Manifest
from slimline.errors import ConfigError, ModelError, StoreError

TARGETS = ("triton", "kserve", "vllm")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
"""What Triton takes as a folder's name and vLLM as a model's, and no shell has to quote."""


class Model(NamedTuple):
    """What is packaged: a verified directory, and what it is called from here on."""

    ref: str
    """As given, but with the version in the place of an alias, which moves."""
    path: Path
    manifest: Manifest
    name: str
    version: int
    storage_uri: str = ""
    """Where a cluster will find what is written. This and the next are for kserve alone."""
    runtime_version: str = ""
    """The tag of the runtime's image; empty: the cluster's own."""


class Package(NamedTuple):
    """What was written."""

    folder: Path
    name: str
    version: int
    digest: str
    before: str
    """What has to be done before `start`, as a sentence; empty if nothing."""
    start: str
    """The command that starts it."""


def write(
    ref: str, target: str, out: Path | None = None, name: str = "", storage_uri: str = "", runtime_version: str = ""
) -> Package:
    """Package the model behind a ref into a folder that does not exist yet (default: <name>-<target> here).

    Raises ConfigError for a target, a name or an option that cannot be, ModelError for a model that the target cannot
    load.
    """
    if target not in TARGETS:
        raise ConfigError(f"nothing is packaged for {target!r}. There is: {', '.join(TARGETS)}.")
    for option, value in (("--storage-uri", storage_uri), ("--runtime-version", runtime_version)):
        if value and target != "kserve":
            raise ConfigError(f"{option} {value} is for kserve, and this is for {target}. Leave it out.")
    model = read(ref, name)._replace(storage_uri=storage_uri, runtime_version=runtime_version)
    out = out or Path(f"{model.name}-{target}")
    module = importlib.import_module(f"slimline.package.{target}")
    with fresh(out) as folder:
        module.write(model, folder)
    before, start = module.started(model, out)
    return Package(out, model.name, model.version, model.manifest.digest, before, start)


def read(ref: str, name: str = "") -> Model:
    """The model behind a ref, every byte of it verified. Raises ModelError for what gives no answers."""
    path = store.fetch(ref)
    manifest = artifact.read(path)
    if manifest.format == "evaluation":
        raise ModelError(f"{ref} is an evaluation, which gives no answers. Name an hf, onnx or tensorrt model.")
    if not manifest.labels:
        raise ModelError(f"{ref} has no labels, so no head for a task. Fit it with train.finetune first.")
    version = 1
    if ref.startswith("models:/") and not ref.startswith("models:/m-"):
        registered = store.version_of(ref)
        version, name = int(registered.version), name or str(registered.name)
        ref = f"models:/{registered.name}/{version}"
    name = name or path.resolve().name
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a served model. Name it with -n: letters, digits, '-', '_' and '.'.")
    return Model(ref, path, manifest, name, version)


@contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it at the end; on an error, of any kind, nothing is left."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already. Remove it, or name another folder with -o.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / "unfinished"  # not the scratch folder itself, which nobody else may read
            folder.mkdir()
            yield folder
            folder.rename(out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror or error}. Name another folder with -o.") from None


def copy(model: Model, names: Iterable[str], out: Path) -> None:
    """Copy some of a model's files to where they lay."""
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.path / name, out / name)
