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
    champion: str = "",
    rival: str = "",
    margin: float = 0.02,
    against_champion: bool = True,
    require_approval: bool = False,
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
        champion: Ref of the version that was champion when the pipeline began; empty if there was none.
        rival: Ref of that version's quality evaluation on the same examples; empty if it was not measured.
        margin: How much of the metric can be spared, as a fraction (0.02 is two points of accuracy).
        against_champion: Whether the candidate must hold against the champion as well.
        require_approval: Whether a person must approve before it is promoted.
        options: Further limits, such as {"min_speedup": 2.0}.

    Returns:
        Ref of the verdict.
    """
    from slimline import judging

    limits = {"margin": margin, "against_champion": against_champion, "require_approval": require_approval, **options}
    ref, numbers = judging.judge(name, source, quality, baseline, latency, limits, champion=champion, rival=rival)
    metrics.metadata.update(numbers)
    return ref
