"""The model card of a version, by the conventions of the Hugging Face Hub: YAML before Markdown.

MLflow's page shows the description of a version as Markdown and knows no YAML before it: there the same YAML stands at
the end, as code. MLflow's tables have room for store.DESCRIPTION characters; what does not fit is left out from the
stages' options first.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from slimline import artifact, decoder, store
from slimline.artifact import Manifest
from slimline.errors import SlimlineError
from slimline.gate import Verdict
from slimline.judging import Judging

LIBRARIES = {"hf": "transformers", "onnx": "onnx", "genai": "onnxruntime-genai", "tensorrt": "tensorrt"}
LONGEST = 80
"""Characters of a stage's options that are shown."""


def description(name: str, version: int, verdict: Verdict, asked: Judging, manifest: Manifest) -> str:
    """The card as the description of a version in MLflow, short enough for it."""
    matter = f"\n```yaml\n{yaml.safe_dump(front(name, verdict, asked, manifest), sort_keys=False)}```\n"
    text = ""
    for room in (LONGEST, 0):
        text = body(name, version, verdict, asked, manifest, room) + matter
        if len(text) <= store.DESCRIPTION:
            return text
    end = f"\n\n*Cut: the whole card is `slimline card models:/{name}/{version}`.*\n"
    whole_lines, _, _ = text[: store.DESCRIPTION - len(end)].rpartition("\n")
    return whole_lines + end


def whole(name: str, version: int, verdict: Verdict, asked: Judging, manifest: Manifest) -> str:
    """The card as a README.md for the Hub."""
    matter = yaml.safe_dump(front(name, verdict, asked, manifest), sort_keys=False)
    return f"---\n{matter}---\n\n{body(name, version, verdict, asked, manifest)}"


def front(name: str, verdict: Verdict, asked: Judging, manifest: Manifest) -> dict[str, Any]:
    """What the Hub reads of a card. A licence is not among it: what comes in as weights does not say its own."""
    task = manifest.task or "other"
    matter: dict[str, Any] = {
        "library_name": LIBRARIES.get(manifest.format, manifest.format),
        "pipeline_tag": task,
        "tags": ["slimline", manifest.format],
    }
    if manifest.base.startswith("hub:"):
        matter["base_model"] = manifest.base.removeprefix("hub:").partition("@")[0]
    stage = _stage(asked.quality)
    metric = verdict.limits.metric
    if stage and metric in stage.metrics:
        data = str(stage.config.get("data", "")).rpartition("/")[2] or "data"
        matter["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"name": data, "type": data, "split": str(stage.config.get("split", "test"))},
                        "metrics": [{"type": metric, "value": round(stage.metrics[metric], 4)}],
                    }
                ],
            }
        ]
    return matter


def body(
    name: str, version: int, verdict: Verdict, asked: Judging, manifest: Manifest, room: int = LONGEST
) -> str:  # fmt: skip
    """The card without its YAML: at most `room` characters of a stage's options."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "mb": lambda n: f"{n / 1e6:.1f} MB"}
    template = (resources.files("slimline") / "card.md.j2").read_text(encoding="utf-8")
    stage = _stage(asked.quality)
    return environment.from_string(template).render(
        name=name,
        version=version,
        verdict=verdict,
        manifest=manifest,
        kind=f"a {manifest.task.replace('-', ' ')} model" if manifest.task else "a model",
        language=manifest.task == decoder.TASK,
        data=str(stage.config.get("data", "")) if stage else "",
        digest=stage.data.get("data", "") if stage else "",
        measured=_measured(asked, verdict.limits.metric),
        stages=[(s, _options(s.config, room)) for s in manifest.history],
        margin=_allowed(verdict),
    )


def cell(value: object) -> str:
    """Text that is safe in a cell of a Markdown table, and is not read as HTML or as Markdown."""
    text = " ".join(str(value).split()).replace("\\", "\\\\")
    for sign in "|<`*_[":
        text = text.replace(sign, "\\" + sign)
    return text


def _allowed(verdict: Verdict) -> str:
    limits = verdict.limits
    if limits.metric == "perplexity":
        return f"{limits.margin:.1%} more perplexity"
    return f"{100 * limits.margin:.1f} points of {limits.metric.replace('_', ' ')}"


def _measured(asked: Judging, metric: str) -> list[tuple[str, float, float, float]]:
    """The metric of candidate, baseline and champion, each with its interval, of those that are stored."""
    found = []
    for who, ref in (("this model", asked.quality), ("the baseline", asked.baseline), ("the champion", asked.rival)):
        numbers = stage.metrics if (stage := _stage(ref)) else {}
        if metric in numbers:
            value = numbers[metric]
            found.append((who, value, numbers.get(f"{metric}_low", value), numbers.get(f"{metric}_high", value)))
    return found


def _stage(ref: str) -> artifact.Stage | None:
    """The last stage of what a ref names, or None where it is gone: a card is written all the same."""
    try:
        return artifact.read(store.fetch(ref)).history[-1] if ref else None
    except SlimlineError:
        return None


def _options(config: dict[str, Any], room: int) -> str:
    text = " ".join(f"{key}={value}" for key, value in config.items() if value not in ("", None, [], {}))
    return text if len(text) <= room else f"{text[: max(room - 1, 0)]}…" if room else ""
