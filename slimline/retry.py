"""Try again while a server is away, ever more slowly, up to a limit; then one sentence.

The limit is SLIMLINE_RETRY_SECONDS; without it five minutes inside a step, where hours of work may hang on it, and ten
seconds for a person at a prompt or to write down a failure. It is counted by a clock that nobody sets, from the first
failure of each call.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from slimline.errors import ConfigError, StoreError

T = TypeVar("T")
STEP_S, PROMPT_S, LONGEST_PAUSE_S = 300.0, 10.0, 20.0
GOES_ON = "Finished steps are kept: run the same command again once it is back."

_most_s: ContextVar[float] = ContextVar("most_s", default=math.inf)

log = logging.getLogger("slimline")


def limit_s() -> float:
    """For how long a call is tried again. Raises ConfigError if SLIMLINE_RETRY_SECONDS is no such number."""
    given = os.environ.get("SLIMLINE_RETRY_SECONDS", "")
    if not given:
        return STEP_S if patient() else PROMPT_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise ConfigError(f"SLIMLINE_RETRY_SECONDS is {given!r}. Give seconds from 0 to 86400.")
    return seconds


@contextlib.contextmanager
def briefly() -> Iterator[None]:
    """Within it nobody waits longer than at a prompt: for a call whose failure costs little."""
    token = _most_s.set(PROMPT_S)
    try:
        yield
    finally:
        _most_s.reset(token)


def patient() -> bool:
    """Whether somebody has asked for patience, or a step runs, which has nobody who looks on."""
    return bool(os.environ.get("SLIMLINE_RETRY_SECONDS") or os.environ.get("_KFP_RUNTIME"))


def again(call: Callable[[], T], passing: Callable[[Exception], str], where: str) -> T:
    """What `call` returns, made again while `passing` gives a reason why its error may go by.

    Raises the error that does not go by as it is, and StoreError when the limit is reached.
    """
    limit, first, pause = min(limit_s(), _most_s.get()), 0.0, 0.25
    while True:
        try:
            return call()
        except Exception as error:
            reason = passing(error)
            if not reason:
                raise
            first = first or time.monotonic()
            left = first + limit - time.monotonic()
            if left <= 0:
                raise StoreError(
                    f"{where} did not answer as it should for {limit:.0f} s ({reason}). {GOES_ON}"
                ) from None
            log.warning("%s: %s; trying again, for %.0f s at most", where, reason, left)
        # Between half the pause and all of it, so that many clients do not come back at once.
        time.sleep(min(left, pause * random.uniform(0.5, 1)))
        pause = min(2 * pause, LONGEST_PAUSE_S)
