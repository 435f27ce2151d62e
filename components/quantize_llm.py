"""Store the weights in fewer bits, by a library whose own needs are at odds with the other steps'."""

from kfp import dsl

from components._port import port


@port("llm")
def quantize_llm(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "llmcompressor",
    options: dict = {},
) -> str:
    """Store the weights in fewer bits, in the form that vLLM loads.

    Args:
        source: Ref of the model to quantize.
        data: Ref of the data set; its calibration split shows which weights matter.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/quantize. llmcompressor.
        options: What only this method knows.

    Returns:
        Ref of the quantized model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"quantize.{method}", source, options, {"data": data})
    return release.show(ref, numbers, model, metrics)
