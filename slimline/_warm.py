"""What the server that steps are forked from imports once (see launch.py). Imports only: no thread, no tensor.

Each line here was imported by every step, or takes a step more than half a second.
"""

import contextlib
import importlib

for name in (
    "kfp.dsl.executor_main",
    "mlflow.pyfunc",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "slimline.summary",
    "pyarrow.parquet",
    "scipy.stats",
    "jinja2",
    "torch._dynamo",
    "torch.onnx",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "onnxruntime.quantization",
    "onnxruntime.transformers.optimizer",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
