"""Work that outlives a kill: the folder that a technique with RESUMES writes in, found again by the same step.

A step is known by its key, and so is its folder: what goes on is the same technique, on the same bytes, with the same
options and code. It lies in the store's own folder of this machine (SLIMLINE_STORE), also where the store is a server:
TMPDIR is what a restart or a container's end clears away. One process at a time has it, by a lock that the system lets
go when the process ends, however that happens; another with the same key waits. After a success it is removed, and what
nobody came back for within two weeks goes when the next such step begins.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slimline.errors import StoreError

STALE_DAYS = 14
FOLDER = "model"


@contextmanager
def kept(place: Path, name: str, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder of one's own in `place`, with whatever an earlier, killed try has left in it.

    Removed if the block ends well or has left nothing in it. `wait` is called once if another process has it, which is
    then waited for. Where the file system knows no locks, the folder is a new one that does not outlive the block.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place, name)
        lock = _take(place / f"{name}.lock", wait)
    except OSError as error:
        raise StoreError(f"{place} cannot be written: {error.strerror or error}. Name another folder.") from None
    if lock is None:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=place) as scratch:
            (Path(scratch) / FOLDER).mkdir()
            yield Path(scratch) / FOLDER
        return
    whole, done = place / name, False
    try:
        (whole / FOLDER).mkdir(parents=True, exist_ok=True)
        yield whole / FOLDER
        done = True
    finally:
        if done or not any((whole / FOLDER).iterdir()):
            _remove(whole)
        os.close(lock)


def keep(place: Path, name: str, folder: Path) -> None:
    """Put a finished folder aside, for the next try to `take`; nothing happens where there is no writing."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        _sweep(place, name)
        shutil.rmtree(place / name, ignore_errors=True)
        shutil.move(folder, place / name)
    except OSError:
        shutil.rmtree(place / name, ignore_errors=True)


def take(place: Path, name: str, folder: Path) -> bool:
    """Move what was put aside into the empty `folder`. Only one process gets it."""
    mine = place / f"{name}-{os.getpid()}"
    try:
        (place / name).rename(mine)
    except OSError:
        return False
    for path in mine.iterdir():
        shutil.move(path, folder / path.name)
    mine.rmdir()
    return True


def _take(file: Path, wait: Callable[[], None] = lambda: None, patient: bool = True) -> int | None:
    """The open file of a lock that is now ours; None where there are no locks, or if impatient and somebody has it."""
    told = False
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(lock, file):
                return lock
            os.close(lock)  # whoever had it has removed it: there may be a new one
        except BlockingIOError:
            os.close(lock)
            if not patient:
                return None
            if not told:
                wait()
            told = True
            time.sleep(0.2)
        except OSError:
            os.close(lock)
            return None


def _is(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _remove(whole: Path) -> None:
    """Remove a folder and then its lock, which is held."""
    shutil.rmtree(whole, ignore_errors=True)
    whole.with_name(f"{whole.name}.lock").unlink(missing_ok=True)


def _sweep(place: Path, name: str) -> None:
    """Remove what others of this kind have left long ago, unless somebody works in it."""
    kind = name[: name.rfind("-") + 1]
    for whole in [f for f in place.iterdir() if f.is_dir() and f.name.startswith(kind) and f.name != name]:
        touched = max(f.stat().st_mtime for f in (whole, *whole.rglob("*")))
        if touched < time.time() - STALE_DAYS * 86_400:
            lock = _take(whole.with_name(f"{whole.name}.lock"), patient=False)
            if lock is not None:
                _remove(whole)
                os.close(lock)
