"""lm-evaluation-harness, kept from code, network and files that a task from outside has no business with.

taskfile.py reads the task. Its templates are Jinja, in which a foreign one could call anything; the harness is made to
render them in Jinja's sandbox, and it is checked that it does. The rows are given to it in memory, so that nothing is
looked up and nothing is cached.

Shapes: V = vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimline import scoring, taskfile
from slimline.errors import ConfigError, DataError, ModelError
from slimline.language import LanguageModel
from slimline.technique import track

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
TOKENS_AT_ONCE = 1024
"""Tokens whose logits are in memory at the same time."""


@dataclass(frozen=True)
class Answer:
    """What a model made of one question."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    right: int
    """Index of the right choice."""
    log_likelihoods: tuple[float, ...]
    """Of each choice behind the prompt, in nats."""
    acc: float
    acc_norm: float
    """The harness's verdicts, 1 or 0: by the log likelihood, and by the log likelihood a character."""

    def chosen(self, metric: str) -> int:
        """Index of the choice that the model takes by a metric: acc or acc_norm."""
        scores = np.array(self.log_likelihoods)
        return int(np.argmax(scores / [len(c) for c in self.choices] if metric == "acc_norm" else scores))


def ask(model: LanguageModel, folder: Path, limit: int = 0) -> list[Answer]:
    """The model's answers to a task's questions, or to the first `limit` of them, in the data's order."""
    settings, splits = taskfile.read(folder)
    with _offline():
        import datasets
        import jinja2
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate

        tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        with _sandbox():
            try:
                task = ConfigurableTask(config={**settings, "custom_dataset": lambda **_: tables})
                task.set_config(key="num_fewshot", value=settings.get("num_fewshot", 0))
                task.set_fewshot_seed(seed=1234)  # the harness's own
                found = evaluate(
                    lm=_wrap(model), task_dict={"tasks": {settings["task"]: task}}, limit=limit or None,
                    bootstrap_iters=0, log_samples=True,
                )  # fmt: skip
                samples = sorted(found["samples"][settings["task"]], key=lambda s: s["doc_id"])
                return [_answer(task, sample) for sample in samples]
            except (jinja2.TemplateError, AssertionError, LookupError, SyntaxError, TypeError, ValueError) as error:
                reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200].rstrip(".")
                raise DataError(
                    f"the task in {folder} does not fit its data: {reason}. Mend {taskfile.find(folder)}."
                ) from None


def _answer(task: Any, sample: dict[str, Any]) -> Answer:
    choices, right = tuple(task.doc_to_choice(sample["doc"])), sample["target"]
    right = choices.index(right) if isinstance(right, str) else right
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise ValueError(f"question {sample['doc_id']} has the answer {sample['target']!r} and {len(choices)} choices")
    likely = tuple(float(response[0]) for response in sample["filtered_resps"])
    name = str(sample["doc"].get("id", sample["doc_id"]))
    return Answer(name, sample["arguments"][0][0], choices, right, likely, sample["acc"], sample["acc_norm"])


@contextmanager
def _offline() -> Iterator[None]:
    """Within it nothing is looked up on a hub, and the harness's remarks on what we set are not heard.

    The libraries read these variables when they are first imported.
    """
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _sandbox() -> Iterator[None]:
    """Within it the harness renders templates in a sandbox. Raises ConfigError if this harness does so elsewhere."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    kept = utils.env
    utils.env = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    utils.env.filters["regex_replace"] = utils.regex_replace
    try:
        try:
            utils.apply_template("{{ ''.__class__.__mro__ }}", {})
        except jinja2.exceptions.SecurityError:
            yield
        else:
            raise ConfigError("this lm_eval renders templates where code can be called. Install lm_eval 0.4.13.")
    finally:
        utils.env = kept


def _wrap(model: LanguageModel) -> Any:
    """The model as the harness asks it."""
    from lm_eval.api.model import TemplateLM

    class Wrapped(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return self.prefix_token_id

        @property
        def prefix_token_id(self) -> int:
            for token in (model.tokenizer.bos, model.tokenizer.eos):
                if token is not None:
                    return token
            raise ModelError("the model has no token to begin a text with, and a question is empty. Ask another.")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.tokenizer.encode(string, special=add_special_tokens is not False)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # `track` reports
            return answers

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(before, after) for _, before, after in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError

    return Wrapped()


def log_likelihoods(model: LanguageModel, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(nats, whether each token is the likeliest) of what follows each beginning, cut on the left to what fits.

    Those of one length are read together, so that nothing is padded.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    whole = [[*before, *after][-(model.context + 1) :] for before, after in pairs]
    for rows in track(batches([len(ids) - 1 for ids in whole]), "weighing choices"):
        logits_BTV = model.logits([whole[i][:-1] for i in rows])
        for i, logits_TV in zip(rows, logits_BTV):
            count = min(len(pairs[i][1]), len(whole[i]) - 1)
            if count < 1:
                raise ValueError(f"request {i} has a choice without a token")
            target_S = np.array(whole[i][-count:])
            nll_S = scoring.finite(scoring.surprise(logits_TV[-count:], target_S), "the model")
            found[i] = (-float(nll_S.sum()), bool((logits_TV[-count:].argmax(axis=1) == target_S).all()))
    return found


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes of equal lengths together, the longest first, at most TOKENS_AT_ONCE tokens or one text each."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = made[-1] if made else []
        if last and lengths[last[0]] == lengths[i] and (len(last) + 1) * lengths[i] <= TOKENS_AT_ONCE:
            last.append(i)
        else:
            made.append([i])
    return made
