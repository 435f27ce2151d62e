"""The stages of language models: run in the image that has their libraries, and knowing nothing of labels."""

# Long because every stage of a language model has its port here.
from kfp import dsl

from components._port import port
from components.champion import champion
from components.promote import promote

# The same steps, where language models load: both look at a version before the champion moves.
champion_language = port("language")(champion.python_func)
promote_language = port("language")(promote.python_func)


@port("language")
def fetch_language(
    source: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "local",
    options: dict = {},
) -> str:
    """Check a language model from outside and store it.

    Args:
        source: A folder, a file in it, or package:NAME/folder of an installed package.
        model: What was stored, for the Kubeflow page.
        metrics: Its size and shape.
        method: A file in slimline/fetch.
        options: What only this method knows.

    Returns:
        Ref of the stored model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"fetch.{method}", source, options)
    return release.show(ref, numbers, model, metrics)


@port("language")
def prune_language(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "none",
    seed: int = 0,
    options: dict = {},
) -> str:
    """Remove what matters least: single weights, neurons, heads, channels or layers.

    Args:
        source: Ref of the model to prune.
        data: Ref of the documents; their calibration split shows what matters.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/prune, or none.
        seed: Of every random choice.
        options: What only this method knows.

    Returns:
        Ref of the pruned model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"prune.{method}", source, options, {"data": data, "seed": seed})
    return release.show(ref, numbers, model, metrics)


@port("language")
def distill_language(
    source: str,
    teacher: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "none",
    seed: int = 0,
    options: dict = {},
) -> str:
    """Train a model to predict what its teacher predicts, as after pruning.

    Args:
        source: Ref of the model that learns.
        teacher: Ref of the model that it learns from.
        data: Ref of the documents; their train split is read.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/distill, or none.
        seed: Of every random choice.
        options: What only this method knows.

    Returns:
        Ref of the trained model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"distill.{method}", source, options, {"teacher": teacher, "data": data, "seed": seed})
    return release.show(ref, numbers, model, metrics)


@port("language")
def attention_language(
    source: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "none",
    options: dict = {},
) -> str:
    """Swap the attention, for long texts.

    Args:
        source: Ref of the model.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/attention, or none.
        options: What only this method knows.

    Returns:
        Ref of the changed model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"attention.{method}", source, options)
    return release.show(ref, numbers, model, metrics)


@port("language")
def quantize_language(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "gptq",
    seed: int = 0,
    options: dict = {},
) -> str:
    """Store the weights in fewer bits.

    Args:
        source: Ref of the model to quantize.
        data: Ref of the documents; their calibration split shows which weights matter.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/quantize, or none.
        seed: Of every random choice.
        options: What only this method knows, such as {"bits": 4, "group_size": 64}.

    Returns:
        Ref of the quantized model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"quantize.{method}", source, options, {"data": data, "seed": seed})
    return release.show(ref, numbers, model, metrics)


@port("language")
def export_language(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "genai",
    options: dict = {},
) -> str:
    """Turn a language model into what its runtime loads.

    Args:
        source: Ref of the model to export.
        data: Ref of the documents, on which the two are compared.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/export, or none.
        options: What only this method knows.

    Returns:
        Ref of the exported model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"export.{method}", source, options, {"data": data})
    return release.show(ref, numbers, model, metrics)


@port("language")
def evaluate_language(
    source: str,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    baseline: str = "",
    method: str = "perplexity",
    split: str = "test",
    options: dict = {},
) -> str:
    """Measure how surprised a language model is by documents.

    Args:
        source: Ref of the model to measure.
        data: Ref of the documents.
        metrics: What was measured.
        baseline: Ref of the evaluation to compare with; empty for the baseline itself.
        method: A file in slimline/evaluate.
        split: Which part of the data is read.
        options: What only this method knows.

    Returns:
        Ref of the evaluation: the loss on every document.
    """
    from slimline import step

    knobs = {"data": data, "baseline": baseline, "split": split}
    ref, numbers = step.run(f"evaluate.{method}", source, {**knobs, **options})
    metrics.metadata.update(numbers)
    return ref


@port("language")
def evaluate_divergence(
    source: str,
    base: str,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    method: str = "divergence",
    split: str = "test",
    options: dict = {},
) -> str:
    """Compare a language model's next tokens with those of the model it comes from.

    Args:
        source: Ref of the model to measure.
        base: Ref of the model that it comes from.
        data: Ref of the documents.
        metrics: What was measured.
        method: A file in slimline/evaluate, or none.
        split: Which part of the data is read.
        options: What only this method knows.

    Returns:
        Ref of the evaluation: how far each document's predictions moved.
    """
    from slimline import step

    ref, numbers = step.run(f"evaluate.{method}", source, {"base": base, "data": data, "split": split, **options})
    metrics.metadata.update(numbers)
    return ref


@port("language")
def evaluate_choices(
    source: str,
    task: str,
    metrics: dsl.Output[dsl.Metrics],
    baseline: str = "",
    method: str = "multiple_choice",
    options: dict = {},
) -> str:
    """Answer multiple-choice questions, by lm-evaluation-harness on files of this machine.

    Args:
        source: Ref of the model to measure.
        task: Ref of the folder with the task's YAML and its questions.
        metrics: What was measured.
        baseline: Ref of the evaluation to compare with; empty for the baseline itself.
        method: A file in slimline/evaluate.
        options: What only this method knows.

    Returns:
        Ref of the evaluation: the answer to every question.
    """
    from slimline import step

    ref, numbers = step.run(f"evaluate.{method}", source, {"task": task, "baseline": baseline, **options})
    metrics.metadata.update(numbers)
    return ref


@port("language")
def evaluate_generation(
    source: str,
    against: list,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    method: str = "generation",
    threads: int = 2,
    options: dict = {},
) -> str:
    """Time how a language model reads prompts and writes tokens, against others, interleaved.

    Args:
        source: Ref of the model to time.
        against: Refs of the others; the first is the baseline.
        data: Ref of the documents that prompts are cut from.
        metrics: What was measured.
        method: A file in slimline/evaluate.
        threads: Processor threads a model may use.
        options: What only this method knows.

    Returns:
        Ref of the evaluation: times, sizes and memory of all models.
    """
    from slimline import step

    knobs = {"against": against, "data": data, "threads": threads}
    ref, numbers = step.run(f"evaluate.{method}", source, {**knobs, **options})
    metrics.metadata.update(numbers)
    return ref


@port("language")
def gate_language(
    name: str,
    source: str,
    quality: str,
    baseline: str,
    latency: str,
    divergence: str,
    choices: str,
    choices_baseline: str,
    metrics: dsl.Output[dsl.Metrics],
    champion: str = "",
    rival: str = "",
    margin: float = 0.12,
    against_champion: bool = True,
    require_approval: bool = False,
    options: dict = {},
) -> str:
    """Decide whether a language model stays within its limits: PASS, FAIL, INCONCLUSIVE or INVALID.

    Args:
        name: Registered model whose champion this may replace.
        source: Ref of the candidate.
        quality: Ref of the candidate's perplexity.
        baseline: Ref of the baseline's perplexity.
        latency: Ref of the times of both.
        divergence: Ref of the candidate's divergence from the model it comes from.
        choices: Ref of the candidate's answers to multiple choice.
        choices_baseline: Ref of the baseline's answers.
        metrics: The verdict in numbers.
        champion: Ref of the version that was champion when the pipeline began; empty if there was none.
        rival: Ref of that version's perplexity on the same documents; empty if it was not measured.
        margin: By how much perplexity may grow, as a fraction (0.12 is twelve percent).
        against_champion: Whether the candidate must hold against the champion as well.
        require_approval: Whether a person must approve before it is promoted.
        options: Further limits, such as {"max_kl": 0.1}.

    Returns:
        Ref of the verdict.
    """
    from slimline import judging

    limits = {"metric": "perplexity", "margin": margin, "against_champion": against_champion}
    limits |= {"require_approval": require_approval, **options}
    ref, numbers = judging.judge(
        name, source, quality, baseline, latency, limits, divergence, choices, choices_baseline, champion, rival
    )
    metrics.metadata.update(numbers)
    return ref
