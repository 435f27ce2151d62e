"""rollback: the champion that was, again. For whoever is on call, from the Kubeflow page."""

from kfp import dsl

from components.rollback import rollback as take_back
from pipelines._cluster import on_cluster


@dsl.pipeline(name="rollback", description="Give the champion's place back to a version that had it before.")
@on_cluster
def rollback(name: str = "", to_version: int = 0, reason: str = ""):
    """Take the champion back. The version is loaded and asked before it serves.

    Args:
        name: Registered model.
        to_version: The version to go back to, which must have been champion; 0 for the one before.
        reason: Why, for the ledger.
    """
    take_back(name=name, to_version=to_version, reason=reason)
