"""engine: a model becomes a TensorRT engine, in the types that were asked for.

source -> fetch -> train -> export (plain ONNX) -> quantize -> export_engine

The first steps run in slimline-cpu, the last in slimline-tensorrt, which knows no PyTorch.
"""

from kfp import dsl

from components.export import export
from components.export_engine import export_engine
from components.fetch import fetch
from components.quantize import quantize
from components.train import train
from pipelines._cluster import on_cluster


@dsl.pipeline(name="engine", description="A TensorRT engine of a model, with profiles for the lengths of the data.")
@on_cluster
def engine(
    source: str = "",
    data: str = "",
    fetch_method: str = "local",
    train_method: str = "none",
    train_options: dict = {},
    export_options: dict = {},
    quantize_method: str = "fp16",
    quantize_options: dict = {},
    engine_options: dict = {},
):
    """Build an engine for NVIDIA GPUs.

    Args:
        source: The model: a folder, package:NAME/folder, or with fetch_method none a ref such as runs:/ID/model.
        data: The data set: a .parquet, .csv, .tsv or .jsonl file with columns text and label.
        fetch_method: How the model comes in. local, or none if it is in the store.
        train_method: How it is fitted to the task. finetune, or none if it is trained already.
        train_options: What only the training method knows.
        export_options: How the graph is traced, such as {"opset": 18}. It is not fused.
        quantize_method: The types that the engine works in. fp16, bf16, int8_static, fp8, int4_weights, or none.
        quantize_options: What only the quantization method knows.
        engine_options: What only the engine knows, such as {"profiles": 3, "compute_capabilities": ["8.9"]}.
    """
    fetched = fetch(source=source, method=fetch_method).outputs["Output"]
    base = train(source=fetched, data=data, method=train_method, options=train_options).outputs["Output"]
    graph = export(source=base, data=data, fuse=False, options=export_options).outputs["Output"]
    typed = quantize(source=graph, data=data, method=quantize_method, options=quantize_options).outputs["Output"]
    export_engine(source=typed, data=data, options=engine_options).set_display_name("engine")
