"""rollback: the champion that was, again. For whoever is on call, from the Kubeflow page."""

from kfp import dsl

from components.rollback import rollback as take_back


@dsl.pipeline(name="rollback", description="Give the champion's place back to a version that had it before.")
def rollback(name: str, to_version: int = 0, reason: str = "") -> str:
    """Take the champion back. The version is loaded and asked before it serves.

    Args:
        name: Registered model.
        to_version: The version to go back to, which must have been champion; 0 for the one before.
        reason: Why, for the ledger.

    Returns:
        One sentence that says what became of it.
    """
    return take_back(name=name, to_version=to_version, reason=reason).output
