"""Store the weights in fewer bits."""

from kfp import dsl

from components._port import port


@port("cpu")
def quantize(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "int8_dynamic",
    options: dict = {},
) -> str:
    """Store the weights in fewer bits, and check that the model still answers as before.

    Args:
        source: Ref of the model to quantize.
        data: Ref of the data set; its calibration split is what the answers are compared on.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/quantize, or none.
        options: What only this method knows.

    Returns:
        Ref of the quantized model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"quantize.{method}", source, options, {"data": data})
    return release.show(ref, numbers, model, metrics)
