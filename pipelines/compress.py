"""compress: GPTQ weights for vLLM, proven like any other candidate.

source -> fetch -> train -> quantize_llm (4-bit weights) -> evaluate quality and latency -> gate -> register -> promote

Two steps disagree here: llm-compressor needs an older transformers than training does. Each has an image of its own.
"""

from kfp import dsl

from components.champion import champion
from components.evaluate import evaluate_latency, evaluate_quality
from components.fetch import fetch
from components.gate import gate
from components.promote import promote
from components.quantize_llm import quantize_llm
from components.register import register
from components.report import report
from components.train import train
from pipelines._cluster import on_cluster


@dsl.pipeline(name="compress", description="A model whose weights are 4-bit integers, in the form that vLLM loads.")
@on_cluster
def compress(
    source: str = "",
    data: str = "",
    name: str = "",
    margin: float = 0.02,
    seed: int = 0,
    fetch_method: str = "local",
    train_method: str = "finetune",
    train_epochs: int = 2,
    train_options: dict = {},
    quantize_method: str = "llmcompressor",
    quantize_options: dict = {},
    latency_options: dict = {},
    gate_champion: bool = True,
    gate_require_approval: bool = False,
    gate_options: dict = {},
):
    """Store a model's weights in 4 or 8 bits and promote it if it stays within a quality limit.

    Args:
        source: The model: a folder, or package:NAME/folder of an installed package.
        data: The data set: a .parquet, .csv, .tsv or .jsonl file with columns text and label.
        name: Registered model that the result becomes a version of.
        margin: How much accuracy can be spared, as a fraction (0.02 is two points).
        seed: Of every random choice.
        fetch_method: How the model comes in. local.
        train_method: How it is fitted to the task. finetune, or none if it is trained already.
        train_epochs: How often the train split is read.
        train_options: What only the training method knows.
        quantize_method: How weights are stored in fewer bits. llmcompressor.
        quantize_options: What only the quantization method knows, such as {"bits": 8}.
        latency_options: What only the latency measurement knows.
        gate_champion: Whether the result must hold against the present champion too, measured on the same examples.
        gate_require_approval: Whether a person must approve what has passed before it is promoted.
        gate_options: Further limits, such as {"max_size_bytes": 30000000}.
    """
    present = champion(name=name, compare=gate_champion)
    fetched = fetch(source=source, method=fetch_method).outputs["Output"]
    base = train(
        source=fetched, data=data, method=train_method, epochs=train_epochs, seed=seed, options=train_options
    ).outputs["Output"]
    candidate = quantize_llm(
        source=base, data=data, method=quantize_method, options=quantize_options
    ).outputs["Output"]  # fmt: skip
    before = evaluate_quality(source=base, data=data).set_display_name("quality-baseline").outputs["Output"]
    quality = evaluate_quality(source=candidate, data=data, baseline=before).set_display_name("quality-candidate")
    after = quality.outputs["Output"]
    rival = evaluate_quality(source=present.outputs["rival"], data=data).set_display_name("quality-champion")
    latency = evaluate_latency(source=candidate, against=[base], data=data, options=latency_options).outputs["Output"]
    verdict = gate(
        name=name, source=candidate, quality=after, baseline=before, latency=latency,
        champion=present.outputs["standing"], rival=rival.outputs["Output"], margin=margin,
        against_champion=gate_champion, require_approval=gate_require_approval, options=gate_options,
    ).outputs["Output"]  # fmt: skip
    version = register(name=name, source=candidate, verdict=verdict).output
    outcome = promote(name=name, version=version, verdict=verdict).output
    report(
        name=name, version=version, outcome=outcome, models=[base, candidate], qualities=[before, after],
        latency=latency, verdict=verdict,
    )  # fmt: skip
