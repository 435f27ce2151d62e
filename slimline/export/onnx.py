"""Export to ONNX: one graph file for ONNX Runtime or TensorRT, which says what the PyTorch model says.

An encoder is traced for any batch and any length, then fused by ONNX Runtime's own optimizer: attention, layer norms
and GELU become one node each. The TorchScript exporter, on purpose: on the dynamo exporter's graph that optimizer finds
no attention at all. Costs seconds and two copies of the weights in memory.

A language model becomes a plain graph with a KV cache (decoder_graph.py), for export.tensorrt and whatever else reads
standard operators: by the dynamo exporter, never fused. Packed weights are floats in it; quantize the graph instead.

Shapes: B = texts, S = tokens, L = labels.
"""

# Long because encoders and language models are exported by one technique: what a user asks for is a graph.
from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from slimline import artifact, data, decoder, decoder_graph, graph, hf, keys_values, language, parity, window
from slimline.errors import ConfigError, ModelError
from slimline.technique import BaseConfig, Metrics, Stored

if TYPE_CHECKING:
    import onnx
    import torch

NEEDS, GIVES = "hf", "onnx"


class Config(BaseConfig):
    data: Stored = Field(description="calibration texts on which graph and source must agree")
    fuse: bool = Field(True, description="of encoders: merge attention, layer norm and GELU into one node each")
    first_token: bool = Field(True, description="of encoders: compute only the head's token in the last layer")
    max_length: int | None = Field(
        None, ge=2, le=1 << 20, description="of language models: tokens, prompt and answer together; none: the model's"
    )
    opset: int = Field(17, ge=17, le=20, description="version of the ONNX operators")
    texts: int = Field(64, ge=2, description="how many texts the parity guard compares")
    tolerance: float = Field(1e-3, gt=0, le=0.1, description="allowed, as a fraction of the largest logit")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write model.onnx, config.json and the tokenizer. Raises ModelError where the logits differ."""
    if decoder.is_decoder(source):
        return run_decoder(source, out, config)
    model = hf.load(source)
    settings = _settings(source)
    tokenizer = hf.tokenizer(source, settings["slimline_max_length"])
    texts = parity.texts(Path(config.data), config.texts)
    expected = hf.logits(model, tokenizer, texts)
    out.mkdir(parents=True, exist_ok=True)
    with graph.quiet():
        trace(model, out / graph.FILE, config.opset)
        result = graph.read(out / graph.FILE)
        if config.fuse:
            result = fuse(result, model)
        one_token = graph.first_token_only(result) if config.first_token else 0
    graph.write(result, out / graph.FILE)
    difference = parity.compare(expected, parity.onnx_logits(out / graph.FILE, tokenizer, texts))
    parity.require_equal(difference, texts, config.tolerance)
    for name in hf.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {
        **fusions(result, len(hf.layers(model))),
        "one_token_nodes": float(one_token),
        "parity_max_abs": difference.max_abs,
        "parity_agreement": difference.agreement,
        "size_bytes": graph.size_bytes(out),
    }


def run_decoder(source: Path, out: Path, config: Config) -> Metrics:
    """Write the graph of a language model with its KV cache, config.json and the tokenizer."""
    values = hf.read_config(source)
    window.refuse(values, str(source), "a graph")
    keys_values.refuse(values, str(source), "a graph")
    limit = decoder.context(values)
    longest = config.max_length or limit
    if longest > limit:
        raise ConfigError(f"max_length is {longest} but the model reads {limit} tokens at most. Lower it.")
    out.mkdir(parents=True, exist_ok=True)
    with graph.quiet():
        traced = decoder_graph.trace(decoder.load(source), decoder.family(values, source), config.opset, longest)
    graph.write(traced, out / graph.FILE)
    texts = data.documents(Path(config.data), "calibration").texts[: config.texts]
    prompts = decoder_graph.prompts(language.Tokenizer(source), texts)
    prompts = [ids[: longest - 1] for ids in prompts]
    hint = "Serve the model as it is."
    difference = decoder_graph.difference(decoder.load(source).cpu(), out / graph.FILE, prompts, hint)
    parity.require_equal(difference, texts, config.tolerance, "Try another opset")
    settings = {"slimline_max_length": longest, "quantization_config": None}
    decoder.copy_rest(source, out, settings)
    return {
        "layers": float(len([o for o in traced.graph.output if o.name.endswith(".key")])),
        "parity_max_abs": difference.max_abs,
        "parity_agreement": difference.agreement,
        "size_bytes": graph.size_bytes(out),
    }


def trace(model: torch.nn.Module, file: Path, opset: int) -> None:
    """Write the unfused graph: int64 inputs [B, S] in the signature's order, one output `logits` [B, L]."""
    import torch

    source: Any = model.cpu().eval()
    source.set_attn_implementation("eager")  # the other implementations trace to graphs that are not fused
    names = inputs(model)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = source

        def forward(self, *values: torch.Tensor) -> Any:
            # by name: the exporter goes by position, and with inputs swapped a graph still runs
            return source(**dict(zip(names, values, strict=True))).logits

    ids = torch.full((2, 7), 5, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0  # a mask of ones would be folded away
    example = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    torch.onnx.export(
        Logits().eval(),
        tuple(example[name] for name in names),
        str(file),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={name: {0: "batch", 1: "length"} for name in names} | {"logits": {0: "batch"}},
        opset_version=opset,
        dynamo=False,
    )


def inputs(model: torch.nn.Module) -> list[str]:
    """The inputs that the model's forward takes, in its own order."""
    config: Any = model.config
    known = [name for name in inspect.signature(model.forward).parameters if name in hf.INPUTS]
    return [n for n in known if n != "token_type_ids" or getattr(config, "type_vocab_size", 0) > 1]


def fuse(traced: onnx.ModelProto, model: torch.nn.Module) -> onnx.ModelProto:
    """ONNX Runtime's fusions for encoders; layers may have different numbers of heads."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    config: Any = model.config
    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)  # an index would hold for right padding only
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    # opt_level 0: no offline pass of the runtime, which would tie the file to this machine
    found = optimizer.optimize_model(traced, "bert", heads, width, options, opt_level=0)
    found.topological_sort()
    fused: onnx.ModelProto = found.model
    if not any(opset.domain == "com.microsoft" for opset in fused.opset_import):
        fused.opset_import.add(domain="com.microsoft", version=1)
    graph.set_heads(fused, width // heads)
    return fused


def fusions(model: onnx.ModelProto, layers: int) -> Metrics:
    """How many nodes of each kind were fused. Fewer attentions than layers: slower than it could be."""
    found = graph.count(model)
    norms = ("SkipLayerNormalization", "EmbedLayerNormalization")
    return {
        "attention_fused": float(found["Attention"] + found["MultiHeadAttention"]),
        "layer_norm_fused": float(sum(found[name] for name in norms)),
        "gelu_fused": float(found["BiasGelu"] + found["Gelu"] + found["FastGelu"]),
        "layers": float(layers),
    }


def _settings(source: Path) -> dict[str, Any]:
    """The source's config.json, with the labels it was sealed with and the length that it serves."""
    settings: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if (source / artifact.MANIFEST).is_file() and not artifact.read(source).labels:
        raise ModelError(f"{source} has no classification head. Put train.finetune before export.onnx.")
    settings["slimline_max_length"] = hf.max_length(source)
    if (source / artifact.MANIFEST).is_file():
        labels = artifact.read(source).labels
        settings["id2label"] = {str(index): label for index, label in enumerate(labels)}
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
    return settings
