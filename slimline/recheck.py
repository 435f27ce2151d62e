"""The last look before the champion moves: what is registered, fetched anew, is what was judged and answers as it did.

Run in a process of its own, `python -m slimline.recheck`, with a Wanted as JSON on standard input: one line of JSON
comes back, and exit code 0, or 3 with the problem. The bytes are read from the store itself, not from a copy of this
machine, and must have the digest that was judged; they must load and pass the mechanical blessing (probe.py); and they
must answer as was recorded: real examples of the quality evaluation, or for a language model the losses that the gate
saw. Answers that were close calls are passed over, since another processor rounds otherwise.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from slimline import evidence, judging, probe, serve, store
from slimline.errors import GateError, SlimlineError, StoreError

EXAMPLES = 8
"""Recorded answers that are asked for again, the surest of the evaluation's first hundred."""
SURE = 0.05
"""How far a label's probability may move."""
CLOSE = 0.1
"""How far a language model's mean loss of a token may move, in nats."""


class Wanted(NamedTuple):
    """Which version, the digest that was judged, and the refs of what it answered."""

    ref: str
    digest: str
    quality: str
    verdict: str


def require(name: str, version: int, verdict_ref: str) -> None:
    """Raise GateError unless a version is what was judged, or StoreError if it could not be looked at.

    A version without a verdict, which somebody made champion by hand, is held to the digest it was registered with.
    """
    ref = f"models:/{name}/{version}"
    digest, quality = store.version_of(ref).tags.get(store.PREFIX + "digest", ""), ""
    if verdict_ref:
        _, asked, sealed = judging.verdict_at(verdict_ref)
        quality, judged = asked.quality, sealed.history[-1].parent
        if digest != judged:
            raise GateError(
                f"the verdict on version {version} of {name} is about other bytes ({judged[:12]}) than are registered "
                f"({digest[:12] or 'unknown'}). Run the pipeline again."
            )
    if not digest:
        raise GateError(f"version {version} of {name} has no digest: slimline did not register it, so cannot vouch.")
    wanted = Wanted(ref, digest, quality, verdict_ref)
    answer, ended = judging.apart("slimline.recheck", given=json.dumps(wanted._asdict()))
    if not answer:
        raise GateError(f"version {version} of {name} does not load: its process {ended}")
    if answer["unreachable"]:
        raise StoreError(answer["problem"])
    if answer["problem"]:
        raise GateError(f"version {version} of {name} is not what was judged: {answer['problem']}")


def problem(wanted: Wanted) -> str:
    """What is wrong with a version; empty if nothing is."""
    with tempfile.TemporaryDirectory(prefix="slimline-") as scratch:
        path = store.fetch_again(wanted.ref, Path(scratch))
        found = probe.probe(path)
        if found["digest"] and found["digest"] != wanted.digest:
            return f"its digest is {found['digest'][:12]}, not {wanted.digest[:12]}. Register it again."
        if not found["ok"]:
            return f"it does not run: {found['problem']}"
        if not wanted.verdict:
            return ""
        recorded = store.fetch(wanted.quality)
        if (recorded / "predictions.parquet").is_file():
            return changed_labels(path, evidence.table(recorded))
        answers = store.fetch(wanted.verdict) / judging.ANSWERS
        return changed_losses(found["answers"], json.loads(answers.read_text(encoding="utf-8")))


def changed_labels(path: Path, recorded: dict[str, list[Any]]) -> str:
    """Which recorded answer a classifier does not give any more."""
    rows = sorted(range(min(100, len(recorded["text"]))), key=lambda i: -recorded["score"][i])[:EXAMPLES]
    answers = serve.load(path).predict([recorded["text"][i] for i in rows])
    for i, answer in zip(rows, answers, strict=True):
        before, score = recorded["predicted"][i], recorded["score"][i]
        if (answer["label"] != before and score > 0.5 + SURE) or abs(answer["score"] - score) > SURE:
            return (
                f"example {recorded['id'][i]} was answered {before} ({score:.3f}) when it was judged, "
                f"and is now {answer['label']} ({answer['score']:.3f})."
            )
    return ""


def changed_losses(now: dict[str, float], before: dict[str, float]) -> str:
    """Which text a language model foresees otherwise than when it was judged."""
    for text, loss in before.items():
        if not abs(now.get(text, float("inf")) - loss) <= CLOSE:
            return f"a token of {text[:20]!r} cost {loss:.3f} nats when it was judged, and now {now.get(text, 0):.3f}."
    return ""


def main() -> int:
    """Look at the version that standard input names. Returns the exit code."""
    found, unreachable = "", False
    try:
        found = problem(Wanted(**json.load(sys.stdin)))
    except SlimlineError as error:
        found = str(error)
        unreachable = isinstance(error, StoreError)
    sys.stdout.write(json.dumps({"problem": found, "unreachable": unreachable}) + "\n")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main())
