"""Does a converted model still say what its source says? Asked on real texts, in unevenly padded batches.

A conversion that swaps two inputs or freezes a length still runs and looks plausible: two swapped inputs cost
12 points of accuracy without an error. So every conversion ends here.

Shapes: N = texts, L = labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pydantic import Field

from slimline import data, graph, hf
from slimline.errors import DataError, ModelError
from slimline.profiles import PAST
from slimline.technique import BaseConfig, Metrics, Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

BATCH = 8
LONGEST = 256
"""Tokens of a text that a language model is asked on: it answers every one of them with a whole vocabulary."""


class Guard(BaseConfig):
    """How near a quantized model must stay to what it came from: options of all that quantize."""

    data: Stored = Field(description="texts (calibration split) to calibrate on, and on which labels must stay")
    texts: int = Field(256, ge=2, description="how many texts the guard compares")
    agreement: float = Field(
        0.93, ge=0, le=1, description="fraction of texts that must keep their label: less is a fault, not a price"
    )
    kl: float = Field(0.05, gt=0, description="largest mean divergence from the source, in nats")


class Match(BaseConfig):
    """How exactly a graph in other float types must say what its source says."""

    data: Stored = Field(description="calibration texts on which graph and source must agree")
    texts: int = Field(64, ge=2, description="how many texts the parity guard compares")
    tolerance: float = Field(0.02, gt=0, le=0.5, description="allowed, as a fraction of the largest logit")


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]: ...


class Difference(NamedTuple):
    """How far a candidate's logits are from its source's."""

    max_abs: float
    """The largest difference of one logit."""
    scale: float
    """The largest absolute logit of the source."""
    agreement: float
    """Fraction of texts with the same label."""
    kl_mean: float
    """Mean Kullback-Leibler divergence of the labels' probabilities, source to candidate, in nats."""
    worst: int
    """Index of the text with the largest difference."""


def texts(path: Path, number: int) -> list[str]:
    """Texts of the calibration split, short beside long, so that every batch is padded unevenly.

    The last one is all of them joined: as long as the model can read.
    """
    found = data.documents(path, "calibration").texts[:number]
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} calibration texts, a comparison needs 2. Give it more.")
    ordered = sorted(found, key=len)
    half = (len(ordered) + 1) // 2
    pairs = zip(ordered[:half], [*reversed(ordered[half:]), ""], strict=False)
    mixed = [text for pair in pairs for text in pair][: len(ordered)]
    return [*mixed, " ".join(found)]


def onnx_logits(model: Path | onnx.ModelProto, tokenizer: Encoder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """[N, L]: what a graph says on the processor, batch by batch in the given order; Q/DQ is taken at its word.

    Of a graph with a KV cache it is what may follow each text, [N, V], with nothing before it.
    """
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # without VNNI the integer kernels that Q/DQ is fused into cut off large sums
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = graph.session(model, options)
    rows = []
    for start in range(0, len(texts), BATCH):
        inputs = feed(session, tokenizer.encode(texts[start : start + BATCH]))
        answer = session.run(["logits"], inputs)[0]
        if answer.ndim == 3:
            last_B = inputs["attention_mask"].sum(axis=1) - 1  # padded on the right
            answer = answer[np.arange(len(answer)), last_B]
        rows.append(answer)
    return np.concatenate(rows).astype(np.float32)


def feed(session: Any, batch: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a graph for a batch; for one with a KV cache the batch's first LONGEST tokens, after none."""
    import numpy as np

    inputs: dict[str, npt.NDArray[Any]] = {}
    caches = any(value.name.startswith(PAST) for value in session.get_inputs())
    for value in session.get_inputs():
        if value.name.startswith(PAST):
            (_, heads, _, width) = value.shape
            inputs[value.name] = np.zeros((len(batch["input_ids"]), heads, 0, width), np.float32)
        else:
            inputs[value.name] = batch[value.name][:, :LONGEST] if caches else batch[value.name]
    return inputs


def compare(
    source_NL: npt.NDArray[np.float32],
    candidate_NL: npt.NDArray[np.float32],
    hint: str = "Try another opset, or fuse=False.",
) -> Difference:
    """How far the candidate is from the source. Raises ModelError where either is not finite."""
    import numpy as np
    from scipy.special import log_softmax

    if not np.isfinite(source_NL).all():  # against NaN every limit holds
        raise ModelError("the source's own answers are not all finite. Repeat the step that made it.")
    if source_NL.shape != candidate_NL.shape or not np.isfinite(candidate_NL).all():
        raise ModelError(
            f"the converted model gives {candidate_NL.shape} logits, its source {source_NL.shape}, or some are "
            f"not finite. {hint}"
        )
    gap_N = np.abs(source_NL - candidate_NL).max(axis=1)
    source, candidate = (log_softmax(x.astype(np.float64), axis=1) for x in (source_NL, candidate_NL))
    return Difference(
        max_abs=float(gap_N.max()),
        scale=float(np.abs(source_NL).max()),
        agreement=float((source_NL.argmax(axis=1) == candidate_NL.argmax(axis=1)).mean()),
        kl_mean=float((np.exp(source) * (source - candidate)).sum(axis=1).mean()),
        worst=int(gap_N.argmax()),
    )


def require_equal(
    difference: Difference,
    texts: Sequence[str],
    tolerance: float,
    hint: str = "Try fuse=False, first_token=False or another opset",
) -> None:
    """Raise ModelError unless logits differ by at most `tolerance` times the source's largest logit."""
    limit = tolerance * difference.scale
    if difference.max_abs > limit:
        raise ModelError(
            f"the converted graph differs from its source by {difference.max_abs:.3g}, not at most {limit:.3g}; "
            f"worst on {texts[difference.worst][:80]!r}. {hint}; raise the tolerance only if you know why."
        )


def require_close(difference: Difference, texts: Sequence[str], guard: Guard, hint: str) -> None:
    """Raise ModelError unless labels agree often enough and probabilities stay near."""
    if difference.agreement < guard.agreement or difference.kl_mean > guard.kl:
        raise ModelError(
            f"the quantized model agrees with its source on {difference.agreement:.1%} of {len(texts)} texts "
            f"(at least {guard.agreement:.1%} needed) with mean KL {difference.kl_mean:.3g} (at most {guard.kl:.3g}); "
            f"worst on {texts[difference.worst][:80]!r}. {hint}"
        )


def guarded(source: Path, out: Path, guard: Guard, hint: str) -> Metrics:
    """How near the graph in `out` is to the one in `source`, and their sizes. Raises ModelError where it strays."""
    asked = texts(Path(guard.data), guard.texts)
    difference = _difference(source, out / graph.FILE, asked, hint)
    require_close(difference, asked, guard, hint)
    return {
        **_sizes(source, out),
        "agreement": difference.agreement,
        "kl_mean": difference.kl_mean,
        "max_abs": difference.max_abs,
    }


def matched(source: Path, out: Path, match: Match, hint: str, twin: onnx.ModelProto | None = None) -> Metrics:
    """How far the graph in `out` (or its twin, if that runs in its place) is from `source`'s, and their sizes.

    Raises ModelError where that is too far.
    """
    asked = texts(Path(match.data), match.texts)
    difference = _difference(source, twin or out / graph.FILE, asked, f"{hint}.")
    require_equal(difference, asked, match.tolerance, hint)
    return {
        **_sizes(source, out),
        "parity_max_abs": difference.max_abs,
        "parity_agreement": difference.agreement,
    }


def _difference(source: Path, candidate: Path | onnx.ModelProto, asked: Sequence[str], hint: str) -> Difference:
    tokenizer = hf.tokenizer(source, hf.max_length(source))
    answers = [onnx_logits(model, tokenizer, asked) for model in (source / graph.FILE, candidate)]
    return compare(answers[0], answers[1], hint)


def _sizes(source: Path, out: Path) -> Metrics:
    return {"size_before_bytes": graph.size_bytes(source), "size_bytes": graph.size_bytes(out)}
