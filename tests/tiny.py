"""Tiny models of real architectures, made on the spot, and data that they can learn."""

import json
from pathlib import Path

import numpy as np

from slimline import artifact

GOOD = ["fine", "lovely", "superb", "moving", "bright", "warm"]
BAD = ["dull", "awful", "clumsy", "boring", "cold", "stale"]
PLAIN = ["the", "a", "film", "plot", "actor", "scene", "story", "with", "and", "of", "is", "was", "very", "long", "end"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ("negative", "positive")
KINDS = ("bert", "roberta", "electra", "distilbert")


def make_tokenizer(folder: Path) -> int:
    """A WordLevel tokenizer with BERT's template; returns the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = SPECIAL + GOOD + BAD + PLAIN
    fast = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.normalizer, fast.pre_tokenizer = Lowercase(), Whitespace()
    fast.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return len(words)


def make_tiny(
    kind: str, folder: Path, *, layers: int = 3, width: int = 32, heads: int = 4, seed: int = 0, head: bool = True
) -> Path:
    """A Hugging Face folder as it comes from outside: config, safetensors, tokenizer. Unsealed."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "model_type": kind,
        "vocab_size": make_tokenizer(folder),
        "max_position_embeddings": 66,
        "pad_token_id": 0,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: i for i, name in enumerate(LABELS)},
    }
    if kind == "distilbert":
        values |= {"dim": width, "n_layers": layers, "n_heads": heads, "hidden_dim": 2 * width}
    else:
        values |= {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 2 * width,
            "type_vocab_size": 1 if kind == "roberta" else 2,
        }
        if kind == "electra":
            values["embedding_size"] = width
    config = AutoConfig.for_model(**values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (AutoModelForSequenceClassification if head else AutoModel).from_config(config)
        for weight in model.parameters():  # fresh encoders answer almost the same to everything
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    saved = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    if not head:
        saved.pop("id2label", None)
        saved.pop("label2id", None)
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def seal_tiny(folder: Path) -> Path:
    """Seal a folder as a classifier of format hf."""
    artifact.seal(folder, format="hf", task="text-classification", labels=LABELS, base="made for a test")
    return folder


def make_data(file: Path, rows: int = 480, seed: int = 0) -> Path:
    """A data set of texts of uneven length whose label is that of their telling words."""
    import pyarrow as pa
    from pyarrow import parquet

    draw = np.random.default_rng(seed)
    texts, labels, seen = [], [], set()
    while len(texts) < rows:
        label = LABELS[len(texts) % 2]
        telling = draw.choice(GOOD if label == "positive" else BAD, size=draw.integers(1, 4))
        words = [*telling, *draw.choice(PLAIN, size=draw.integers(1, 25))]
        text = " ".join(draw.permutation(words))
        if text not in seen:
            seen.add(text)
            texts.append(text)
            labels.append(label)
    split = [("train", "train", "train", "calibration", "validation", "test", "test")[i // 2 % 7] for i in range(rows)]
    ids = [str(i) for i in range(rows)]
    parquet.write_table(pa.table({"id": ids, "text": texts, "label": labels, "split": split}), file)
    return file
