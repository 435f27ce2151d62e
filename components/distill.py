"""Make a smaller student that imitates a teacher."""

from kfp import dsl

from components._port import port


@port("cpu")
def distill(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "logits",
    layers: int = 3,
    epochs: int = 3,
    seed: int = 0,
    options: dict = {},
) -> str:
    """Cut a student from the teacher and train it to imitate the teacher.

    Args:
        source: Ref of the teacher.
        data: Ref of the data set.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/distill, or none.
        layers: How many of the teacher's layers the student keeps.
        epochs: How often the train split is read.
        seed: Of every random choice.
        options: What only this method knows, such as {"temperature": 2.0}.

    Returns:
        Ref of the student.
    """
    from slimline import release, step

    knobs = {"data": data, "layers": layers, "epochs": epochs, "seed": seed}
    ref, numbers = step.run(f"distill.{method}", source, {**knobs, **options})
    return release.show(ref, numbers, model, metrics)
