"""How a pipeline run begins and ends: its run in MLflow, its recipe checked, what came of it, and whoever waits told.

    begin    opens the run that all steps hang under, and refuses a recipe that cannot work
    finish   closes it FINISHED, FAILED or KILLED with the step that failed and its sentence, and calls the webhook

Both are steps of every pipeline (components/outcome.py). The webhook is SLIMLINE_WEBHOOK, a secret: it is in no
parameter, no page and no log. What is sent is a message as Slack takes it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from slimline import attempt, portable, recipe, store
from slimline.step import reporting, telling

STATUS = {"SUCCEEDED": "FINISHED", "CANCELLED": "KILLED"}
"""What MLflow calls Kubeflow's states; every other one is FAILED."""
TIMEOUT_S, PAUSE_S, ATTEMPTS = 5.0, 1.0, 2
LONGEST = 2900
"""Characters that Slack takes in one block, and some to spare."""


class Outcome(NamedTuple):
    """What came of a pipeline run, in words, and where to look."""

    pipeline: str
    status: str
    sentence: str
    links: dict[str, str]

    @property
    def title(self) -> str:
        return f"{self.pipeline}: {self.status.lower()}"


def begin(pipeline: str) -> Outcome:
    """Open the run and check the recipe that Kubeflow was given. Raises ConfigError or DataError for one that cannot
    work. Started by the launcher of this machine, both are done already.
    """
    run_id = os.environ.get("SLIMLINE_PARENT_RUN", "")
    if not run_id:
        with reporting("begin"):
            checked = _checked(pipeline, attempt.given())
            name = f"{pipeline} {checked.get('name', '')}".strip()
            run_id = store.start_pipeline(name, pipeline, checked, f"kubeflow {_kubeflow_run()}".strip())
    with telling("begin"):  # as where a container cannot reach the store
        return Outcome(pipeline, "RUNNING", "", _links(run_id))


def _checked(pipeline: str, values: dict[str, Any]) -> dict[str, Any]:
    """The recipe as `slimline run` would check it; of a pipeline that did not come along, as it is."""
    values = {k: v for k, v in values.items() if k not in ("pipeline", *recipe.RESOURCES) and recipe.CHANNEL not in k}
    if pipeline not in recipe.pipelines():
        return values
    spec = portable.read(recipe.pipeline_file(pipeline)).spec
    checked = recipe.check(spec, recipe.whole_numbers(spec, values))
    if "name" in checked:
        store.check_name(checked["name"])
    return checked


def finish(pipeline: str, state: str, message: str = "") -> Outcome:
    """Close the run, say what came of it and tell whoever waits. Never raises: what was reached is not lost by this."""
    status, links = STATUS.get(state, "FAILED"), {}
    sentence = message
    try:
        run_id = store.pipeline_run()
        if run_id:
            lost = store.close_pipeline(run_id, status)
            tags = store.tags(run_id)
            step, sentence = _why(status, tags, lost, message)
            told = {"outcome": status, "failed_step": step, "sentence": sentence}
            store.set_tags(run_id, {store.PREFIX + key: value for key, value in told.items() if value})
            links = _links(run_id, tags)
    except Exception as error:  # the store may be what failed
        sentence = sentence or f"The run could not be closed in MLflow: {error}"
        print(f"finish: {error}", file=sys.stderr)  # noqa: T201
    outcome = Outcome(pipeline, status, sentence, links)
    tell(outcome)
    return outcome


def _why(status: str, tags: dict[str, str], lost: list[str], message: str) -> tuple[str, str]:
    """The step that failed, if one did, and the sentence that says what came of the run."""
    prefix = store.PREFIX + "result."
    if status == "FINISHED":
        verdict, told = tags.get(prefix + "verdict", ""), tags.get(prefix + "outcome", "All steps have finished.")
        return "", f"{verdict}. {told}" if verdict else told
    if failed := attempt.failures(tags):
        return failed[0].step, failed[0].message
    if lost:
        return lost[0], (
            f"{lost[0]} was ended from outside: out of memory, evicted, or past its time limit. Look at its pod; the "
            "same run submitted again goes on after what has finished."
        )
    return "", message or "No step says why. Look at the pods of the run."


def _links(run_id: str, tags: dict[str, str] | None = None) -> dict[str, str]:
    links = {"run in MLflow": store.page_of(run_id)}
    prefix = store.PREFIX + "result."
    if tags and prefix + "name" in tags:
        name, version = tags[prefix + "name"], tags[prefix + "version"]
        links[f"{name} version {version}"] = store.page_of(name=name, version=version)
    return {text: url for text, url in links.items() if url}


def _kubeflow_run() -> str:
    return os.environ.get("SLIMLINE_PIPELINE_RUN", "")


def show(outcome: Outcome, file: str) -> None:
    """Write what came of a run as Markdown, for the Kubeflow page."""
    lines = [f"**{outcome.title}**", "", outcome.sentence, ""]
    lines += [f"- [{text}]({url})" for text, url in outcome.links.items()]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("\n".join(lines).strip() + "\n", encoding="utf-8")


def tell(outcome: Outcome) -> bool:
    """Post what came of a run to the webhook, if one is set. True if it was taken; a log line if not, and no more."""
    url = os.environ.get("SLIMLINE_WEBHOOK", "")
    if not url:
        return False
    body = json.dumps(message_of(outcome)).encode()
    said = "it is no http address"
    for number in range(ATTEMPTS if url.startswith(("https://", "http://")) else 0):
        time.sleep(PAUSE_S * number)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return True
        except urllib.error.HTTPError as error:
            said = f"it answers {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, ValueError) as error:
            said = type(error).__name__
    print(f"finish: the webhook was not reached ({said}).", file=sys.stderr)  # noqa: T201
    return False


def message_of(outcome: Outcome) -> dict[str, Any]:
    """The outcome as Slack takes it: a text for notifications, blocks for the channel."""

    def section(text: str) -> dict[str, Any]:
        return {"type": "section", "text": {"type": "mrkdwn", "text": text[:LONGEST]}}

    links = " · ".join(f"<{url}|{_escaped(text)}>" for text, url in outcome.links.items())
    parts = (f"*{_escaped(outcome.title)}*", _escaped(outcome.sentence), links)
    return {
        "text": _escaped(f"{outcome.title}. {outcome.sentence}")[:LONGEST],
        "blocks": [section(part) for part in parts if part],
    }


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
