"""optimize: fetch a model, fit it, make it small and fast, prove it, and promote it if the numbers allow.

source -> fetch -> train -> distill -> prune -> export -> quantize -> candidate
                     |                                                  |
                     +-> export (the baseline, at its best)             |
name -> champion ----+--------- evaluate quality and latency -----------+-> gate -> register -> promote -> report
"""

from kfp import dsl

from components.champion import champion
from components.distill import distill
from components.evaluate import evaluate_latency, evaluate_quality
from components.export import export
from components.fetch import fetch
from components.gate import gate
from components.promote import promote
from components.prune import prune
from components.quantize import quantize
from components.register import register
from components.report import report
from components.train import train
from pipelines._cluster import on_cluster


@dsl.pipeline(name="optimize", description="The smallest, fastest version of a model within a quality limit.")
@on_cluster
def optimize(
    source: str = "",
    data: str = "",
    name: str = "",
    margin: float = 0.02,
    seed: int = 0,
    fetch_method: str = "local",
    train_method: str = "finetune",
    train_epochs: int = 2,
    train_learning_rate: float = 5e-5,
    train_options: dict = {},
    distill_method: str = "logits",
    distill_layers: int = 3,
    distill_epochs: int = 3,
    distill_options: dict = {},
    prune_method: str = "heads",
    prune_heads: float = 0.5,
    prune_neurons: float = 0.5,
    prune_epochs: int = 1,
    prune_options: dict = {},
    export_method: str = "onnx",
    export_options: dict = {},
    quantize_method: str = "int8_dynamic",
    quantize_options: dict = {},
    latency_batch_size: int = 16,
    latency_threads: int = 1,
    latency_options: dict = {},
    gate_champion: bool = True,
    gate_require_approval: bool = False,
    gate_options: dict = {},
):
    """Make the smallest, fastest version of a model that stays within a quality limit.

    Args:
        source: The model: a folder, or package:NAME/folder of an installed package.
        data: The data set: a .parquet, .csv, .tsv or .jsonl file with columns text and label.
        name: Registered model that the result becomes a version of.
        margin: How much accuracy can be spared, as a fraction (0.02 is two points).
        seed: Of every random choice.
        fetch_method: How the model comes in. local.
        train_method: How it is fitted to the task. finetune, or none if it is trained already.
        train_epochs: How often the train split is read.
        train_learning_rate: The highest rate, after warm-up.
        train_options: What only the training method knows.
        distill_method: How a smaller student is made. logits, or none.
        distill_layers: How many layers the student keeps.
        distill_epochs: How often the student reads the train split.
        distill_options: What only the distillation method knows.
        prune_method: What is removed. heads, or none.
        prune_heads: Fraction of all attention heads that goes.
        prune_neurons: Fraction of all feed-forward neurons that goes.
        prune_epochs: How often the pruned model reads the train split to recover.
        prune_options: What only the pruning method knows.
        export_method: What the runtime loads. onnx.
        export_options: What only the export method knows.
        quantize_method: How weights are stored in fewer bits. int8_dynamic, or none.
        quantize_options: What only the quantization method knows.
        latency_batch_size: Texts in one call, beside the calls with a single text.
        latency_threads: Processor threads that a model may use while it is timed.
        latency_options: What only the latency measurement knows.
        gate_champion: Whether the result must hold against the present champion too, measured on the same examples.
        gate_require_approval: Whether a person must approve what has passed before it is promoted.
        gate_options: Further limits, such as {"min_speedup": 2.0}.
    """
    present = champion(name=name, compare=gate_champion)
    fetched = fetch(source=source, method=fetch_method).outputs["Output"]
    base = train(
        source=fetched, data=data, method=train_method, epochs=train_epochs,
        learning_rate=train_learning_rate, seed=seed, options=train_options,
    ).outputs["Output"]  # fmt: skip
    student = distill(
        source=base, data=data, method=distill_method, layers=distill_layers,
        epochs=distill_epochs, seed=seed, options=distill_options,
    ).outputs["Output"]  # fmt: skip
    pruned = prune(
        source=student, teacher=base, data=data, method=prune_method, heads=prune_heads,
        neurons=prune_neurons, epochs=prune_epochs, seed=seed, options=prune_options,
    ).outputs["Output"]  # fmt: skip
    exported = export(source=pruned, data=data, method=export_method, options=export_options).outputs["Output"]
    candidate = quantize(source=exported, data=data, method=quantize_method, options=quantize_options).outputs["Output"]
    served = export(source=base, data=data, method=export_method, options=export_options)
    served.set_display_name("export-baseline")

    models = [base, served.outputs["Output"], student, pruned, exported, candidate]
    before = evaluate_quality(source=base, data=data).set_display_name("quality-baseline").outputs["Output"]
    qualities = [before, before]  # the exported baseline answers as the baseline does: export has checked it
    for label, model in zip(("distilled", "pruned", "exported", "candidate"), models[2:]):
        quality = evaluate_quality(source=model, data=data, baseline=before).set_display_name(f"quality-{label}")
        qualities.append(quality.outputs["Output"])
    rival = evaluate_quality(source=present.outputs["rival"], data=data).set_display_name("quality-champion")
    latency = evaluate_latency(
        source=candidate, against=models[:-1], data=data, batch_size=latency_batch_size,
        threads=latency_threads, options=latency_options,
    ).outputs["Output"]  # fmt: skip

    verdict = gate(
        name=name, source=candidate, quality=qualities[-1], baseline=before, latency=latency,
        champion=present.outputs["standing"], rival=rival.outputs["Output"], margin=margin,
        against_champion=gate_champion, require_approval=gate_require_approval, options=gate_options,
    ).outputs["Output"]  # fmt: skip
    version = register(name=name, source=candidate, verdict=verdict).output
    outcome = promote(name=name, version=version, verdict=verdict).output
    report(
        name=name, version=version, outcome=outcome, models=models, qualities=qualities,
        latency=latency, verdict=verdict,
    )  # fmt: skip
