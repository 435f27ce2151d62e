"""language: a language model in, the smallest and fastest one out that stays within its limits.

source -> fetch -> prune -> distill -> attention -> rotate -> quantize -> export -> candidate
            |                                                                 |
            +-> export (the baseline, in floats)                              |
            +-- perplexity, divergence, multiple choice, speed ---------------+-> gate -> register -> promote -> report
"""

from kfp import dsl

from components.language import (
    attention_language,
    champion_language,
    distill_language,
    evaluate_choices,
    evaluate_divergence,
    evaluate_generation,
    evaluate_language,
    export_language,
    fetch_language,
    gate_language,
    promote_language,
    prune_language,
    quantize_language,
)
from components.register import register
from components.report import report
from pipelines._cluster import on_cluster


@dsl.pipeline(name="language", description="The smallest, fastest version of a language model within its limits.")
@on_cluster
def language(
    source: str = "",
    data: str = "",
    task: str = "",
    name: str = "",
    margin: float = 0.12,
    seed: int = 0,
    fetch_method: str = "local",
    fetch_options: dict = {},
    prune_method: str = "none",
    prune_options: dict = {},
    distill_method: str = "none",
    distill_options: dict = {},
    attention_method: str = "none",
    attention_options: dict = {},
    rotate_method: str = "none",
    rotate_options: dict = {},
    quantize_method: str = "gptq",
    quantize_options: dict = {},
    export_method: str = "genai",
    export_options: dict = {},
    perplexity_options: dict = {},
    divergence_options: dict = {},
    choices_options: dict = {},
    generation_threads: int = 2,
    generation_options: dict = {},
    gate_champion: bool = True,
    gate_require_approval: bool = False,
    gate_options: dict = {},
):
    """Make the smallest, fastest version of a language model that stays within its limits.

    Args:
        source: The model: a folder, a .gguf file, or package:NAME/folder of an installed package.
        data: Documents: a .parquet, .csv, .tsv or .jsonl file with a column text.
        task: Folder of a multiple-choice task as lm-evaluation-harness reads it: a YAML file and its questions.
        name: Registered model that the result becomes a version of.
        margin: By how much perplexity may grow, as a fraction (0.12 is twelve percent).
        seed: Of every random choice.
        fetch_method: How the model comes in. local, or gguf.
        fetch_options: What only this method knows.
        prune_method: What is removed. wanda, sparsegpt, width, layers, or none.
        prune_options: What only this method knows.
        distill_method: How the model learns from the one that came in. tokens, on_policy, sequences, or none.
        distill_options: What only this method knows.
        attention_method: How attention is swapped. sliding_window, or none.
        attention_options: What only this method knows.
        rotate_method: What is folded into the weights before they are rounded. rotate, or none.
        rotate_options: What only this method knows.
        quantize_method: How weights are stored in fewer bits. rtn, gptq, awq, round, mixed, or none.
        quantize_options: What only this method knows, such as {"bits": 4, "group_size": 64}.
        export_method: What the runtime loads. genai.
        export_options: What only the candidate's export knows, such as {"head_bits": 8}.
        perplexity_options: What only this evaluation knows.
        divergence_options: What only this evaluation knows.
        choices_options: What only this evaluation knows.
        generation_threads: Processor threads that a model may use while it is timed.
        generation_options: What only this evaluation knows.
        gate_champion: Whether the result must hold against the present champion too, measured on the same examples.
        gate_require_approval: Whether a person must approve what has passed before it is promoted.
        gate_options: Further limits, such as {"max_kl": 0.1}.
    """
    present = champion_language(name=name, compare=gate_champion)
    base = fetch_language(source=source, method=fetch_method, options=fetch_options).outputs["Output"]
    pruned = prune_language(
        source=base, data=data, method=prune_method, seed=seed, options=prune_options
    ).outputs["Output"]  # fmt: skip
    taught = distill_language(
        source=pruned, teacher=base, data=data, method=distill_method, seed=seed, options=distill_options
    ).outputs["Output"]
    attending = attention_language(
        source=taught, method=attention_method, options=attention_options
    ).outputs["Output"]  # fmt: skip
    rotated = quantize_language(source=attending, data=data, method=rotate_method, seed=seed, options=rotate_options)
    rotated.set_display_name("rotate")
    quantized = quantize_language(
        source=rotated.outputs["Output"], data=data, method=quantize_method, seed=seed, options=quantize_options
    ).outputs["Output"]
    candidate = export_language(
        source=quantized, data=data, method=export_method, options=export_options
    ).outputs["Output"]  # fmt: skip
    exported = export_language(source=base, data=data, method=export_method, options={"head_bits": 0})
    served = exported.set_display_name("export-baseline").outputs["Output"]

    measured = evaluate_language(source=served, data=data, options=perplexity_options)
    before = measured.set_display_name("perplexity-baseline").outputs["Output"]
    measured = evaluate_language(source=candidate, data=data, baseline=before, options=perplexity_options)
    after = measured.set_display_name("perplexity-candidate").outputs["Output"]
    rival = evaluate_language(source=present.outputs["rival"], data=data, options=perplexity_options)
    rival.set_display_name("perplexity-champion")
    divergence = evaluate_divergence(
        source=candidate, base=base, data=data, options=divergence_options
    ).outputs["Output"]  # fmt: skip
    answered = evaluate_choices(source=served, task=task, options=choices_options)
    choices_before = answered.set_display_name("choices-baseline").outputs["Output"]
    answered = evaluate_choices(source=candidate, task=task, baseline=choices_before, options=choices_options)
    choices_after = answered.set_display_name("choices-candidate").outputs["Output"]
    speed = evaluate_generation(
        source=candidate, against=[served], data=data, threads=generation_threads, options=generation_options
    ).outputs["Output"]

    verdict = gate_language(
        name=name, source=candidate, quality=after, baseline=before, latency=speed, divergence=divergence,
        choices=choices_after, choices_baseline=choices_before,
        champion=present.outputs["standing"], rival=rival.outputs["Output"], margin=margin,
        against_champion=gate_champion, require_approval=gate_require_approval, options=gate_options,
    ).outputs["Output"]  # fmt: skip
    version = register(name=name, source=candidate, verdict=verdict).output
    outcome = promote_language(name=name, version=version, verdict=verdict).output
    report(
        name=name, version=version, outcome=outcome, models=[served, candidate], qualities=[before, after],
        latency=speed, verdict=verdict,
    )  # fmt: skip
