"""Make a version of a model in the registry."""

from components._port import port


@port("cpu")
def register(name: str, source: str, verdict: str) -> int:
    """Make a version of the candidate in the MLflow registry, once, with its verdict and its history.

    Args:
        name: Registered model.
        source: Ref of the candidate.
        verdict: Ref of the gate's verdict.

    Returns:
        The version's number.
    """
    from slimline import release

    return release.register(name, source, verdict)
