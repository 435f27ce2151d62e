"""Turn an ONNX graph into an engine, in an image that has TensorRT and no PyTorch."""

from kfp import dsl

from components._port import port


@port("tensorrt")
def export_engine(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "tensorrt",
    options: dict = {},
) -> str:
    """Build an engine for NVIDIA GPUs.

    Args:
        source: Ref of the ONNX model, exported without fusions.
        data: Ref of the data set; the lengths of its texts choose what is tuned for.
        model: What was built, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/export. tensorrt.
        options: What only this method knows.

    Returns:
        Ref of the engine.
    """
    from slimline import release, step

    ref, numbers = step.run(f"export.{method}", source, {"data": data, **options})
    return release.show(ref, numbers, model, metrics)
