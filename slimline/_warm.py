"""What the server that steps are forked from imports once (see launch.py). Imports only: no thread, no tensor."""

import contextlib
import importlib

for name in (
    "kfp.dsl.executor_main",
    "slimline.store",
    "slimline.release",
    "torch",
    "transformers",
    "onnxruntime",
    "scipy.stats",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
