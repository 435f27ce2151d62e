"""Retraining: the champion made again by its own recipe, from the data that there are now.

The recipe, with the very base that it starts from, is read back from the run that made the champion. Data come under a
name that stays the same while the bytes behind it change, so they are frozen first, in the plan's run: every step after
it reads those. What the champion's evaluation kept of its own data (drift.py) tells which texts are new, whether one
that the champion has learnt from would now judge it, and how far the new ones are from the old.

Without new texts there is nothing to do: the plan says so, and the run ends there. Nothing that was planned before is
ever reused in its place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from slimline import drift, judging, ledger, portable, progress, recipe, step, store
from slimline.errors import ConfigError, DataError
from slimline.technique import Metrics

PIPELINE = "optimize"
"""Whose champions can be made again: language models are not trained here."""


class Plan(NamedTuple):
    """Whether there is something to do, why in a sentence, and the parameters of `optimize` to do it with."""

    due: bool
    sentence: str
    parameters: dict[str, Any]
    numbers: Metrics


def plan(name: str, data: str, min_new: int = 1) -> Plan:
    """What is to be done now. Raises ConfigError without a champion that `optimize` made, DataError for unfit data."""
    with step.timed("plan") as numbers:
        store.check_name(name)
        if min_new < 1:
            raise ConfigError(f"min_new is {min_new}. Ask for 1 new text or more.")
        version, parameters = made_by(name)
        given = step.resolve(data)
        if given.path.is_dir():
            raise DataError(f"{data} is a folder. Name the file with the examples.")
        config = {"name": name, "data": data, "champion": version, "min_new": min_new}
        tags = {"data.data": given.digest, "champion": str(version)}
        with store.step_run("plan", {store.PREFIX + key: value for key, value in tags.items()}, config) as run_id:
            store.log_data(run_id, given.path, given.digest, "retraining")
            due, sentence, found = look(name, version, given.path, min_new)
            numbers |= found
            store.log_metrics(run_id, numbers)
            store.set_tags(run_id, {store.PREFIX + "sentence": sentence})
            if due:
                parameters["data"] = store.save_data(run_id, given.path, given.digest)
                _keep(parameters)
            _tell(due, sentence)
        return Plan(due, sentence, parameters, numbers)


def handed(planned: Plan) -> tuple[Any, ...]:
    """What the step `plan` hands on: whether it is due, and every parameter of `optimize` in alphabetical order."""
    spec = portable.read(recipe.pipeline_file(PIPELINE)).spec
    whole = recipe.check(spec, planned.parameters, here=False)
    names = sorted(name for name in whole if not name.startswith("resources_"))
    return ("yes" if planned.due else "no", *(whole[name] for name in names))


def made_by(name: str) -> tuple[int, dict[str, Any]]:
    """The champion's version, and the whole recipe that made it."""
    version = store.alias(name, ledger.CHAMPION)
    if version is None:
        raise ConfigError(f"{name} has no champion to make again. Run {PIPELINE} first.")
    tags = store.version_of(f"models:/{name}/{version}").tags
    run_id = tags.get(store.PREFIX + "pipeline_run", "")
    pipeline = store.tags(run_id).get(store.PREFIX + "pipeline", "") if run_id else ""
    if pipeline not in (PIPELINE, "retrain"):
        raise ConfigError(
            f"version {version} of {name} was made by {pipeline or 'no pipeline'}, not by {PIPELINE}: there is no "
            "recipe to train it again by."
        )
    file = store.fetch_file(run_id, "recipe.yaml" if pipeline == PIPELINE else PLANNED)
    parameters = yaml.safe_load(file.read_text(encoding="utf-8"))
    return version, {key: value for key, value in parameters.items() if not key.startswith("resources_")}


PLANNED = f"{PIPELINE}.yaml"
"""The artifact of a retraining's run with the recipe that it went by."""


def look(name: str, version: int, file: Path, min_new: int) -> tuple[bool, str, Metrics]:
    """Whether a data set is reason to make a champion again, in words and in numbers. Raises DataError for leaks."""
    new = drift.look(file)
    numbers = {"texts": float(len(new.text_N))}
    old = _kept(name, version)
    if old is None:
        said = f"Version {version} of {name} kept nothing of its data: all {len(new.text_N)} texts count as new."
        return True, said, numbers
    drift.refuse_leaks(old, new, file.name)
    fresh_N = drift.fresh(old, new)
    count, judging_now = int(fresh_N.sum()), int((fresh_N & (new.split_N == "test")).sum())
    numbers |= {"new_texts": float(count), "new_test_texts": float(judging_now)}
    if count < min_new:
        few = f"only {count} new texts, and {min_new} are asked for" if count else "no new text"
        return False, f"Nothing to do: {file.name} has {few} since version {version} of {name}.", numbers
    found = drift.compare(old, drift.only(new, fresh_N))
    for what, size in found.size.items():
        numbers |= {f"drift_{what}": size, f"drift_{what}_p": found.p[what]}
    numbers["drifted"] = float(bool(found.drifted))
    drifted = ", ".join(f"{what} ({found.size[what]:.2f})" for what in found.drifted) or "none"
    return True, (
        f"{count} of {len(new.text_N)} texts are new since version {version} of {name}, {judging_now} of them in split "
        f"test. Drift: {drifted}."
    ), numbers  # fmt: skip


def _kept(name: str, version: int) -> drift.Inputs | None:
    """What the evaluation of the champion's baseline kept of the data set, if it kept something."""
    ref = store.version_of(f"models:/{name}/{version}").tags.get(store.PREFIX + "verdict_ref", "")
    if not ref:
        return None
    _, asked, _ = judging.verdict_at(ref)
    return drift.read(store.fetch(asked.baseline))


def _tell(due: bool, sentence: str) -> None:
    if due:
        progress.emit("note", "plan", text=sentence)
        return
    progress.emit("summary", "plan", status="NOTHING_NEW", outcome=sentence)
    if parent := store.pipeline_run():
        store.set_tags(parent, {f"{store.PREFIX}result.outcome": sentence})


def _keep(parameters: dict[str, Any]) -> None:
    """Write the recipe into the pipeline's run, for the next retraining."""
    if parent := store.pipeline_run():
        with tempfile.TemporaryDirectory(prefix="slimline-") as scratch:
            file = Path(scratch) / PLANNED
            file.write_text(yaml.safe_dump(parameters, sort_keys=False), encoding="utf-8")
            store.log_file(parent, file)
