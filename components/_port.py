"""What every port shares: the image that its step runs in. A port is an interface and two lines."""

from functools import partial
from typing import Any

from kfp import dsl

VERSION = "0.1.0"


def port(image: str) -> Any:
    """A component whose step runs in one of the images of docker/Dockerfile.

    The name is local; `slimline compile --images` puts in its place what `make images` has built.
    """
    return partial(dsl.component, base_image=f"slimline-{image}:{VERSION}", install_kfp_package=False)
