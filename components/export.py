"""Turn a model into what its runtime loads."""

from kfp import dsl

from components._port import port


@port("cpu")
def export(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "onnx",
    fuse: bool = True,
    options: dict = {},
) -> str:
    """Turn a model into what its runtime loads, and check that it still answers as before.

    Args:
        source: Ref of the model to export.
        data: Ref of the data set; its calibration split is what the answers are compared on.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/export, or none.
        fuse: Merge what ONNX Runtime has an operator of its own for; off for TensorRT, which has no such ones.
        options: What only this method knows.

    Returns:
        Ref of the exported model.
    """
    from slimline import release, step

    ref, numbers = step.run(f"export.{method}", source, {"data": data, "fuse": fuse, **options})
    return release.show(ref, numbers, model, metrics)
