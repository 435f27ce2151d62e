"""Ask who is champion, before anything is measured."""

from typing import NamedTuple

from components._port import port


@port("cpu")
def champion(name: str, compare: bool = True) -> NamedTuple("Champion", [("standing", str), ("rival", str)]):
    """Carry out what people have approved, then name the champion that the candidate will be held against.

    Args:
        name: Registered model.
        compare: Whether the champion is measured beside the candidate.

    Returns:
        Ref of the champion, and of what is to be measured: both empty if there is none, the second if it shall not be.
    """
    from slimline import release

    return release.standing(name, compare)
