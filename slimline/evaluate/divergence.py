"""How far a model has moved from the one it was made of: KL divergence and top-1 agreement, token by token.

Both models read the same windows of real text (see scoring.py), one after the other, and are compared at every token
that is scored, so that no logits are stored; memory is both models and the logits of a window from each. A mean KL sees
what perplexity hides: answers that got worse and others that got better by luck do not cancel (Dutta et al., 2024,
"Accuracy is not all you need", arXiv 2407.09141).

Only models that speak the same tokens compare: others are refused. If the vocabularies are padded to different sizes,
both are cut to the smaller and made to sum to one again.

Writes divergence.parquet, a row for every text in the data's order:

    id       of the text
    tokens   compared in it
    kl_sum   sum over them of KL(base || model), in nats, float64
    kl_max   the largest of them; 0 where there is none
    agreed   tokens at which both models hold the same one to be likeliest
    digest   of the tokens and windows, as in documents.parquet of evaluate.perplexity

Numbers: kl_mean with its interval from a bootstrap over texts, kl_median and kl_p99 over tokens; agreement with its
interval, and agreement_confident where the base gives its likeliest token more than `confident`; flips_lost, tokens
that only the base has right, and flips_won, those that only this model has.

Cost: one pass of each model over the text.

Shapes: S = tokens scored in a window, V = vocabulary, D = documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from slimline import language, scoring
from slimline.errors import ModelError
from slimline.language import LanguageModel, Tokenizer
from slimline.scoring import Floats, ScoringConfig, Text
from slimline.technique import Metrics, Stored, track

NEEDS = "any"
GIVES = "evaluation"

DIVERGENCE = "divergence.parquet"

Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Config(ScoringConfig):
    """The windows, and the model that all is measured from."""

    base: Stored = Field(description="the model to compare with, such as the one that this was made of")
    confident: float = Field(0.5, ge=0, lt=1, description="probability of its likeliest token above which base is sure")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Run both models over the split, write each text's divergence down, and return the numbers."""
    base = language.load(Path(config.base), config.threads or None)
    model = language.load(source, config.threads or None)
    for each, where in ((base, config.base), (model, source)):
        scoring.check(each, where, config)
    common, text = same_tokens(base, model), scoring.read(base.tokenizer, config)
    if scoring.read(model.tokenizer, config).digests != text.digests:
        raise _other_tokens("the texts are other tokens to each")
    found: list[tuple[Floats, Floats, Flags, Flags, Flags]] = []
    for window in track(text.windows, "comparing with the base"):
        pair = [scoring.logits(each, window)[:, :common] for each in (base, model)]
        found += [compare(pair[0][p], pair[1][p], window.target_S[p]) for p in scoring.pieces(len(window.target_S))]
    kl_N, sure_N, agreed_N, was_right_N, is_right_N = (np.concatenate(parts) for parts in zip(*found))
    scoring.finite(kl_N, f"{source} or {config.base}")
    owner_N = np.concatenate([window.owner_S for window in text.windows])
    kl_D, agreed_D = (np.bincount(owner_N, x, len(text.ids)) for x in (kl_N, agreed_N))
    largest_D = np.zeros(len(text.ids))
    np.maximum.at(largest_D, owner_N, kl_N)
    _write(out / DIVERGENCE, text, kl_D, largest_D, agreed_D)
    metrics = {
        "documents": float(len(text.ids)),
        "tokens": float(len(kl_N)),
        "vocabulary": float(common),
        **scoring.ratio("kl_mean", kl_D, text.token_count_D),
        "kl_median": float(np.median(kl_N)),
        "kl_p99": float(np.quantile(kl_N, 0.99)),
        **scoring.ratio("agreement", agreed_D, text.token_count_D),
        "flips": float((~agreed_N).sum()),
        "flips_lost": float((was_right_N & ~is_right_N).sum()),
        "flips_won": float((~was_right_N & is_right_N).sum()),
    }
    confident_N = sure_N > config.confident
    if confident_N.any():
        metrics["agreement_confident"] = float(agreed_N[confident_N].mean())
    return metrics


def compare(base_SV: Any, model_SV: Any, target_S: Any) -> tuple[Floats, Floats, Flags, Flags, Flags]:
    """[S] each: KL(base || model) in nats, base's surety, whether both agree, and whether each has the token right."""
    base, model = scoring.log_softmax(base_SV), scoring.log_softmax(model_SV)
    chance_SV = np.exp(base)
    with np.errstate(invalid="ignore"):  # what base never says costs nothing, even if the model cannot say it
        terms_SV = np.where(chance_SV > 0, chance_SV * (base - model), 0.0)
    before_S, after_S = base.argmax(axis=1), model.argmax(axis=1)
    kl_S = np.maximum(terms_SV.sum(axis=1), 0.0)  # rounding may leave it a hair below
    return kl_S, chance_SV.max(axis=1), before_S == after_S, before_S == target_S, after_S == target_S


def same_tokens(base: LanguageModel, model: LanguageModel) -> int:
    """How much of the vocabularies is compared. Raises ModelError unless both models speak the same tokens."""
    if base.tokenizer.size != model.tokenizer.size:
        raise _other_tokens(f"{base.tokenizer.size} tokens in one, {model.tokenizer.size} in the other")
    for number, (one, other) in enumerate(zip(_spoken(base.tokenizer), _spoken(model.tokenizer))):
        if one != other:
            raise _other_tokens(f"token {number} is {one!r} to one and {other!r} to the other")
    return min(base.vocabulary, model.vocabulary)


def _spoken(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([number]) for number in range(tokenizer.size)]


def _other_tokens(how: str) -> ModelError:
    return ModelError(
        f"the models have different tokenizers: {how}. Compare them by bits per byte, with evaluate.perplexity."
    )


def _write(file: Path, text: Text, kl_D: Any, largest_D: Floats, agreed_D: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array(text.ids, pa.string()),
        "tokens": pa.array(text.token_count_D.astype(np.int64)),
        "kl_sum": pa.array(kl_D, pa.float64()),
        "kl_max": pa.array(largest_D, pa.float64()),
        "agreed": pa.array(agreed_D.astype(np.int64)),
        "digest": pa.array(text.digests, pa.string()),
    }
    pq.write_table(pa.table(columns), file)
