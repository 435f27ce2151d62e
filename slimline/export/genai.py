"""Export for ONNX Runtime GenAI: a language model as a graph with a cache, in the very integers that it was rounded to.

ONNX Runtime GenAI's own builder makes the graph, of floats; then every matrix that the source keeps as whole numbers
takes the place of its floats, which are found row by row by their bytes, so that none can land in a wrong place. Maps
whose inputs the source rounds to int8 (quantize.smoothquant) multiply whole numbers with whole numbers, as it says.

The embedding and the head, which weight quantizers leave as floats, are a fifth of a small model's bytes. The embedding
becomes 8 bits, which cost next to nothing, and so does the head, which is the same table if the model is tied. With
`head_bits` 4 the head is a table of its own, rounded by GPTQ on the calibration text: more on disk, but every token
written reads all of the head and one row of the embedding, so fewer bytes are read. SmolLM2's perplexity grows by 1.7 %
by it, where the same 4 bits rounded to the nearest cost 13 %.

The result must say what the source says: in float arithmetic to a thousandth of the largest logit, and in the
arithmetic that it will run in (int8 activations at accuracy_level 4) within `kl`. Costs two copies of the model in
float32 on disk, and one in memory, while it runs.

Shapes: O = outputs, I = inputs, V = vocabulary, W = width, T = tokens.
"""

# Long because what is refused, what is built and the proof that it says the same belong on one page.
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from slimline import (
    activations,
    data,
    decoder,
    genaigraph,
    graph,
    hf,
    keys_values,
    language,
    layerwise,
    obq,
    passages,
    window,
)
from slimline.errors import ModelError
from slimline.shards import Weights, Writer
from slimline.technique import BaseConfig, Metrics, Stored, track

if TYPE_CHECKING:
    import torch

    from slimline.genaigraph import Choose
    from slimline.nbits import Array
    from slimline.packed import Integers, Scheme

NEEDS, GIVES = "hf", "genai"

BUILT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""Families that the builder knows, by the name that it knows them by."""

FLOATS = {"cpu": ("fp32", 1e-3), "cuda": ("fp16", 1e-2)}
"""What stays floats, as the builder calls it, and how far they may be off. ONNX Runtime's attention knows no other."""

SLIDES = ("gemma2",)
"""Families whose sliding windows the builder carries: of mistral it makes a graph that looks back without end."""


INT8 = "On cpu it keeps them as whole numbers: quantize.kv_cache with form=int8"


class Config(BaseConfig):
    data: Stored = Field(description="texts (calibration split) on which the package must say what its source says")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="what the package is for; what stays floats is float32 on cpu and float16 on cuda"
    )
    head_bits: Literal[0, 4, 8] | None = Field(
        None,
        description="of the head: 0 leaves it and the embedding floats; by default 8, and 0 for a model of floats",
    )
    accuracy_level: int = Field(4, ge=0, le=4, description="4 rounds activations to int8 while they run, 0 or 1 do not")
    tolerance: float | None = Field(
        None,
        gt=0,
        le=0.1,
        description="in float arithmetic, as a fraction of the largest logit; by default 0.001 on cpu and 0.01 on cuda",
    )
    kl: float = Field(0.05, gt=0, description="largest mean divergence of the next token from the source, in nats")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the package. Raises ModelError for a model that the builder does not know, or that comes out different."""
    check(source, config)
    values = hf.read_config(source)
    kind, settings = decoder.family(values, source), values.get("quantization_config") or {}
    head_bits = (8 if settings else 0) if config.head_bits is None else config.head_bits
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch:
        floats, built = Path(scratch) / "floats", Path(scratch) / "built"
        write_floats(source, floats)
        build(floats, built, config, cache_scales(source, Path(scratch) / "scales.json"))
        made = genaigraph.Rewriting(built, config.accuracy_level)
        packed_maps = made.take_integers(Weights(source), kind, settings)
        choose = by_moments(source, config) if head_bits == 4 else None
        tables = made.round_tables(head_bits, choose) if head_bits else {}
        made.keep_last()
        made.write(out)
        inside = json.loads((built / language.GENAI).read_text(encoding="utf-8"))
    decoder.copy_rest(source, out, {"quantization_config": None})
    (out / language.GENAI).write_text(json.dumps(_settings(source, inside), indent=2, sort_keys=True) + "\n")
    found = guard(source, out, tables, config)
    return {
        "packed_maps": float(packed_maps),
        "head_bits": float(head_bits),
        "size_bytes": float(sum(file.stat().st_size for file in out.iterdir() if file.is_file())),
        **found,
    }


def check(source: Path, config: Config) -> None:
    """Raise ModelError for what the builder makes no sound graph of."""
    values = hf.read_config(source)
    kind = decoder.family(values, source)
    settings = values.get("quantization_config") or {}
    window.refuse(values, str(source), "ONNX Runtime GenAI")
    if not (config.device == "cpu" and keys_values.asked(settings, str(source)) == "int"):
        keys_values.refuse(values, str(source), f"ONNX Runtime on {config.device}", INT8)
    if unknown := activations.kinds(settings) - ({"int"} if config.device == "cpu" else set()):
        raise ModelError(
            f"{source} rounds the inputs of its maps to {' and '.join(sorted(unknown))} of 8 bits, which ONNX Runtime "
            f"on {config.device} has no product for. Serve it with vLLM; on cpu, quantize.smoothquant is what it knows."
        )
    if values["model_type"] not in BUILT:
        raise ModelError(
            f"{source} is a {values['model_type']} model, which ONNX Runtime GenAI's builder does not know. "
            f"It knows {', '.join(BUILT)}."
        )
    back, context = values.get("sliding_window"), decoder.context(values)
    slides = values.get("use_sliding_window", True) and back and back < context
    if slides and values["model_type"] not in SLIDES:
        raise ModelError(
            f"{source} looks back {back} tokens of {context}, which comes out right of ONNX Runtime GenAI's "
            f"builder for {', '.join(SLIDES)} only. Set sliding_window to null and max_position_embeddings to {back}."
        )
    weights = Weights(source)
    for name in kind.maps:
        shapes = {weights.shape(f"{kind.layers}.{i}.{name}.weight") for i in range(layerwise.depth(source))}
        if len(shapes) > 1:
            raise ModelError(
                f"{source} has layers of uneven width ({name} is {' and '.join(map(str, sorted(map(str, shapes))))}), "
                "which ONNX Runtime GenAI's builder does not make. Serve it as it is, in PyTorch."
            )


def write_floats(source: Path, out: Path) -> None:
    """The model with every matrix as floats, a layer at a time, and a config.json that the builder reads."""
    out.mkdir()
    values = hf.read_config(source)
    kind, weights, depth = decoder.family(values, source), Weights(source), layerwise.depth(source)
    writer = Writer(out, depth + 1)
    for i in track(range(depth), "writing floats"):
        writer.write(i, {n: weights.read(n).float() for n in weights.below(f"{kind.layers}.{i}")})
        weights.close()
    rest = [name for name in weights.floats() if not name.startswith(f"{kind.layers}.")]
    writer.write(depth, {name: weights.read(name).float() for name in rest})
    writer.finish()
    changes: dict[str, Any] = {
        "quantization_config": None, "dtype": "float32", "architectures": [BUILT[values["model_type"]]],
    }  # fmt: skip
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if values["model_type"] == "phi3" and rope.get("rope_type", rope.get("type")) != "longrope":
        changes["original_max_position_embeddings"] = decoder.context(values)  # else the builder takes it for stretched
    decoder.copy_rest(source, out, changes)


def cache_scales(source: Path, file: Path) -> list[str]:
    """Write down by what keys and values are divided. Returns the builder's options for it, none for floats."""
    values = hf.read_config(source)
    if not keys_values.asked(values.get("quantization_config"), str(source)):
        return []
    kind = decoder.family(values, source)
    attentions = [f"{kind.layers}.{i}.{kind.attention}" for i in range(layerwise.depth(source))]
    keys, value = keys_values.scales(Weights(source), attentions)
    file.write_text(json.dumps({"scales": {"k_scales": keys, "v_scales": value}}))
    return ["kv_cache_quant_scheme=int8_per_tensor", f"kv_cache_scale_file={file}"]


def build(floats: Path, out: Path, config: Config, more: list[str]) -> None:
    """Let the builder make the graph, in a process of its own: it takes module names that are too common to share."""
    precision, _ = FLOATS[config.device]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(floats), "-o", str(out)]
    command += ["-p", precision, "-e", config.device, "-c", str(out.parent / "cache")]
    # a cache of a window's size would need its buffers laid out by the runtime, and saves nothing up to that length
    command += ["--extra_options", "hf_token=false", "windowed_kv_cache=false", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent)
    if done.returncode != 0 or not (out / "model.onnx").is_file():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise ModelError(f"ONNX Runtime GenAI's builder failed: {last.strip()[:300]}. Is config.json the model's own?")


def by_moments(source: Path, config: Config) -> Choose:
    """How a head of 4 bits is rounded: as GPTQ does it, with zero points, on what enters it in the source."""
    import torch

    length = min(512, decoder.context(hf.read_config(source)))
    rounding = obq.Rounding.model_validate({"data": config.data, "length": length})
    model = decoder.load(source)
    before_the_head: Any = model.base_model
    hessian_WW = torch.tensor(0.0)
    with torch.inference_mode():
        for ids_T in track(passages.draw(source, rounding), "listening to what enters the head"):
            ids_BT = torch.tensor(ids_T[None], device=hf.config_device(model))
            hidden_TW = before_the_head(ids_BT).last_hidden_state[0].float().cpu()
            hessian_WW = hessian_WW + hidden_TW.T @ hidden_TW
    seen = obq.Moments(hessian_WW)

    def choose(weight_OI: torch.Tensor, scheme: Scheme) -> Integers:
        return obq.quantize(weight_OI, seen, scheme._replace(symmetric=False), rounding, "the head").whole

    return choose


def _settings(source: Path, built: dict[str, Any]) -> dict[str, Any]:
    """genai_config.json: the builder's, with every end token and the context that the model has."""
    values = hf.read_config(source)
    ends, context = sorted(language.ends(source)), decoder.context(values)
    model = built["model"]
    model["context_length"] = context
    if ends:
        model["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        if not isinstance(model.get("pad_token_id"), int):
            model["pad_token_id"] = ends[0]
    built["search"] |= {"max_length": context, "num_beams": 1, "num_return_sequences": 1}
    return built


CACHE_KL = 5e-3
"""Nats between two runtimes with keys and values of int8. A float between two whole numbers may become either, and what
follows from it moves others: SmolLM2 ends 0.0014 nats apart, where a model of two layers is exact to 3e-6."""
PERTURBATION = 1e-6
"""Relative noise on the embedding, to see how far it moves a source with int8 inputs, where small differences grow.
SmolLM2 moves by 0.015 nats with a scale a token, by 0.07 with fixed ones; its graph is 0.017 and 0.23 away from it."""
PERTURBATIONS = 4
"""So many times as far the graph may be: it is another runtime in every sum, not in the embedding alone."""
LENGTHS = (1, 17, 48, 128)
"""Tokens of the prompts that are compared; the longest is also read in three parts, as a cache is filled."""


def guard(source: Path, out: Path, tables: dict[str, Array], config: Config) -> Metrics:
    """How far the package is from its source. Raises ModelError where that is too far.

    In float arithmetic it must say what the source says with the same tables; as it will run, it is compared with the
    source itself, so that the metrics say what the rounded tables and activations cost.
    """
    asked = prompts(source, Path(config.data))
    settings = hf.read_config(source).get("quantization_config") or {}
    plain, twin, moved = _source_logits(source, tables, asked, bool(activations.kinds(settings)))
    try:
        exact, served = _package_logits(out, asked)
    except ModelError:
        if config.device == "cpu" or language.CUDA in language.providers(out):
            raise
        return {"parity_checked": 0.0}  # a graph for a GPU that this machine lacks, and that its processor cannot run
    near, cost = difference(twin, exact), difference(plain, served)
    if keys_values.asked(settings, str(source)) or activations.kinds(settings):
        most = max(CACHE_KL, PERTURBATIONS * moved)
        if not near.kl_mean <= most:
            raise ModelError(
                f"the graph is {near.kl_mean:.3g} nats from its source, not at most {most:.3g}. {genaigraph.AGAIN}"
            )
    elif not near.max_abs <= (most := (config.tolerance or FLOATS[config.device][1]) * near.scale):
        raise ModelError(
            f"the graph differs from its source by {near.max_abs:.3g} in a logit, not at most {most:.3g}. "
            "Raise the tolerance only if you know why."
        )
    if not cost.kl_mean <= config.kl:
        raise ModelError(
            f"the package is {cost.kl_mean:.3g} nats from its source, not at most {config.kl}. "
            "Try head_bits=8 or 0, or accuracy_level=1; a larger kl accepts it, and leaves the judgement to the gate."
        )
    return {
        "parity_checked": 1.0,
        "parity_max_abs": near.max_abs,
        "kl_mean": cost.kl_mean,
        "agreement": cost.agreement,
    }


def prompts(source: Path, file: Path) -> list[list[int]]:
    """Token ids of uneven lengths, from one token on, as many as the model can hold."""
    tokenizer, context = language.Tokenizer(source), decoder.context(hf.read_config(source))
    stream: list[int] = []
    for text in data.documents(file, "calibration").texts:
        stream += tokenizer.encode(text)
        if len(stream) >= sum(LENGTHS):
            break
    ends = np.cumsum(LENGTHS)
    return [p for end, n in zip(ends, LENGTHS) if (p := stream[end - n : end][:context])]


class Difference(NamedTuple):
    max_abs: float
    """The largest difference of one logit."""
    scale: float
    """The largest logit of the source."""
    kl_mean: float
    """Mean divergence of what may follow a token, source to package, in nats."""
    agreement: float
    """Fraction of tokens after which both hold the same one likeliest."""


def difference(source: list[Array], package: list[Array]) -> Difference:
    """How far logits [T, V], prompt by prompt, are from the source's. Raises ModelError where any is not finite."""
    from scipy.special import log_softmax

    if not all(np.isfinite(logits_TV).all() for logits_TV in (*source, *package)):
        raise ModelError("the source or its package answers with NaN or infinity. Repeat the step that made it.")
    kl, same = [], []
    for source_TV, package_TV in zip(source, package, strict=True):
        left, right = (log_softmax(x.astype(np.float64), axis=1) for x in (source_TV, package_TV))
        kl.append((np.exp(left) * (left - right)).sum(axis=1))
        same.append(source_TV.argmax(axis=1) == package_TV.argmax(axis=1))
    return Difference(
        max_abs=max(float(np.abs(a - b).max()) for a, b in zip(source, package)),
        scale=max(float(np.abs(logits_TV).max()) for logits_TV in source),
        kl_mean=float(np.concatenate(kl).mean()),
        agreement=float(np.concatenate(same).mean()),
    )


def _source_logits(
    source: Path, tables: dict[str, Array], asked: list[list[int]], moving: bool
) -> tuple[list[Array], list[Array], float]:
    """Logits of the source, and of the source with these tables; the longest prompt's twice, as the package gives.

    Last, where `moving`, how far the source is from itself in nats when its embedding is off by a millionth.
    """
    import torch

    model, kind = decoder.load(source), decoder.family(hf.read_config(source), source)
    plain, moved = _logits(model, asked), 0.0

    def replace(name: str, weight: torch.Tensor) -> None:
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)  # one that is tied stays

    if moving:
        weight_VW: Any = model.get_submodule(kind.embedding).weight
        noise_VW = torch.randn(weight_VW.shape, generator=torch.Generator().manual_seed(0)).to(weight_VW)
        replace(kind.embedding, weight_VW * (1 + PERTURBATION * noise_VW))
        moved = difference(plain, _logits(model, asked)).kl_mean
        replace(kind.embedding, weight_VW)
    if not tables:
        return plain, plain, moved
    for name, table in ((kind.embedding, "embedding"), (kind.head, "head")):
        replace(name, torch.from_numpy(tables[table]).to(hf.config_device(model)))
    return plain, _logits(model, asked), moved


def _logits(model: Any, asked: list[list[int]]) -> list[Array]:
    """Of each prompt [T, V], the last one's twice."""
    import torch

    with torch.inference_mode():
        found = [model(torch.tensor([ids], device=hf.config_device(model))).logits[0] for ids in asked]
    arrays = [logits.float().cpu().numpy() for logits in found]
    return [*arrays, arrays[-1]]


def _package_logits(out: Path, asked: list[list[int]]) -> tuple[list[Array], list[Array]]:
    """Logits of the package in float arithmetic, and as it will run."""
    import onnx

    served = _answer(language.Graph(out), asked)
    model = onnx.load(str(out / graph.FILE), load_external_data=False)
    if not genaigraph.levels(model, 1):
        return served, served
    exact = out / ".exact.onnx"  # beside the weights, which it shares
    try:
        exact.write_bytes(model.SerializeToString(deterministic=True))
        return _answer(language.Graph(out, name=exact.name), asked), served
    finally:
        exact.unlink()


def _answer(package: language.Graph, asked: list[list[int]]) -> list[Array]:
    """Logits [T, V] of each prompt, and of the last read in parts, each behind what went before."""
    answers = [package.logits([ids])[0][0] for ids in asked]
    ids, past, parts = asked[-1], None, []
    for part in (ids[:-4], ids[-4:-1], ids[-1:]):
        if part:
            logits_BTV, past = package.logits([part], past)
            parts.append(logits_BTV[0])
    return [*answers, np.concatenate(parts)]
