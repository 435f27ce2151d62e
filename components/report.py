"""The page a person looks at."""

from kfp import dsl

from components._port import port


@port("cpu")
def report(
    name: str,
    version: int,
    outcome: str,
    models: list,
    qualities: list,
    latency: str,
    verdict: str,
    page: dsl.Output[dsl.HTML],
) -> str:
    """Draw one page of everything that was done, measured and decided.

    Args:
        name: Registered model.
        version: The candidate's version.
        outcome: What the promotion said.
        models: Refs of every stage's result, the baseline first.
        qualities: Refs of their quality evaluations, in the same order.
        latency: Ref of the latency evaluation.
        verdict: Ref of the gate's verdict.
        page: The page itself.

    Returns:
        Path or uri of the page.
    """
    from slimline import summary

    return summary.publish(name, version, outcome, models, qualities, latency, verdict, page.path)
