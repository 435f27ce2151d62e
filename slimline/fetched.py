"""Copies of stored models on this machine: fetched once, checked while they arrive, and known again without reading.

A copy is written down, last of all, with size and times of each of its files. As long as these stand still it is taken
as it is; when one has moved, the bytes are compared with the manifest again, and what differs is fetched anew. Times
that nobody can set (ctime) are among them, so that a change is seen whoever made it; what is not seen is a disk that
loses bits by itself. A fetch that was cut short goes on with the files that it lacks. Of what lies in a bucket and was
never sealed, such as a data set, the copy is of a version: the entity tags of its objects.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock

from slimline import artifact, transfer
from slimline.artifact import MANIFEST, Manifest
from slimline.errors import StoreError

MARK = "checked.json"


def copy(cache: Path, come_from: transfer.Place) -> Path:
    """The folder in `cache` with the model that lies at a place. The caller holds its lock. Raises StoreError."""
    folder = cache / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if _untouched(cache, folder):
        return folder
    (cache / MARK).unlink(missing_ok=True)
    if not (cache / MANIFEST).is_file():
        transfer.download(come_from, {MANIFEST: (cache / MANIFEST, None)})
    try:
        manifest = artifact.read(cache)
        complete(folder, manifest, come_from)
    except StoreError:
        (cache / MANIFEST).unlink()  # it may be what is wrong: the next fetch asks for it again
        raise
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_bytes((cache / MANIFEST).read_bytes())
    unfinished.replace(folder / MANIFEST)
    _mark(cache, folder)
    return folder


def snapshot(root: Path, uri: str) -> Path:
    """A file or a folder of a bucket as it is now. What has another version there is another copy here."""
    bucket = transfer.Bucket(uri)
    found = transfer.versions(bucket)
    if not found:
        raise StoreError(f"{uri} does not exist at {bucket.endpoint}. Name an object, or a prefix with some below it.")
    name = hashlib.sha256(json.dumps([bucket.endpoint, uri, found], sort_keys=True).encode()).hexdigest()[:24]
    parent, _, last = uri.rstrip("/").rpartition("/")
    alone = set(found) == {""}
    files = {last: found[""]} if alone else found
    goal = root / name / last
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not goal.exists():
            part = root / name / f".{last}.part"
            place = transfer.Bucket(parent) if alone else bucket
            shutil.rmtree(part, ignore_errors=True)
            transfer.download(place, {file: (part / transfer.safe(file), None) for file in files})
            (part / last if alone else part).replace(goal)
    return goal


def complete(folder: Path, manifest: Manifest, come_from: transfer.Place) -> None:
    """Make a folder hold what its manifest says and nothing else: keep what is right, fetch what is not."""
    if artifact.combine(manifest.files) != manifest.digest:
        raise StoreError(f"{come_from.name}/{MANIFEST} does not match its own files. Run the step again.")
    for path in [p for p in folder.rglob("*") if p.is_symlink() or p.is_file()]:
        name = path.relative_to(folder).as_posix()
        wanted = manifest.files.get(name)
        right = wanted and not path.is_symlink() and path.stat().st_size == wanted.size_bytes
        if not right or artifact.file(path) != wanted:
            path.unlink()
    lacking = {transfer.safe(name): file for name, file in manifest.files.items() if not (folder / name).is_file()}
    transfer.download(come_from, {name: (folder / name, file) for name, file in lacking.items()})


def _untouched(cache: Path, folder: Path) -> bool:
    try:
        known = json.loads((cache / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(known == _state(folder))


def _mark(cache: Path, folder: Path) -> None:
    unfinished = cache / f".{MARK}"
    unfinished.write_text(json.dumps(_state(folder)), encoding="utf-8")
    unfinished.replace(cache / MARK)


def _state(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            stat = os.lstat(path)
            name = path.relative_to(folder).as_posix()
            found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return found
