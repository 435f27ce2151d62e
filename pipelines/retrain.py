"""retrain: the champion made again, by its own recipe, from the data that there are now. For a schedule.

name, data -> plan -> nothing new: the end
               |
               +----> optimize (frozen data, the champion's base and recipe, gated against the champion)
"""

from kfp import dsl

from components.plan import plan
from pipelines import optimize
from pipelines._cluster import inside, on_cluster


@dsl.pipeline(name="retrain", description="The champion made again from new data, by the recipe that it was made by.")
@on_cluster
def retrain(data: str = "", name: str = "", plan_min_new: int = 1):
    """Train the champion's base again on new data, optimize it by the champion's recipe, and gate it against both.

    Args:
        data: The data as they are now: a file with columns text and label, or a ref such as s3://bucket/reviews.parquet.
        name: Registered model whose champion is made again.
        plan_min_new: With fewer texts than this that the champion was not made with, there is nothing to do. 1 or more.
    """
    planned = plan(name=name, data=data, min_new=plan_min_new)
    with dsl.If(planned.outputs["Output"] == "yes", name="new-data"):
        given = {key: channel for key, channel in planned.outputs.items() if key not in ("Output", "metrics")}
        inside(optimize.optimize)(**given)
