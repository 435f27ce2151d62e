"""Who is champion: a ledger in MLflow whose order decides, and aliases that follow it.

MLflow's aliases have no compare-and-set: of racing writers all succeed, and the last one wins. What MLflow does do
once, on any database and for any number of hosts, is to number the versions of a registered model. So each model NAME
has a registered model NAME.ledger beside it, and every move of the champion is a version of that:

    number   from -> to   kind        who, why, verdict ...
    1        -    -> 1    promote
    2        1    -> 2    promote
    3        1    -> 3    promote     lost: by then the champion was 2
    4        2    -> 1    rollback
    5        1    -> -    found       the alias had been removed by hand

Read from the top, an entry counts if it starts where the champion stands, and has lost otherwise. That is a
compare-and-set which everybody who reads works out alike. Writing an entry is the whole decision; the aliases are put
in place afterwards by whoever comes next, the writer as a rule, another process if that one died. No clock takes part.

An alias that was moved by hand is not put back: it is written down as found, and counts from there.
"""

from __future__ import annotations

import getpass
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from slimline import store
from slimline.errors import DeniedError, GateError, StoreError

CHAMPION, CHALLENGER, PREVIOUS = ALIASES = ("champion", "challenger", "previous")


@dataclass(frozen=True)
class Entry:
    """One move of the champion, or one that came too late."""

    number: int
    kind: str
    start: int | None
    to: int | None
    lost: bool
    applied: bool
    at: float
    """By the clock of MLflow's database, for people; nothing is decided by it."""
    about: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """The entry as `slimline ledger --json` gives it."""
        when = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="seconds")
        own = {"number": self.number, "kind": self.kind, "from": self.start, "to": self.to, "lost": self.lost}
        return {**own, "at": when, **{key: self.about.get(key, "") for key in ABOUT}}


ABOUT = ("who", "why", "verdict", "verdict_ref", "approved", "forced")
"""What an entry says beside the move itself."""


@dataclass(frozen=True)
class State:
    """What a ledger amounts to, read from the top."""

    entries: tuple[Entry, ...] = ()
    champion: int | None = None
    previous: int | None = None
    tip: Entry | None = None
    """The last entry that counts."""

    @property
    def reigned(self) -> set[int]:
        """Every version that has been champion."""
        return {entry.to for entry in self.entries if entry.to is not None and not entry.lost}


def read(name: str) -> State:
    """The ledger as it is now. Of an entry that was sent twice, as a repeated POST does, the first counts."""
    found: list[Entry] = []
    champion = previous = tip = None
    seen: set[str] = set()
    for number, at, tags in store.entries(name):
        start, to = (int(tags[key]) if tags.get(key) else None for key in ("from", "to"))
        lost = start != champion or tags.get("nonce", "") in seen
        seen.add(tags.get("nonce", ""))
        entry = Entry(number, tags.get("kind", ""), start, to, lost, "applied" in tags, at, tags)
        found.append(entry)
        if not lost:
            champion, previous, tip = to, start if start is not None else previous, entry
    return State(tuple(found), champion, previous, tip)


ATTEMPTS = 3
"""How often something is written that did not arrive. If others were faster, the next look at the ledger says so."""


def settle(name: str) -> State:
    """Put the aliases where the ledger says, or write down where somebody else put them. Returns what then holds."""
    failed = 0
    while True:
        state = read(name)
        if state.tip is not None and not state.tip.applied:
            try:
                _apply(name, state)
            except StoreError as error:  # as of two that write one tag or alias at once: MLflow fails one of them
                failed += 1
                if isinstance(error, DeniedError) or failed == ATTEMPTS:
                    raise
            continue
        standing = store.alias(name, CHAMPION)
        if standing == state.champion:
            return state
        if len(read(name).entries) == len(state.entries):  # else it moved between the two looks
            why = "The alias was moved, or removed, without slimline."
            _write(name, "found", state.champion, standing, uuid.uuid4().hex, {"why": why, "who": "unknown"})


def _apply(name: str, state: State) -> None:
    """Point the aliases to what the last entry says, until no newer one has come meanwhile."""
    while (tip := state.tip) is not None:
        if tip.to is not None and store.has_version(name, tip.to):
            store.set_alias(name, CHAMPION, tip.to)
            if state.previous is not None and store.has_version(name, state.previous):
                store.set_alias(name, PREVIOUS, state.previous)
            if store.alias(name, CHALLENGER) == tip.to:
                store.unset_alias(name, CHALLENGER)
        newer = read(name)
        if newer.tip is not None and newer.tip.number == tip.number:
            store.mark(name, tip.number, {"applied": "yes"})
            return
        state = newer  # this process was slow, and may just have overwritten what a newer entry had put there


def move(name: str, version: int, expected: int | None, kind: str, about: dict[str, str]) -> str:
    """Make a version the champion in place of `expected`. Raises GateError if that is not, or no longer, the champion.

    The version must have been checked: from the moment that the entry is written, the alias may be on it.
    """
    nonce, state = uuid.uuid4().hex, settle(name)
    for attempt in range(ATTEMPTS):
        if state.champion != expected:
            raise GateError(
                f"the champion of {name} moved from {said(expected)} to {said(state.champion)} since the verdict. "
                "Run the pipeline again to compare with that one."
            )
        try:
            _write(name, kind, expected, version, nonce, {"who": who(), **about})
        except StoreError as error:
            if isinstance(error, DeniedError) or attempt + 1 == ATTEMPTS:
                raise
        state = settle(name)
        mine = [entry for entry in state.entries if entry.about.get("nonce") == nonce]
        if any(not entry.lost for entry in mine):
            was = f" in place of version {expected}" if expected is not None else ""
            return f"Version {version} of {name} is now the champion{was}."
        if mine:
            raise GateError(
                f"somebody else moved the champion of {name} at the same moment. "
                f"It is {said(state.champion)} now: run the pipeline again to compare with that one."
            )
    raise AssertionError("the last attempt returns or raises")


def _write(name: str, kind: str, start: int | None, to: int | None, nonce: str, about: dict[str, str]) -> None:
    tags = {"kind": kind, "from": str(start or ""), "to": str(to or ""), "nonce": nonce, **about}
    if kind == "found":
        tags["applied"] = "yes"
    store.append(name, tags, f"{kind}: {said(start)} -> {said(to)}. {about.get('why', '')}")


def said(version: int | None) -> str:
    """A version as a sentence names it."""
    return "none" if version is None else f"version {version}"


def who() -> str:
    """Who acts, as far as can be known: the name given to MLflow, else to the machine; and the machine."""
    name = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    if not name:
        try:
            name = getpass.getuser()
        except (KeyError, OSError):
            name = f"uid {os.getuid()}"
    run = store.pipeline_run()
    return f"{name} on {socket.gethostname()}" + (f", run {run}" if run else "")
