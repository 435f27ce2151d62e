"""Models whose answers can be worked out in the head: each 'good' and each 'bad' in a text counts two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from slimline import artifact
from slimline.artifact import Stage

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "long", "a"]
LABELS = ("bad", "good")


def tokenizer_files(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def onnx_model(
    folder: Path, *, masked: bool = True, unknown: float = 0.0, weight: float = 2.0, history: tuple[str, ...] = ()
) -> Path:
    """A sealed onnx model. Unmasked, it counts padding as praise; `unknown` is what a word it never saw is worth."""
    import onnx
    from onnx import TensorProto, helper

    folder.mkdir(parents=True)
    worth = {"[PAD]": 3.0, "[UNK]": unknown, "good": weight, "bad": -weight}
    table = np.array([[-worth.get(w, 0.0), worth.get(w, 0.0)] for w in WORDS], dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["each"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["each", "column"], ["seen"]),
        helper.make_node("ReduceSum", ["seen" if masked else "each", "one"], ["logits"], keepdims=0),
    ]
    shape = ["batch", "tokens"]
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info(n, TensorProto.INT64, shape) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.ravel()),
            helper.make_tensor("last", TensorProto.INT64, [1], [2]),
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "model.onnx")
    config = {"model_type": "bert", "id2label": dict(enumerate(LABELS)), "slimline_max_length": 16}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_files(folder)
    return _seal(folder, "onnx", history)


def hf_model(folder: Path, history: tuple[str, ...] = ("train.finetune",)) -> Path:
    """A sealed BERT of one small layer, with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, id2label=dict(enumerate(LABELS)), label2id={v: i for i, v in enumerate(LABELS)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    for extra in folder.iterdir():
        if extra.name not in ("config.json", "model.safetensors"):
            extra.unlink()
    tokenizer_files(folder)
    return _seal(folder, "hf", history)


def _seal(folder: Path, format: artifact.Format, history: tuple[str, ...]) -> Path:
    stages = tuple(Stage(technique=name, config={}, metrics={}, parent="") for name in history)
    artifact.seal(folder, format=format, task="text-classification", labels=LABELS, base="", history=stages)
    return folder
