"""Bring a model in from outside."""

from kfp import dsl

from components._port import port


@port("cpu")
def fetch(
    source: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "local",
    options: dict = {},
) -> str:
    """Check a model from outside and store it.

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
