"""Runs on a cluster: which there are, how one ends, and what its steps have written."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from slimline import errors
from slimline.cluster import Absent, Away, Cluster, Thing
from slimline.errors import ConfigError, GateError, SlimlineError, StoreError

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
STATES = ("PENDING", "RUNNING", "CANCELING", "PAUSED", *ENDED)
KINDS = {2: errors.ConfigError, 3: errors.DataError, 4: errors.GateError, 5: errors.StoreError}


class Step(NamedTuple):
    """A step of a run: its name in the graph, how it stands, what was said of it, and its pods."""

    name: str
    state: str
    error: str
    pods: tuple[str, ...]


def find(cluster: Cluster, state: str = "", experiment: str = "", limit: int = 20) -> list[Thing]:
    """Runs of a namespace or an experiment, the latest first."""
    if state and state.upper() not in STATES:
        raise ConfigError(f"there is no state {state!r}. There is: {', '.join(STATES)}.")
    experiment_id = ""
    if experiment:
        known = cluster.experiment(experiment, make=False)
        if known is None:
            raise Absent(f"there is no experiment {experiment!r}. See `slimline runs` without --experiment.")
        experiment_id = str(known["experiment_id"])
    where = [{"operation": "EQUALS", "key": "state", "string_value": state.upper()}] if state else []
    return list(cluster.runs(where, experiment_id, limit))


def row(run: Thing, host: str = "") -> dict[str, Any]:
    """What is worth knowing of a run, in a line."""
    keys = ("run_id", "display_name", "state", "created_at", "finished_at", "experiment_id", "recurring_run_id")
    return {key: run.get(key) for key in keys} | {"url": f"{host}/#/runs/details/{run['run_id']}"}


def steps(run: Thing) -> list[Step]:
    """The steps of a run in the order in which they began, without what Kubeflow puts around them."""
    details = (run.get("run_details") or {}).get("task_details") or []
    by_pod = {detail["pod_name"]: detail for detail in details if detail.get("pod_name")}
    found = []
    for detail in sorted(details, key=lambda d: (str(d.get("start_time") or "~"), str(d.get("task_id")))):
        name = str(detail.get("display_name", ""))
        if name in ("", "root") or name.endswith("driver") or name.startswith("executor"):
            continue
        pods = tuple(_pods(detail, by_pod))
        inside = [by_pod[pod] for pod in pods if pod in by_pod]
        said = next((text for text in map(_said, [detail, *inside]) if text), "")
        found.append(Step(name, str(detail.get("state", "")), said, pods))
    return found


def _pods(detail: Thing, by_pod: dict[str, Thing]) -> Iterator[str]:
    """The pods in which a step itself ran, one a try."""
    for child in detail.get("child_tasks") or ():
        pod = child.get("pod_name")
        known = by_pod.get(pod, {})
        name = str(known.get("display_name", "executor"))
        if not pod or not name.startswith("executor"):
            continue  # the next step, or its driver
        tries = list(_pods(known, by_pod)) if known.get("child_tasks") else []
        yield from tries or [pod]


def _said(detail: Thing) -> str:
    failures = [detail.get("error") or {}, *((s.get("error") or {}) for s in detail.get("state_history") or ())]
    return next((str(f["message"]) for f in failures if f.get("message")), "")


def wait(
    cluster: Cluster, run_id: str, timeout_s: float = 0, tell: Callable[[Thing], None] = lambda run: None,
    poll_s: float = 2.0,
) -> Thing:  # fmt: skip
    """The run, once it has ended. Raises StoreError after `timeout_s`; the run itself goes on."""
    began, pause = time.monotonic(), poll_s
    while True:
        run = cluster.run(run_id)
        tell(run)
        if run.get("state") in ENDED:
            return run
        left = began + timeout_s - time.monotonic()
        if timeout_s and left <= 0:
            raise StoreError(
                f"run {run_id} is still {run.get('state', 'PENDING')} after {timeout_s:.0f} s. It goes on; wait "
                f"again, or see `slimline logs {run_id}`."
            )
        time.sleep(min(pause, left) if timeout_s else pause)
        pause = min(1.5 * pause, 15 * poll_s)


def failure(cluster: Cluster, run: Thing) -> SlimlineError | None:
    """Why a run did not succeed, as the error that its step ended with; None for one that did."""
    state, run_id = run.get("state"), run["run_id"]
    if state == "SUCCEEDED":
        return None
    if state in ("CANCELED", "SKIPPED"):
        return StoreError(f"run {run_id} was {state.lower()}. Submit it again: finished steps are reused.")
    broken = next((step for step in steps(run) if step.state == "FAILED" and step.pods), None)
    if broken is None:
        said = str((run.get("error") or {}).get("message") or "no step says why")
        return StoreError(f"run {run_id} failed outside its steps: {said[:300]}. See it at {cluster.host}.")
    kind, sentence = _last_words(cluster, run_id, broken)
    if kind is None and (code := re.search(r"exit code (\d+)", broken.error)):
        kind = KINDS.get(int(code[1]))
    if kind is None and re.search(r"OOMKilled|[Ee]vict|node|Imag|deadline", broken.error):
        kind = StoreError
    text = sentence or f"{broken.error or 'it does not say why'}. See `slimline logs {run_id} {broken.name}`."
    return (kind or SlimlineError)(f"step {broken.name} failed: {text}")


def verdict(cluster: Cluster, run: Thing) -> GateError | None:
    """That the gate said no, where a step's log shows the summary of the run (see progress.py)."""
    status, sentence = "missing", ""
    for step in reversed(steps(run)):
        for event in reversed(_events(_log(cluster, run["run_id"], step))):
            if event.get("event") == "summary":
                status, sentence = str(event.get("status")), str(event.get("sentence", ""))
                return None if status == "PASS" else GateError(f"the verdict is {status}: {sentence}")
    return GateError(
        f"the verdict of run {run['run_id']} cannot be seen: no step's log has it. Look into MLflow, or wait without "
        "--require-pass."
    )


def logs(cluster: Cluster, run_id: str, name: str = "") -> list[tuple[str, str]]:
    """What one step, or every step that has begun, has written: (step, text) each. Raises Absent if it is gone."""
    run = cluster.run(run_id)
    known = steps(run)
    if name and name not in (step.name for step in known):
        begun = ", ".join(step.name for step in known) or "none yet"
        raise Absent(f"run {run_id} has no step {name!r} that has begun. It has: {begun}.")
    chosen = [step for step in known if step.pods and name in ("", step.name)]
    if name and chosen:
        return [(name, "".join(cluster.log(run_id, pod) for pod in chosen[-1].pods[-1:]))]
    return [(step.name, _log(cluster, run_id, step)) for step in chosen]


def follow(cluster: Cluster, run_id: str, name: str, poll_s: float = 2.0) -> Iterator[str]:
    """What a step writes, as it is written, until the run or the step has ended. The server streams nothing itself."""
    shown = 0
    while True:
        run = cluster.run(run_id)
        step = next((step for step in steps(run) if step.name == name), None)
        over = run.get("state") in ENDED or (step is not None and step.state in ENDED)
        text = _log(cluster, run_id, step) if step else ""
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if over:
            return
        time.sleep(poll_s)


def _log(cluster: Cluster, run_id: str, step: Step) -> str:
    try:
        return "".join(cluster.log(run_id, pod) for pod in step.pods[-1:])
    except (Absent, Away):
        return ""


def _last_words(cluster: Cluster, run_id: str, step: Step) -> tuple[type[SlimlineError] | None, str]:
    """The error that ended a step, from its log: the event that it wrote, or the last line of the traceback."""
    text = _log(cluster, run_id, step)
    for event in reversed(_events(text)):
        if event.get("event") == "error":
            return type(errors.by_name(str(event["kind"]), "")), str(event["message"])
    last = re.findall(r"^slimline\.errors\.(\w+): (.+)$", text, re.MULTILINE)
    return (type(errors.by_name(last[-1][0], "")), last[-1][1]) if last else (None, "")


def _events(text: str) -> list[Thing]:
    found = []
    for line in text.splitlines():
        if line.startswith('{"event":'):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut in the middle
    return found
