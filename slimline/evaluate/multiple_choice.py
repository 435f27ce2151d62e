"""Questions with choices, asked by lm-evaluation-harness: how often the right choice is the likeliest.

The task is a folder with a task file of the harness's and its data (see taskfile.py for what it may ask for); prompts,
few shots, tokenization of a choice behind its prompt, acc and acc_norm are the harness's own. acc takes the choice of
the highest log likelihood, acc_norm the one of the highest a character, so that long choices are not at a
disadvantage; `metric` says which of them is the model's answer.

Writes predictions.parquet, a row for every question in the data's order, as evaluate.classification does, so that two
models can be compared question by question:

    id, text                of the question: its column id, or else its number; the whole prompt
    label, predicted        the right choice and the model's, as letters: A is the first
    score                   probability of the predicted choice among the choices, by their log likelihoods
    logit_0, logit_1, ...   log likelihood of each choice in nats; null where a question has fewer
    length_tokens           of the prompt
    choices                 their texts

Numbers: accuracy (by `metric`) with Wilson's 95 % interval, acc, acc_norm, chance (what guessing gives), and
against a baseline on the same questions agreement, flips both ways and kl_mean between the choices' probabilities.

Cost: every choice is read behind its prompt: 300 tokens for a question of examples/smollm/choices, 30,000 for the
100 that are asked by default.

Shapes: B = questions, C = choices of the question that has most.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from slimline import harness, language
from slimline.errors import DataError
from slimline.harness import Answer
from slimline.technique import BaseConfig, Metrics, Stored

NEEDS = "any"
GIVES = "evaluation"

PREDICTIONS = "predictions.parquet"

Floats = np.ndarray[Any, np.dtype[np.float64]]


class Config(BaseConfig):
    """What is asked, how an answer is chosen, and what it is compared with."""

    task: Stored = Field(description="folder with a task file of lm-evaluation-harness and its data")
    metric: Literal["acc", "acc_norm"] = Field("acc_norm", description="which of the harness's is the model's answer")
    limit: int = Field(100, ge=0, description="questions to ask, from the first; 0 for all")
    baseline: Stored = Field("", description="evaluation of another model on the same questions, to compare with")
    threads: int = Field(0, ge=0, description="processor threads; 0 for as many as the library takes")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Ask every question, write the answers down, and return the numbers."""
    model = language.load(source, config.threads or None)
    answers = harness.ask(model, Path(config.task), config.limit)
    if len({answer.id for answer in answers}) < len(answers):
        raise DataError(f"{config.task} has questions of the same id. Make ids unique, or leave the column out.")
    lengths = [len(model.tokenizer.encode(answer.prompt)) for answer in answers]
    table = columns(answers, lengths, config.metric)
    metrics = {"examples": float(len(answers)), **quality(answers, table)}
    if config.baseline:
        metrics |= compare(Path(config.baseline), table)
    _write(out / PREDICTIONS, table)
    return metrics


def columns(answers: list[Answer], lengths: list[int], metric: str) -> dict[str, list[Any]]:
    """The table of predictions.parquet."""
    most = max(len(answer.choices) for answer in answers)
    if most > len(string.ascii_uppercase):
        raise DataError(f"a question has {most} choices; at most {len(string.ascii_uppercase)} are taken. Ask another.")
    chosen = [answer.chosen(metric) for answer in answers]
    chances = [probabilities(np.array(answer.log_likelihoods)) for answer in answers]
    return {
        "id": [answer.id for answer in answers],
        "text": [answer.prompt for answer in answers],
        "label": [string.ascii_uppercase[answer.right] for answer in answers],
        "predicted": [string.ascii_uppercase[i] for i in chosen],
        "score": [float(chance_C[i]) for chance_C, i in zip(chances, chosen)],
        **{f"logit_{c}": [dict(enumerate(answer.log_likelihoods)).get(c) for answer in answers] for c in range(most)},
        "length_tokens": lengths,
        "choices": [list(answer.choices) for answer in answers],
    }


def probabilities(likely_C: Floats) -> Floats:
    """What the log likelihoods say of each choice if one of them must be it."""
    grown_C = np.exp(likely_C - likely_C.max())
    chance_C: Floats = grown_C / grown_C.sum()
    return chance_C


def quality(answers: list[Answer], table: dict[str, list[Any]]) -> Metrics:
    """Accuracy with its interval, both of the harness's, and what guessing gives."""
    from scipy.stats import binomtest

    right = sum(label == predicted for label, predicted in zip(table["label"], table["predicted"]))
    interval = binomtest(right, len(answers)).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": right / len(answers),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
        "acc": float(np.mean([answer.acc for answer in answers])),
        "acc_norm": float(np.mean([answer.acc_norm for answer in answers])),
        "chance": float(np.mean([1 / len(answer.choices) for answer in answers])),
    }


def compare(folder: Path, table: dict[str, list[Any]]) -> Metrics:
    """Agreement, flips both ways and mean KL(baseline || model). Raises DataError for a baseline on other questions."""
    import pyarrow.parquet as pq

    file = folder / PREDICTIONS
    before = pq.read_table(file).to_pydict() if file.is_file() else {}
    if "choices" not in before:
        raise DataError(f"{folder} answers no questions with choices. Name an evaluation of evaluate.multiple_choice.")
    if any(before[name] != table[name] for name in ("id", "text", "label", "choices")):
        raise DataError(
            f"the baseline {folder} answered {len(before['id'])} questions which are not the {len(table['id'])} asked "
            "here. Evaluate both on the same task with the same limit."
        )
    label, old, new = (np.array(x) for x in (table["label"], before["predicted"], table["predicted"]))
    return {
        "agreement": float((old == new).mean()),
        "flips_lost": float(((old == label) & (new != label)).sum()),
        "flips_won": float(((old != label) & (new == label)).sum()),
        "kl_mean": float(np.mean([divergence(b, m) for b, m in zip(_likelihoods(before), _likelihoods(table))])),
    }


def divergence(base_C: Floats, model_C: Floats) -> float:
    """KL(base || model) between the choices' probabilities, in nats; never below 0."""
    chance_C, other_C = probabilities(base_C), probabilities(model_C)
    said = chance_C > 0
    return max(float((chance_C[said] * np.log(chance_C[said] / other_C[said])).sum()), 0.0)


def _likelihoods(table: dict[str, list[Any]]) -> list[Floats]:
    return [
        np.array([table[f"logit_{c}"][row] for c in range(len(choices))])
        for row, choices in enumerate(table["choices"])
    ]


def _write(file: Path, table: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"score": pa.float64(), "length_tokens": pa.int64(), "choices": pa.list_(pa.string())}
    made = {
        name: pa.array(values, pa.float64() if name.startswith("logit_") else kinds.get(name, pa.string()))
        for name, values in table.items()
    }
    pq.write_table(pa.table(made), file)
