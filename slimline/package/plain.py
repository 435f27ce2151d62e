"""A Hugging Face folder that plain transformers loads, without slimline: what KServe and vLLM start from.

The weights stay as they are. config.json gains what only the manifest knew, the names of the labels, and the
architecture; tokenizer_config.json says that tokenizer.json is the whole truth, where a library would make a tokenizer
anew from what it knows of the family.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from slimline import allowlist, hf
from slimline.errors import ModelError
from slimline.package import Model, copy

ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}


def require(model: Model, target: str) -> dict[str, Any]:
    """The config of an hf model whose layers have the sizes that it says. Raises ModelError for any other."""
    if model.manifest.format != "hf":
        raise ModelError(
            f"{model.ref} is {model.manifest.format}, and {target} loads hf models. Package it with --for triton."
        )
    values = hf.read_config(model.path)
    if values.get("model_type") not in ARCHITECTURES:
        raise ModelError(
            f"{model.ref} is a {values.get('model_type')} model. This version takes {', '.join(ARCHITECTURES)}."
        )
    if found := pruned(model.path, values):
        raise ModelError(
            f"{model.ref} is pruned ({found}), and {target} builds every layer as config.json says. "
            "Put export.onnx after it and package that with --for triton."
        )
    return values


def pruned(folder: Path, values: dict[str, Any]) -> str:
    """The first matrix with other rows than config.json says, in words; empty if there is none."""
    layout = hf.LAYOUTS[values["model_type"]]
    width = int(values.get("hidden_size") or values["dim"])
    wanted = dict.fromkeys((layout.query, layout.key, layout.value), width)
    wanted[layout.up] = int(values.get("intermediate_size") or values["hidden_dim"])
    parts = "|".join(re.escape(part) for part in wanted)
    weight = re.compile(rf"(?:^|\.){re.escape(layout.layers)}\.(\d+)\.({parts})\.weight(?:_packed)?")
    for name, tensor in sorted(allowlist.tensors(folder).items()):
        if (found := weight.search(name)) and found.end() == len(name) and tensor.shape[0] != wanted[found[2]]:
            return f"layer {found[1]} has {tensor.shape[0]} rows in {found[2]}, not {wanted[found[2]]}"
    return ""


def write(model: Model, values: dict[str, Any], out: Path) -> None:
    """The folder: weights and tokenizer as they are, and both configs made explicit."""
    out.mkdir()
    copy(model, (name for name in model.manifest.files if name.endswith((".safetensors", allowlist.INDEX))), out)
    copy(model, (name for name in hf.TOKENIZER_FILES if name in model.manifest.files), out)
    labels = model.manifest.labels
    said = {
        "architectures": [ARCHITECTURES[values["model_type"]]],
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    text = json.dumps(values | said, indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    write_tokenizer(model.path, values, out / "tokenizer_config.json")


def write_tokenizer(source: Path, values: dict[str, Any], file: Path) -> None:
    """tokenizer_config.json, such that tokenizer.json is taken as it is and texts are cut where slimline cuts them."""
    limit = hf.max_length(source)
    tokenizer = hf.tokenizer(source, limit)
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    takes_types = values["model_type"] != "distilbert" and int(values.get("type_vocab_size") or 0) > 1
    told |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": limit,
        "model_input_names": ["input_ids", "attention_mask"] + ["token_type_ids"] * takes_types,
        "padding_side": "right",
        "truncation_side": "right",
    }
    told.setdefault("pad_token", tokenizer.fast.id_to_token(tokenizer.pad))
    file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
