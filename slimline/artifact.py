"""A model on disk: one directory, its files, and manifest.json, which is always written last.

The manifest binds every byte: a directory without one is unfinished, one whose files differ from it is refused.
Evaluations (per-example predictions, timings, verdicts) are sealed in the same way, with a format of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimline.errors import ModelError, StoreError

MANIFEST = "manifest.json"
MODEL_FORMATS = ("hf", "onnx", "genai", "gguf", "tensorrt")
Format = Literal["hf", "onnx", "genai", "gguf", "tensorrt", "evaluation"]


class Frozen(BaseModel):
    """Immutable, and closed: a field nobody declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stage(Frozen):
    """One line of a model's history: what was done to it, with what, and what it cost."""

    technique: str
    config: dict[str, Any]
    metrics: dict[str, float]
    parent: str
    """Digest of the model this stage started from; empty for a model brought in from outside."""
    data: dict[str, str] = {}
    """Digest of every second input, by the name of its option."""
    seed: int = 0
    code: str = ""
    """Digest of the technique's module and of the slimline modules that it imports."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class File(Frozen):
    size_bytes: int
    sha256: str


class Manifest(Frozen):
    """What a directory is, where it comes from and the digest of every file in it."""

    version: int = 1
    format: Format
    task: str
    labels: tuple[str, ...]
    base: str
    digest: str
    """sha256 over the sorted (path, sha256) pairs of all files: the name of these bytes."""
    files: dict[str, File]
    history: tuple[Stage, ...] = ()
    runtime: dict[str, Any] = {}
    """What an engine was built by and for (see engine.Record); empty for formats that run anywhere."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights alone, without tokenizer and configuration."""
        return sum(f.size_bytes for name, f in self.files.items() if Path(name).suffix in WEIGHT_SUFFIXES)


WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".data", ".engine", ".gguf")


def digest(path: Path) -> str:
    """The name of these bytes: of one file, or of all files below a directory except its manifest."""
    return file(path).sha256 if path.is_file() else combine(_files(path))


def seal(
    path: Path,
    *,
    format: Format,
    task: str,
    labels: tuple[str, ...],
    base: str,
    history: tuple[Stage, ...] = (),
    runtime: dict[str, Any] | None = None,
) -> Manifest:
    """Write the manifest over everything in the directory, last and atomically."""
    files = _files(path)
    manifest = Manifest(
        format=format,
        task=task,
        labels=labels,
        base=base,
        files=files,
        digest=combine(files),
        history=history,
        runtime=runtime or {},
    )
    unfinished = path / f".{MANIFEST}"
    with unfinished.open("w", encoding="utf-8") as handle:
        handle.write(manifest.model_dump_json(indent=2))
        handle.flush()
        os.fsync(handle.fileno())
    unfinished.replace(path / MANIFEST)
    return manifest


def read(path: Path) -> Manifest:
    """The manifest of a finished directory. Looks at no other file: see `verify`."""
    file = path / MANIFEST
    if not file.is_file():
        raise ModelError(f"{path} has no {MANIFEST}: the step that wrote it did not finish. Run that step again.")
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValidationError, ValueError):
        raise StoreError(f"{file} is not a manifest that this version can read. Run the step again.") from None


def verify(path: Path) -> Manifest:
    """The manifest, after every file was read and compared with it. Raises StoreError naming the first that differs."""
    manifest = read(path)
    found = _files(path)
    for name in sorted(manifest.files.keys() | found.keys()):
        wanted, is_there = manifest.files.get(name), found.get(name)
        if wanted == is_there:
            continue
        what = "is missing" if is_there is None else "was added" if wanted is None else "has changed"
        raise StoreError(f"{path / name} {what} since it was sealed. Delete the copy, or run the step again.")
    if combine(found) != manifest.digest:
        raise StoreError(f"{path / MANIFEST} does not match its own files. Delete the copy, or run the step again.")
    return manifest


def _files(path: Path) -> dict[str, File]:
    files = {}
    for found in sorted(path.rglob("*")):
        if found.is_symlink():
            raise StoreError(f"{found} is a symbolic link, which a stored model never holds. Replace it by the file.")
        if found.is_file() and found.name not in (MANIFEST, f".{MANIFEST}"):
            files[found.relative_to(path).as_posix()] = file(found)
    return files


def file(path: Path) -> File:
    """Size and digest of one file, read now."""
    with path.open("rb") as handle:
        return File(sha256=hashlib.file_digest(handle, "sha256").hexdigest(), size_bytes=path.stat().st_size)


def combine(files: dict[str, File]) -> str:
    """The digest of a directory with these files."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name}\0{files[name].sha256}\n".encode())
    return whole.hexdigest()
