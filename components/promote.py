"""Make a version the champion."""

from components._port import port


@port("cpu")
def promote(name: str, version: int, verdict: str) -> str:
    """Make a version the champion if its verdict is PASS and nobody moved the champion meanwhile.

    Args:
        name: Registered model.
        version: The version to promote.
        verdict: Ref of the gate's verdict.

    Returns:
        One sentence that says what became of it.
    """
    from slimline import release

    return release.promote_if_passed(name, version, verdict)
