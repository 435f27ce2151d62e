"""Gather what a pipeline run made, measured and decided into one page and one table, and publish both."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from slimline import __version__, artifact, evidence, judging, ledger, progress, report, step, store
from slimline.errors import StoreError

WORST = 10
"""Flips that are shown with their text."""


def publish(
    name: str,
    version: int,
    outcome: str,
    models: list[str],
    qualities: list[str],
    latency: str,
    verdict: str,
    file: str,
) -> str:
    """Write the page to `file`, log it to the pipeline's run, and tell the watcher. Returns where the page is."""
    with step.timed("report"):
        page = gather(name, version, outcome, models, qualities, latency, verdict)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(report.render(page), encoding="utf-8")
        run_id = store.pipeline_run() or store.run_id_of(verdict)
        where = keep(run_id, Path(file))
        store.tag_version(name, version, {store.PREFIX + "report": f"runs:/{run_id}/report.html"})
        result = {"name": name, "version": version, "verdict": page.verdict.status, "outcome": outcome}
        store.set_tags(run_id, {f"{store.PREFIX}result.{key}": str(value) for key, value in result.items()})
        progress.emit(
            "summary",
            "report",
            name=name,
            version=version,
            status=page.verdict.status,
            sentence=page.verdict.sentence,
            outcome=outcome,
            promoted=store.alias(name, ledger.CHAMPION) == version,
            report=str(where),
            rows=[row.model_dump(mode="json") for row in page.rows],
            terms=page.terms.model_dump(mode="json"),
        )
        return str(where)


def gather(
    name: str, version: int, outcome: str, models: list[str], qualities: list[str], latency: str, verdict_ref: str
) -> report.Page:
    """Everything that the page shows, from what is stored."""
    verdict, asked, _ = judging.verdict_at(verdict_ref)
    timed = evidence.timings(store.fetch(latency))
    terms = ANSWERS if verdict.limits.metric != "perplexity" else LANGUAGE
    rows: dict[str, report.Row] = {}
    for ref, quality in zip(models, qualities, strict=True):
        manifest = artifact.read(store.fetch(ref))
        if manifest.digest not in rows:
            measured = evidence.variant(timed, manifest.digest)
            rows[manifest.digest] = _row(manifest, measured, terms.metric, _metrics(quality))
    base, last = next(iter(rows)), artifact.read(store.fetch(models[-1]))
    rows[base] = _with(rows[base], _beside(asked.choices_baseline), is_baseline=True)
    rows[last.digest] = _with(rows[last.digest], _beside(asked.choices, asked.divergence), is_candidate=True)
    judged = artifact.read(store.fetch(asked.quality)).history[-1]
    answered = (asked.choices_baseline, asked.choices) if terms is LANGUAGE else (asked.baseline, asked.quality)
    parent = store.pipeline_run()
    return report.Page(
        name=name,
        version=version,
        outcome=outcome,
        verdict=verdict,
        terms=terms.model_copy(update={k: getattr(terms, k).format(**timed) for k in ("many", "timed")}),
        rows=tuple(rows.values()),
        flips=worst_flips(*(evidence.table(store.fetch(ref)) for ref in answered)) if all(answered) else (),
        lineage=last.history,
        refs={"candidate": models[-1], "baseline": models[0], "verdict": verdict_ref, "latency": latency},
        machine=timed["machine"],
        data=str(judged.config.get("data", "")),
        data_digest=judged.data.get("data", ""),
        command=store.tags(parent).get(store.PREFIX + "command", "") if parent else "",
        slimline_version=__version__,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


ANSWERS = report.Terms(
    metric="accuracy",
    unit="%",
    factor=100,
    one="text",
    many="texts/s in batches of {batch_size}",
    timed="{queries} single texts of real length, {threads} thread(s), tokenization included, all models interleaved.",
    others="By label and by length",
    mistakes="What the baseline had right and this model is surest to have wrong.",
)
LANGUAGE = report.Terms(
    metric="perplexity",
    rising=False,
    one="token",
    many="prompt tokens/s",
    timed="Tokens decoded one at a time after a prompt of real text, {threads} thread(s), all models interleaved.",
    others="Beside perplexity",
    mistakes="Of the multiple choice, what the baseline had right and this model is surest to have wrong.",
)
BESIDE = {
    "evaluate.divergence": ("kl_mean", "agreement"),
    "evaluate.multiple_choice": ("accuracy", "acc_norm"),
}
"""Metrics of further evaluations that the page shows."""


def _metrics(quality: str) -> dict[str, float]:
    return artifact.read(store.fetch(quality)).history[-1].metrics


def _beside(*refs: str) -> dict[str, float]:
    """The numbers of further evaluations, by names that a page can show."""
    found: dict[str, float] = {}
    for ref in filter(None, refs):
        stage = artifact.read(store.fetch(ref)).history[-1]
        wanted = BESIDE.get(stage.technique, ())
        method = "multiple choice" if stage.technique == "evaluate.multiple_choice" else "divergence"
        found |= {f"{method} {key}": stage.metrics[key] for key in wanted if key in stage.metrics}
    return found


def _with(row: report.Row, others: dict[str, float], **changes: bool) -> report.Row:
    return row.model_copy(update={"others": {**row.others, **others}, **changes})


def _row(manifest: artifact.Manifest, timed: dict[str, Any], metric: str, found: dict[str, float]) -> report.Row:
    shared = {key: timed[key] for key in report.Row.model_fields if key in timed}
    own = (metric, f"{metric}_low", f"{metric}_high")
    return report.Row(
        **shared,
        technique=manifest.history[-1].technique,
        quality=found[own[0]],
        quality_low=found[own[1]],
        quality_high=found[own[2]],
        is_baseline=False,
        is_candidate=False,
        others={k: v for k, v in found.items() if (k.startswith(OTHERS) or k in ALONE) and k not in own},
    )


OTHERS, ALONE = ("recall_", "accuracy_"), ("macro_f1", "bits_per_byte")
"""Further metrics that the page shows, by how they begin and by name."""


def worst_flips(base: dict[str, list[Any]], candidate: dict[str, list[Any]]) -> tuple[report.Flip, ...]:
    """Where the baseline was right and the candidate is wrong, the most certain mistakes first."""
    flips = [
        report.Flip(
            text=base["text"][i],
            label=label,
            before=base["predicted"][i],
            before_score=base["score"][i],
            after=candidate["predicted"][i],
            after_score=candidate["score"][i],
        )
        for i, label in enumerate(base["label"])
        if base["predicted"][i] == label != candidate["predicted"][i]
    ]
    return tuple(sorted(flips, key=lambda flip: -flip.after_score)[:WORST])


def keep(run_id: str, file: Path) -> Path | str:
    """Log the page to a run as report.html. Returns its path, or its ref where the store is elsewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        named = Path(scratch) / "report.html"
        shutil.copyfile(file, named)
        store.log_file(run_id, named)
    folder = store.local_artifacts(run_id)
    return folder / "report.html" if folder else f"runs:/{run_id}/report.html"


def page_of(ref: str) -> Path:
    """The page about a registered version, or of a pipeline run by its id, as a local file."""
    if ref.startswith("models:/"):
        tag = store.version_of(ref).tags.get(store.PREFIX + "report", "")
        if not tag:
            raise StoreError(f"{ref} has no report. Run the pipeline that makes one.")
        run_id = tag.removeprefix("runs:/").split("/")[0]
    else:
        run_id = store.run_id_of(ref) if ref.startswith("runs:/") else ref
        run_id = store.tags(run_id).get("mlflow.parentRunId", run_id)
    return store.fetch_file(run_id, "report.html")
