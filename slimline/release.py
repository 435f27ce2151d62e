"""From measurements to the registry: judge, register, promote, roll back, and the page about it all.

    judge      both blessings against the limits -> a sealed verdict
    register   one version per candidate and limits, however often it is asked
    promote    compare-and-set: the champion moves only from where it stood when the verdict was given
    rollback   the champion and the one before it change places

MLflow's aliases have no compare-and-set, so every move first takes the next number in a ledger, a file that only one
process can create; whoever comes second loses with a sentence.
"""

# Long because judging, registering and moving the champion are one story, told once.
from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from slimline import artifact, gate, progress, step, store
from slimline import evidence as evidence_of
from slimline.artifact import Manifest
from slimline.errors import ConfigError, GateError, StoreError
from slimline.step import Made
from slimline.technique import BaseConfig, Metrics, Stored

CHAMPION, CHALLENGER, PREVIOUS = ALIASES = ("champion", "challenger", "previous")


class Judging(BaseConfig):
    """What a verdict depends on, beside the candidate: part of its key."""

    name: str
    champion: int | None
    limits: gate.Limits
    quality: Stored
    baseline: Stored
    latency: Stored
    divergence: Stored = ""
    choices: Stored = ""
    choices_baseline: Stored = ""


MEASURED = ("quality", "baseline", "latency", "divergence", "choices", "choices_baseline")


def judge(
    name: str,
    source: str,
    quality: str,
    baseline: str,
    latency: str,
    limits: dict[str, Any],
    divergence: str = "",
    choices: str = "",
    choices_baseline: str = "",
) -> tuple[str, Metrics]:
    """Give the verdict on a candidate and store it. Returns its ref and its numbers.

    The last three are further evaluations of a language model: evaluate.divergence of the candidate, and
    evaluate.multiple_choice of it and of the baseline.
    """
    with step.reporting("gate"):
        store.check_name(name)
        config = Judging(
            name=name, champion=store.alias(name, CHAMPION), limits=gate.limits_from(limits),
            quality=quality, baseline=baseline, latency=latency, divergence=divergence,
            choices=choices, choices_baseline=choices_baseline,
        )  # fmt: skip
        if bool(choices) != bool(choices_baseline):
            raise ConfigError(
                "multiple choice is judged against the baseline's. Give both choices and choices_baseline."
            )
        candidate = step.resolve(source)
        evidence = {key: [step.resolve(ref)] for key in MEASURED if (ref := getattr(config, key))}

        def make(out: Path, tell: Any) -> Made:
            found = {key: inputs[0].path for key, inputs in evidence.items()}
            pair = (found["choices"], found["choices_baseline"]) if choices else None
            verdict = gate.decide(
                evidence_of.quality(found["quality"]),
                evidence_of.quality(found["baseline"]),
                evidence_of.speed(found["latency"], candidate.digest),
                bless(candidate.path),
                config.limits,
                strays=evidence_of.strays(found["divergence"]) if divergence else None,
                choices=(evidence_of.predictions(pair[0]), evidence_of.predictions(pair[1])) if pair else None,
            )
            text = verdict.model_dump_json(indent=2)
            (out / "verdict.json").write_text(text, encoding="utf-8")
            manifest = candidate.manifest or artifact.read(candidate.path)
            return Made(
                _numbers(verdict), "evaluation", manifest.task, manifest.labels, manifest.base,
                candidate.digest, manifest.history,
            )  # fmt: skip

        return step.perform("gate", config, {"source": candidate}, evidence, step.code_digest("slimline.release"), make)


def bless(model: Path) -> gate.Blessing:
    """The mechanical blessing: these bytes load and answer in a process that knows nothing of this one."""
    done = subprocess.run([sys.executable, "-m", "slimline.serve", str(model)], capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout.strip().split("\n")[-1])
        return gate.Blessing(ok=bool(answer["ok"]), problem=str(answer["problem"]))
    except (ValueError, KeyError):
        last = (done.stderr.strip().split("\n") or [""])[-1]
        return gate.Blessing(ok=False, problem=f"the fresh process ended with {done.returncode}: {last[:300]}")


def _numbers(verdict: gate.Verdict) -> Metrics:
    numbers = {"passed": float(verdict.status == "PASS")}
    for check in verdict.checks:
        for key in ("value", "low", "high", "limit"):
            number = getattr(check, key)
            if number is not None:
                numbers[f"{check.name}_{key}".replace(" ", "_")] = float(number)
    return numbers


def verdict_at(ref: str) -> tuple[gate.Verdict, Judging, Manifest]:
    """A stored verdict, what it was asked, and the manifest that seals it."""
    folder = store.fetch(ref)
    manifest = artifact.read(folder)
    verdict = gate.Verdict.model_validate_json((folder / "verdict.json").read_text(encoding="utf-8"))
    return verdict, Judging.model_validate(manifest.history[-1].config), manifest


def register(name: str, source: str, verdict_ref: str) -> int:
    """The version of `name` for this candidate under these limits: made now, or found. Becomes the challenger."""
    with step.reporting("register"):
        start = time.perf_counter()
        verdict, asked, _ = verdict_at(verdict_ref)
        candidate = step.resolve(source)
        manifest = candidate.manifest or artifact.read(candidate.path)
        tags = {
            "verdict": verdict.status, "verdict_ref": verdict_ref, "digest": candidate.digest,
            "limits": asked.limits.digest(), "format": manifest.format, "base": manifest.base,
            "pipeline_run": store.pipeline_run(),
        }  # fmt: skip
        version = store.register(
            name, source, key=f"{candidate.digest}-{asked.limits.digest()}",
            version_tags={store.PREFIX + k: v for k, v in tags.items() if v}, description=_card(verdict, manifest),
        )  # fmt: skip
        store.tag_version(name, version, {store.PREFIX + k: v for k, v in tags.items() if v})
        if store.alias(name, CHAMPION) != version:
            store.set_alias(name, CHALLENGER, version)
        progress.emit("end", "register", reused=False, seconds=time.perf_counter() - start)
        return version


def _card(verdict: gate.Verdict, manifest: Manifest) -> str:
    about = f"Base: {manifest.base} · format: {manifest.format} · {manifest.weights_bytes / 1e6:.1f} MB of weights"
    lines = [f"**{verdict.sentence}**", "", about, "", "| stage | seconds |", "| --- | --- |"]
    lines += [f"| {stage.technique} | {stage.seconds:.0f} |" for stage in manifest.history]
    return "\n".join(lines)


def promote_if_passed(name: str, version: int, verdict_ref: str) -> str:
    """What the pipeline does: promote on PASS, else leave the champion where it is. One sentence says which."""
    with step.reporting("promote"):
        start = time.perf_counter()
        verdict, asked, _ = verdict_at(verdict_ref)
        if not verdict.allows_promotion:
            sentence = f"Version {version} of {name} is registered, not promoted: the verdict is {verdict.status}."
        elif store.alias(name, CHAMPION) == version:
            sentence = f"Version {version} of {name} is the champion already."
        else:
            try:
                sentence = _move(name, version, expected=asked.champion, why=verdict.sentence)
            except GateError as error:
                sentence = f"Version {version} of {name} is registered, not promoted: {error}"
        progress.emit("end", "promote", reused=False, seconds=time.perf_counter() - start)
        return sentence


def promote(name: str, version: int | None = None, allow_inconclusive: bool = False) -> str:
    """Make a version (without one: the challenger) the champion. Raises GateError if its verdict does not allow it."""
    store.check_name(name)
    version = version if version is not None else store.alias(name, CHALLENGER)
    if version is None:
        raise ConfigError(f"{name} has no challenger. Give a version: see `slimline ui`.")
    champion = store.alias(name, CHAMPION)
    if champion == version:
        return f"Version {version} of {name} is the champion already."
    ref = store.version_of(f"models:/{name}/{version}").tags.get(store.PREFIX + "verdict_ref", "")
    if not ref:
        raise GateError(f"version {version} of {name} has no verdict. Run the pipeline that measures it.")
    verdict, _, manifest = verdict_at(ref)
    sealed = artifact.read(store.fetch(f"models:/{name}/{version}"))
    if manifest.history[-1].parent != sealed.digest:
        raise GateError(f"the verdict on version {version} of {name} is about other bytes. Run the pipeline again.")
    wanted = ("PASS", "INCONCLUSIVE") if allow_inconclusive else ("PASS",)
    if verdict.status not in wanted:
        hint = " --allow-inconclusive would." if verdict.status == "INCONCLUSIVE" else ""
        raise GateError(f"version {version} of {name} is not promoted: its verdict is {verdict.status}.{hint}")
    return _move(name, version, expected=champion, why=verdict.sentence, forced=verdict.status != "PASS")


def rollback(name: str) -> str:
    """Give the champion's place back to the version before it; a second rollback undoes the first."""
    store.check_name(name)
    before, champion = store.alias(name, PREVIOUS), store.alias(name, CHAMPION)
    if before is None or champion is None:
        raise GateError(f"{name} has no version before the champion to go back to. See `slimline ui`.")
    return _move(name, before, expected=champion, why="rollback")


def _move(name: str, version: int, expected: int | None, why: str, forced: bool = False) -> str:
    """Point the champion from `expected` to `version`, or raise GateError because it has moved meanwhile."""
    with _ledger(name) as ledger:
        entries = sorted(ledger.glob("*.json"))
        standing = store.alias(name, CHAMPION)
        if standing != expected:
            raise GateError(
                f"the champion of {name} moved from {_said(expected)} to {_said(standing)} since the verdict. "
                "Run the pipeline again to compare with that one."
            )
        entry = {
            "name": name, "from": expected, "to": version, "why": why, "forced": forced, "who": _who(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }  # fmt: skip
        _claim(ledger / f"{len(entries) + 1:06}.json", entry, name)
        store.set_alias(name, CHAMPION, version)
        if expected is not None:
            store.set_alias(name, PREVIOUS, expected)
        if store.alias(name, CHALLENGER) == version:
            store.set_alias(name, CHALLENGER, None)
        if store.alias(name, CHAMPION) != version:
            raise GateError(f"the champion of {name} was moved by somebody else just now. Look at it, and try again.")
        store.tag_model(name, {f"{store.PREFIX}move.{len(entries) + 1:06}": json.dumps(entry)})
    was = f" in place of version {expected}" if expected is not None else ""
    return f"Version {version} of {name} is now the champion{was}."


@contextmanager
def _ledger(name: str) -> Iterator[Path]:
    folder = store.home() / "promotions" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        yield folder


def _claim(file: Path, entry: dict[str, Any], name: str) -> None:
    """Create the next entry; only one process can. A crash after this leaves the alias where it was."""
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        raise GateError(f"somebody else is moving the champion of {name} right now. Try again.") from None
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        json.dump(entry, out)
        out.flush()
        os.fsync(out.fileno())


def _said(version: int | None) -> str:
    return "none" if version is None else f"version {version}"


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def show(ref: str, numbers: Metrics, model: Any, metrics: Any) -> str:
    """Fill the Kubeflow page's artifacts for a stored model: small, for display only. Returns the ref."""
    metrics.metadata.update(numbers)
    manifest = artifact.read(store.fetch(ref))
    card = {
        "ref": ref, "format": manifest.format, "digest": manifest.digest,
        "size_mb": round(manifest.size_bytes / 1e6, 3), "history": " > ".join(s.technique for s in manifest.history),
    }  # fmt: skip
    if ref.startswith("runs:/") and (page := store.page_of(store.run_id_of(ref))):
        card["mlflow"] = page
    model.metadata.update(card)
    Path(model.path).write_text(json.dumps(card, indent=2), encoding="utf-8")
    return ref


def about(ref: str) -> dict[str, Any]:
    """What `slimline show` says of a model, as plain data."""
    found = step.resolve(ref)
    if found.manifest is None:
        raise StoreError(f"{ref} is not a model that slimline made: it has no manifest. Bring it in with fetch.local.")
    about: dict[str, Any] = {
        **found.manifest.model_dump(mode="json", exclude={"version"}),  # the manifest's own; below is the model's
        "size_bytes": found.manifest.size_bytes,
    }
    if ref.startswith("models:/") and not ref.startswith("models:/m-"):
        version = store.version_of(ref)
        about |= {
            "version": int(version.version),
            "aliases": [a for a in ALIASES if store.alias(version.name, a) == int(version.version)],
            "verdict": version.tags.get(store.PREFIX + "verdict", ""),
        }  # fmt: skip
    return about


def examine_store() -> str:
    """Where the store is, once it has answered. Raises StoreError otherwise."""
    store.client()
    return store.uri()
