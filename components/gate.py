"""Decide whether a model may take another's place."""

from kfp import dsl

from components._port import port


@port("cpu")
def gate(
    name: str,
    source: str,
    quality: str,
    baseline: str,
    latency: str,
    metrics: dsl.Output[dsl.Metrics],
    margin: float = 0.02,
    options: dict = {},
) -> str:
    """Decide whether the model stays within its limits: PASS, FAIL, INCONCLUSIVE or INVALID.

    Args:
        name: Registered model whose champion this may replace.
        source: Ref of the candidate.
        quality: Ref of the candidate's quality evaluation.
        baseline: Ref of the baseline's quality evaluation.
        latency: Ref of the latency evaluation.
        metrics: The verdict in numbers.
        margin: How much of the metric can be spared, as a fraction (0.02 is two points of accuracy).
        options: Further limits, such as {"min_speedup": 2.0}.

    Returns:
        Ref of the verdict.
    """
    from slimline import release

    ref, numbers = release.judge(name, source, quality, baseline, latency, {"margin": margin, **options})
    metrics.metadata.update(numbers)
    return ref
