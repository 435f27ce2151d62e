"""What can go wrong, as a tree. The message says what is wrong, with the value, and then what to do.

SlimlineError
├── ConfigError   you asked for what cannot be            exit 2
├── ModelError    this model is not what is needed        exit 3
├── DataError     this data is not what is needed         exit 3
├── GateError     the numbers do not allow it             exit 4
└── StoreError    a ref, a digest, a disk, memory or a server  exit 5, worth a retry
    └── DeniedError   the server knows you, and you may not
"""


class SlimlineError(Exception):
    """A failure that the caller can act on. Printed as one sentence, without a traceback."""

    exit_code = 1


class ConfigError(SlimlineError):
    """A recipe or a command asked for what cannot be: an unknown technique, option or value."""

    exit_code = 2


class ModelError(SlimlineError):
    """The model is not what the technique needs: wrong format, incomplete, unsafe, not finite."""

    exit_code = 3


class DataError(SlimlineError):
    """The data is not what the technique needs: missing, empty, wrong columns, one label only."""

    exit_code = 3


class GateError(SlimlineError):
    """The verdict does not allow what was asked, or somebody else promoted first."""

    exit_code = 4


class StoreError(SlimlineError):
    """A ref does not resolve, stored bytes have changed, disk or memory is full, a server is away."""

    exit_code = 5


class DeniedError(StoreError):
    """The tracking server knows who asks, and does not let them."""


def by_name(kind: str, message: str) -> SlimlineError:
    """The error that a step in another process wrote down as (class name, message)."""
    known = {c.__name__: c for c in (ConfigError, ModelError, DataError, GateError, StoreError, DeniedError)}
    return known.get(kind, SlimlineError)(message)
