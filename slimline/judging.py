"""The gate as a step: both blessings against the limits, as a sealed verdict.

What a verdict depends on is in its key: the candidate, the evaluations, the limits, and where the champion stood when
the pipeline began. `release` promotes only from there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from slimline import artifact, gate, ledger, step, store
from slimline import evidence as evidence_of
from slimline.artifact import Manifest
from slimline.errors import ConfigError
from slimline.step import Made
from slimline.technique import BaseConfig, Metrics, Stored


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
    rival: Stored = ""


MEASURED = ("quality", "baseline", "latency", "divergence", "choices", "choices_baseline", "rival")


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
    champion: str | None = None,
    rival: str = "",
) -> tuple[str, Metrics]:
    """Give the verdict on a candidate and store it. Returns its ref and its numbers.

    `divergence`, `choices` and `choices_baseline` are further evaluations of a language model: evaluate.divergence of
    the candidate, and evaluate.multiple_choice of it and of the baseline. `champion` is the ref of the version that
    stood when the pipeline began, empty if there was none, and `rival` its quality evaluation on the same examples.
    """
    with step.reporting("gate"):
        store.check_name(name)
        config = Judging(
            name=name, champion=_standing(name, champion), limits=gate.limits_from(limits),
            quality=quality, baseline=baseline, latency=latency, divergence=divergence,
            choices=choices, choices_baseline=choices_baseline, rival=rival,
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
            blessing = bless(candidate.path)
            verdict = gate.decide(
                evidence_of.quality(found["quality"]),
                evidence_of.quality(found["baseline"]),
                evidence_of.speed(found["latency"], candidate.digest),
                blessing,
                config.limits,
                strays=evidence_of.strays(found["divergence"]) if divergence else None,
                choices=(evidence_of.predictions(pair[0]), evidence_of.predictions(pair[1])) if pair else None,
                champion=gate.Champion(
                    ledger.said(config.champion), evidence_of.quality(found["rival"]) if rival else None
                ) if config.champion else None,
            )  # fmt: skip
            text = verdict.model_dump_json(indent=2)
            (out / "verdict.json").write_text(text, encoding="utf-8")
            (out / ANSWERS).write_text(json.dumps(blessing.answers, indent=2), encoding="utf-8")
            manifest = candidate.manifest or artifact.read(candidate.path)
            return Made(
                _numbers(verdict), "evaluation", manifest.task, manifest.labels, manifest.base,
                candidate.digest, manifest.history,
            )  # fmt: skip

        return step.perform("gate", config, {"source": candidate}, evidence, step.code_digest("slimline.judging"), make)


ANSWERS = "answers.json"
"""What the candidate answered to the gate itself, beside the verdict: see probe.py."""


def _standing(name: str, ref: str | None) -> int | None:
    """The version behind the ref of a champion. Without one, as in an older pipeline, whoever stands now."""
    if ref is None:
        return store.alias(name, ledger.CHAMPION)
    head, _, number = ref.rpartition("/")
    if ref and (head != f"models:/{name}" or not number.isdigit()):
        raise ConfigError(f"{ref!r} is no version of {name}. Give models:/{name}/NUMBER, or nothing for none.")
    return int(number) if ref else None


def bless(model: Path) -> gate.Blessing:
    """The mechanical blessing: these bytes load and answer in a process that knows nothing of this one."""
    answer, problem = apart("slimline.serve", str(model))
    if not answer.keys() >= {"ok", "problem", "answers"}:
        return gate.Blessing(ok=False, problem=f"the fresh process {problem}")
    return gate.Blessing(bool(answer["ok"]), str(answer["problem"]), dict(answer["answers"]))


def apart(module: str, *arguments: str, given: str = "") -> tuple[dict[str, Any], str]:
    """What a module, run in a process of its own, answers as JSON in its last line, and how that process ended.

    The answer is empty where there is none.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    last = (done.stderr.strip().split("\n") or [""])[-1]
    ended = f"ended with {done.returncode}: {last[:300]}"
    try:
        answer = json.loads(done.stdout.strip().split("\n")[-1])
    except ValueError:
        return {}, ended
    return (answer if isinstance(answer, dict) else {}), ended


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
