"""Remove what matters least."""

from kfp import dsl

from components._port import port


@port("cpu")
def prune(
    source: str,
    teacher: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "heads",
    heads: float = 0.5,
    neurons: float = 0.5,
    epochs: int = 1,
    seed: int = 0,
    options: dict = {},
) -> str:
    """Remove attention heads and feed-forward neurons, then recover by distillation from the teacher.

    Args:
        source: Ref of the model to prune.
        teacher: Ref of the model that it learns from again.
        data: Ref of the data set.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/prune, or none.
        heads: Fraction of all heads that goes, 0 to 1.
        neurons: Fraction of all feed-forward neurons that goes, 0 to 1.
        epochs: How often the train split is read to recover.
        seed: Of every random choice.
        options: What only this method knows.

    Returns:
        Ref of the pruned model.
    """
    from slimline import release, step

    knobs = {
        "teacher": teacher,
        "data": data,
        "heads": heads,
        "neurons": neurons,
        "epochs": epochs,
        "seed": seed,
    }
    ref, numbers = step.run(f"prune.{method}", source, {**knobs, **options})
    return release.show(ref, numbers, model, metrics)
