"""How a pipeline run begins and ends, in the store and for whoever is waiting for it."""

from kfp import dsl

from components._port import port


@port("cpu")
def begin(pipeline: str, link: dsl.Output[dsl.Markdown]):
    """Open the run in MLflow that all steps hang under, and refuse a recipe that cannot work before any step does.

    Args:
        pipeline: The pipeline's name. Its parameters come along as inputs that are not named here.
        link: Where to look in MLflow.
    """
    from slimline import outcome

    outcome.show(outcome.begin(pipeline), link.path)


@port("cpu")
def finish(pipeline: str, status: dsl.PipelineTaskFinalStatus, told: dsl.Output[dsl.Markdown]):
    """Close the run in MLflow, say what came of it and why, and call the webhook if there is one. Never fails.

    Args:
        pipeline: The pipeline's name.
        status: How the steps ended.
        told: What came of it, with links into MLflow.
    """
    from slimline import outcome

    outcome.show(outcome.finish(pipeline, status.state, status.error_message or ""), told.path)
