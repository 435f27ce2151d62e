"""The mechanical blessing: do these bytes load in a fresh process and answer the shortest and oddest texts?

Answers must be finite, one number a label, the same when asked again, and the same in a batch as alone. Of a language
model, what may follow must be finite after every token, the same when asked again, in a batch as alone and read at once
as token by token, and an answer must end. Run through `python -m slimline.serve FOLDER`.
`python -m slimline.probe FOLDER THREADS` reads batches of texts as JSON, answers them, and prints the most memory that
this took.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimline import artifact, decoder, language, serve
from slimline.artifact import Manifest
from slimline.errors import SlimlineError
from slimline.sampling import Sampling


@dataclass(frozen=True)
class Finding:
    """What a fresh process found out about a model. `problem` is empty if `ok`."""

    ok: bool
    problem: str
    runtime: str = ""
    seconds_to_load: float = 0.0
    peak_memory_bytes: int = 0
    digest: str = ""
    answers: dict[str, float] = field(default_factory=dict)
    """Of a language model: the mean loss of a token in some texts, in nats, by which its bytes are known again."""


ODD = (
    "a",
    "",
    " \t\n ",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "nul \x00 bell \x07 escape \x1b[31m",
    "שלום עולם، مرحبا بالعالم",
    "e\u0301 ﬁ ﷽ \ufeff\u200b\ud83d",
    "the plot is thin and the acting is thinner",
    "long " * 4096,
)


def probe(path: Path) -> dict[str, Any]:
    """Check every byte of a sealed directory, load it, and ask what is short, long, empty and odd."""
    found = Finding(ok=False, problem="")
    try:
        manifest = artifact.verify(path)
        found = Finding(ok=False, problem="", digest=manifest.digest)
        start = time.perf_counter()
        model: language.LanguageModel | serve.Predictor
        if manifest.task == decoder.TASK:
            model = language.load(path)
            model.prefill([model.encode(ODD[0])], 1)  # a package opens when it is first asked
            found_problems = writing_problems(model, allowed(manifest))  # a generator: nothing is asked yet
        else:
            model = serve.load(path)
            found_problems = problems(model)
        seconds = time.perf_counter() - start
        problem = next(found_problems, "")
        peak = peak_memory_bytes()
        said = losses(model) if isinstance(model, language.LanguageModel) and not problem else {}
        found = Finding(not problem, problem, model.runtime, seconds, peak, manifest.digest, said)
    except SlimlineError as error:
        found = Finding(ok=False, problem=str(error), digest=found.digest)
    except Exception as error:  # whatever a broken model makes a runtime raise is the finding, not a crash
        found = Finding(ok=False, problem=f"{type(error).__name__}: {error}", digest=found.digest)
    return asdict(found)


TOLERANCE = 0.01
"""How far a probability may move when a text is answered in company instead of alone.

Kernels add in another order for another shape, and a GPU may round to TF32. A lost mask or mixed-up rows move some
answer by more.
"""


def problems(predictor: serve.Predictor, tolerance: float = TOLERANCE) -> Iterator[str]:
    """What is wrong with the answers, one sentence each; nothing if all is well."""
    alone = []
    for text in ODD:
        first, second = predictor.logits([text]), predictor.logits([text])
        if not np.array_equal(first, second):
            yield f"the text {text[:20]!r} was answered twice, and differently."
        alone.append(serve.softmax(first)[0])
    together = predictor.logits(ODD)
    if not np.array_equal(together, predictor.logits(ODD)):
        yield "the same batch was answered twice, and differently."
    apart = np.abs(serve.softmax(together) - np.stack(alone)).max(axis=1)
    worst = int(apart.argmax())
    if not apart[worst] <= tolerance:
        yield (
            f"the text {ODD[worst][:20]!r} is answered differently in a batch than alone: "
            f"a probability moves by {apart[worst]:.3f}, {tolerance} is allowed."
        )


ROUNDED_TOLERANCE = 0.1
"""The same for models that round activations to 8 bits as they run: sums in another order round to another number.

SmolLM2 in 4 bits moves by 0.02; what int8 activations cost it is 0.01 nats, which allows for 0.07.
"""
ROUNDING = ("quantize.smoothquant", "quantize.fp8_w8a8")


def allowed(manifest: Manifest) -> float:
    """How far a probability of this language model may move."""
    packed = any(stage.technique.startswith("quantize.") for stage in manifest.history)
    rounds = any(stage.technique in ROUNDING for stage in manifest.history)
    exported = [stage for stage in manifest.history if stage.technique == "export.genai"]
    rounds = rounds or bool(packed and exported and exported[-1].config.get("accuracy_level") == 4)
    return ROUNDED_TOLERANCE if rounds else TOLERANCE


LONG_TOKENS = 512
"""How much of a long text a language model is asked about."""


def writing_problems(model: language.LanguageModel, tolerance: float = TOLERANCE) -> Iterator[str]:
    """What is wrong with a language model's answers, one sentence each; nothing if all is well."""
    for text in ODD:
        ids = model.encode(text)[: min(LONG_TOKENS, model.context - 8)]
        first = model.logits([ids])
        if first.shape != (1, len(ids), model.vocabulary) or not np.isfinite(first).all():
            yield f"after the text {text[:20]!r} come {first.shape} logits, or some that are not finite."
            return
        if not np.array_equal(first, model.logits([ids])):
            yield f"the text {text[:20]!r} was read twice, and answered differently."
        alone = serve.softmax(first[0, -1:])
        read = {
            "in a batch": model.logits([ids, ids[::-1]])[0, -1:],
            "for an answer": model.prefill([ids], 2).logits_BV,
        }
        if len(ids) > 1:
            read["token by token"] = model.step(model.prefill([ids[:-1]], 2), ids[-1]).logits_BV
        for how, logits_BV in read.items():
            if not (moved := float(np.abs(serve.softmax(logits_BV) - alone).max())) <= tolerance:
                yield f"the text {text[:20]!r} is answered differently {how}: a probability moves by {moved:.3f}."
    few = Sampling.of({"max_tokens": 8})
    said = model.generate([ODD[0], ""], few)
    if said != model.generate([ODD[0], ""], few):
        yield "the same prompt was answered twice, and differently."
    if "".join(model.stream(ODD[0], few)) != said[0]:
        yield "an answer is another when it is streamed."


PLAIN = (
    "The capital of France is Paris, and that of Italy is Rome.",
    "def add(a, b):\n    return a + b\n",
    "It was late, and nobody had thought of the key.",
)


def losses(model: language.LanguageModel) -> dict[str, float]:
    """The mean loss of a token in each of some plain texts, in nats."""
    found = {}
    for text in PLAIN:
        ids = model.encode(text)[: model.context]
        logits_TV = model.logits([ids])[0, :-1].astype(np.float64)
        chosen_T = np.take_along_axis(logits_TV, np.asarray(ids[1:])[:, None], 1)[:, 0]
        highest_T = logits_TV.max(axis=1)
        found[text] = float((highest_T + np.log(np.exp(logits_TV - highest_T[:, None]).sum(axis=1)) - chosen_T).mean())
    return found


def peak_memory_bytes() -> int:
    """The most memory this program held.

    Not ru_maxrss where it can be helped: that survives exec, so a small program started by a big one reports
    the big one's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


DECODED = 32
"""Tokens that a language model adds to a prompt while its memory is measured."""


def main(arguments: Sequence[str]) -> int:
    """Answer the batches on standard input and print the peak of memory. Returns the exit code.

    A batch is texts or, for a language model, the token ids of prompts of one length, which it goes on with.
    """
    path, threads = arguments
    if artifact.read(Path(path)).task == decoder.TASK:
        model = language.load(Path(path), int(threads))
        for ids_BT in json.load(sys.stdin):
            state = model.prefill(ids_BT, DECODED)
            for _ in range(DECODED):
                state = model.step(state)
    else:
        predictor = serve.load(Path(path), int(threads))
        for texts in json.load(sys.stdin):
            predictor.predict(texts)
    sys.stdout.write(f"{peak_memory_bytes()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
