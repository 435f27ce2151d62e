"""Does a converted model still say what its source says? Asked on real texts, in unevenly padded batches.

A conversion that swaps two inputs or freezes a length still runs and looks plausible: two swapped inputs cost
12 points of accuracy without an error. So every conversion ends here.

Shapes: N = texts, L = labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from slimline import data
from slimline.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BATCH = 8


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
    found = data.read(path, "calibration").texts[:number]
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} calibration texts, a comparison needs 2. Give it more.")
    ordered = sorted(found, key=len)
    half = (len(ordered) + 1) // 2
    pairs = zip(ordered[:half], [*reversed(ordered[half:]), ""], strict=False)
    mixed = [text for pair in pairs for text in pair][: len(ordered)]
    return [*mixed, " ".join(found)]


def onnx_logits(graph: Path, tokenizer: Encoder, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """[N, L]: what the graph says on the processor, batch by batch in the given order."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    rows = []
    for start in range(0, len(texts), BATCH):
        inputs = tokenizer.encode(texts[start : start + BATCH])
        rows.append(session.run(["logits"], {name: inputs[name] for name in names})[0])
    return np.concatenate(rows).astype(np.float32)


def compare(source_NL: npt.NDArray[np.float32], candidate_NL: npt.NDArray[np.float32]) -> Difference:
    """How far the candidate is from the source. Raises ModelError where the candidate is not finite."""
    import numpy as np
    from scipy.special import log_softmax

    if source_NL.shape != candidate_NL.shape or not np.isfinite(candidate_NL).all():
        raise ModelError(
            f"the converted model gives {candidate_NL.shape} logits, its source {source_NL.shape}, or some are "
            "not finite. Try another opset, or fuse=False."
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


def require_equal(difference: Difference, texts: Sequence[str], tolerance: float) -> None:
    """Raise ModelError unless logits differ by at most `tolerance` times the source's largest logit."""
    limit = tolerance * difference.scale
    if difference.max_abs > limit:
        raise ModelError(
            f"the exported graph differs from its source by {difference.max_abs:.3g}, not at most {limit:.3g}; "
            f"worst on {texts[difference.worst][:80]!r}. Try fuse=False, first_token=False or another opset; "
            "raise the tolerance only if you know why."
        )


def require_close(difference: Difference, texts: Sequence[str], agreement: float, kl: float) -> None:
    """Raise ModelError unless labels agree often enough and probabilities stay near."""
    if difference.agreement < agreement or difference.kl_mean > kl:
        raise ModelError(
            f"the quantized model agrees with its source on {difference.agreement:.1%} of {len(texts)} texts "
            f"(at least {agreement:.1%} needed) with mean KL {difference.kl_mean:.3g} (at most {kl:.3g}); "
            f"worst on {texts[difference.worst][:80]!r}. Try embeddings=False, or "
            "leave per_channel and reduce_range on."
        )
