"""Look at what retraining would do."""

from typing import NamedTuple

from kfp import dsl

from components._port import port


@port("cpu")
def plan(name: str, data: str, metrics: dsl.Output[dsl.Metrics], min_new: int = 1) -> NamedTuple(
    "Plan",
    [
        ("Output", str),  # kfp.local 2.17 takes a condition on an output of any other name for false
        ("data", str),
        ("distill_epochs", int),
        ("distill_layers", int),
        ("distill_method", str),
        ("distill_options", dict),
        ("export_method", str),
        ("export_options", dict),
        ("fetch_method", str),
        ("gate_champion", bool),
        ("gate_options", dict),
        ("gate_require_approval", bool),
        ("latency_batch_size", int),
        ("latency_options", dict),
        ("latency_threads", int),
        ("margin", float),
        ("name", str),
        ("prune_epochs", int),
        ("prune_heads", float),
        ("prune_method", str),
        ("prune_neurons", float),
        ("prune_options", dict),
        ("quantize_method", str),
        ("quantize_options", dict),
        ("seed", int),
        ("source", str),
        ("train_epochs", int),
        ("train_learning_rate", float),
        ("train_method", str),
        ("train_options", dict),
    ],
):
    """Freeze the data, see what is new in them and how far they have drifted, and read the champion's recipe back.

    Args:
        name: Registered model whose champion is to be made again.
        data: Ref of the data as they are now.
        metrics: How many texts are new, and how far they are from those that the champion was made with.
        min_new: With fewer new texts than this there is nothing to do.

    Returns:
        Whether there is something to do, yes or no, and the parameters of optimize to do it with.
    """
    from slimline import retraining

    planned = retraining.plan(name, data, min_new)
    metrics.metadata.update(planned.numbers)
    return retraining.handed(planned)
