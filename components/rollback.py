"""Take the champion back."""

from components._port import port


@port("language")  # which loads whatever the processor can
def rollback(name: str, to_version: int = 0, reason: str = "") -> str:
    """Load a version that was champion before, see that it answers as it did, and make it the champion again.

    Args:
        name: Registered model.
        to_version: Its version; 0 for the one before.
        reason: Why, for the ledger.

    Returns:
        One sentence that says what became of it.
    """
    from slimline import release

    return release.roll_back(name, to_version, reason)
