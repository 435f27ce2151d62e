"""Fit a model to the task."""

from kfp import dsl

from components._port import port


@port("cpu")
def train(
    source: str,
    data: str,
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    method: str = "finetune",
    epochs: int = 2,
    learning_rate: float = 5e-5,
    seed: int = 0,
    options: dict = {},
) -> str:
    """Fit a model to the task, on the data's train split.

    Args:
        source: Ref of the model to train.
        data: Ref of the data set: a file with columns text, label and, if it is split already, split.
        model: What was made, for the Kubeflow page.
        metrics: What was measured on the way.
        method: A file in slimline/train, or none.
        epochs: How often the train split is read.
        learning_rate: The highest rate, after warm-up.
        seed: Of every random choice.
        options: What only this method knows, such as {"batch_size": 32}.

    Returns:
        Ref of the trained model.
    """
    from slimline import release, step

    knobs = {"data": data, "epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    ref, numbers = step.run(f"train.{method}", source, {**knobs, **options})
    return release.show(ref, numbers, model, metrics)
