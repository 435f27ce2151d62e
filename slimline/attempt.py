"""What a step that fails leaves behind for those who come after it: the next attempt, and the end of the pipeline run.

A cluster may start a step again that has failed. That is right after a lost pod or a server that was away, and a waste
after a wrong recipe: KFP cannot be told which exit codes are worth a retry. So the first attempt writes what went wrong
into the pipeline's run, and the next one, which learns its number from KFP_RETRY_INDEX, says the same at once instead
of working up to it again. `outcome.finish` reads the same tags.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from typing import Any, NamedTuple

from slimline import errors, retry, store
from slimline.errors import StoreError

FAILED = store.PREFIX + "failed."
FINAL = {"ConfigError", "ModelError", "DataError", "GateError"}
"""What another attempt cannot change."""


class Failure(NamedTuple):
    """How a step failed."""

    step: str
    kind: str
    message: str


def note(step: str, kind: str, message: str) -> None:
    """Write down in the pipeline's run that this step failed. A store that is away is no further trouble, and is not
    waited for: the step may have failed because of it, after a wait of its own.
    """
    with suppress(StoreError), retry.briefly():
        if parent := store.pipeline_run():
            store.set_tags(parent, {_tag(step): json.dumps(Failure(step, kind, message[:2000])._asdict())})


def refuse_in_vain(step: str) -> None:
    """Raise what an earlier attempt at this very step ended with, if trying again cannot help."""
    if not int(os.environ.get("KFP_RETRY_INDEX") or 0):
        return
    parent = store.pipeline_run()
    told = store.tags(parent).get(_tag(step), "") if parent else ""
    failure = Failure(**json.loads(told)) if told else None
    if failure and failure.kind in FINAL:
        raise errors.by_name(failure.kind, f"{failure.message} (Not tried again: that would end the same way.)")


def failures(tags: dict[str, str]) -> list[Failure]:
    """The failures that the tags of a pipeline's run tell of."""
    return [Failure(**json.loads(value)) for key, value in sorted(tags.items()) if key.startswith(FAILED)]


def given() -> dict[str, Any]:
    """The parameters that Kubeflow gave this step, those that its function does not name among them."""
    if "--executor_input" not in sys.argv[:-1]:
        return {}
    told = json.loads(sys.argv[sys.argv.index("--executor_input") + 1])
    return dict(told.get("inputs", {}).get("parameterValues", {}))


def _tag(step: str) -> str:
    """One step may stand in a pipeline several times: what it was given tells them apart."""
    return f"{FAILED}{step}.{hashlib.sha256(json.dumps(given(), sort_keys=True).encode()).hexdigest()[:12]}"
