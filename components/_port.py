"""What every port shares: the image that its step runs in. A port is an interface and two lines."""

from functools import partial

from kfp import dsl

IMAGE = "slimline-python:0.1.0"

port = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
