"""Measure a model: how often it is right, and how fast it is."""

from kfp import dsl

from components._port import port


@port("cpu")
def evaluate_quality(
    source: str,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    answers: dsl.Output[dsl.ClassificationMetrics],
    baseline: str = "",
    method: str = "classification",
    split: str = "test",
    options: dict = {},
) -> str:
    """Answer every example of a split and compare with the labels and with the baseline's answers.

    Args:
        source: Ref of the model to measure.
        data: Ref of the data set.
        metrics: What was measured.
        answers: Which label was taken for which and, of two labels, the ROC; for the Kubeflow page.
        baseline: Ref of the evaluation to compare with; empty for the baseline itself.
        method: A file in slimline/evaluate.
        split: Which part of the data is read.
        options: What only this method knows.

    Returns:
        Ref of the evaluation: the answer to every example.
    """
    from slimline import display, step

    knobs = {"data": data, "baseline": baseline, "split": split}
    ref, numbers = step.run(f"evaluate.{method}", source, {**knobs, **options})
    metrics.metadata.update(numbers)
    display.answers(ref, answers)
    return ref


@port("cpu")
def evaluate_latency(
    source: str,
    against: list,
    data: str,
    metrics: dsl.Output[dsl.Metrics],
    method: str = "latency",
    batch_size: int = 16,
    threads: int = 1,
    options: dict = {},
) -> str:
    """Time a model and what it is compared with, interleaved, on real texts.

    Args:
        source: Ref of the model to time.
        against: Refs of the others; the first is the baseline.
        data: Ref of the data set that texts are drawn from.
        metrics: What was measured.
        method: A file in slimline/evaluate.
        batch_size: Texts in one call, beside the calls with a single text.
        threads: Processor threads a model may use.
        options: What only this method knows.

    Returns:
        Ref of the evaluation: times, sizes and memory of all models.
    """
    from slimline import step

    knobs = {"against": against, "data": data, "batch_size": batch_size, "threads": threads}
    ref, numbers = step.run(f"evaluate.{method}", source, {**knobs, **options})
    metrics.metadata.update(numbers)
    return ref
