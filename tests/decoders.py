"""Tiny language models of real architectures, made on the spot, and documents for them."""

import json
from pathlib import Path

import numpy as np

from slimline import artifact
from slimline.decoder import FAMILIES, TASK
from tests.tiny import BAD, GOOD, PLAIN

KINDS = tuple(FAMILIES)
SPECIAL = ["<|end|>", "<unk>"]
WORDS = [*SPECIAL, *GOOD, *BAD, *PLAIN]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"


def make_tokenizer(folder: Path, chat: bool = True) -> int:
    """A WordLevel tokenizer as decoders have one; returns the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse, Replace, Sequence, Strip
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Metaspace

    words = [word if word in SPECIAL else "▁" + word for word in WORDS]
    fast = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = Metaspace()
    fast.decoder = Sequence([Replace("▁", " "), Fuse(), Strip(" ", 1, 0)])
    fast.add_special_tokens(["<|end|>"])
    fast.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<unk>", "pad_token": "<|end|>"}
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT} if chat else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return len(words)


def make_decoder(
    kind: str, folder: Path, *, layers: int = 2, width: int = 64, heads: int = 4, groups: int = 2, feed: int = 96,
    tied: bool | None = None, seed: int = 0, vocabulary: int = 0, positions: int = 128, **more,
) -> Path:  # fmt: skip
    """A Hugging Face folder as it comes from outside: config, safetensors, tokenizer. Unsealed.

    Of `heads` queries each `heads / groups` share a key and a value, where the family can.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    size = make_tokenizer(folder)
    values = {
        "model_type": kind,
        "vocab_size": vocabulary or size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if kind == "gpt2":
        values |= {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": feed, "n_positions": positions}
    else:
        values |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        values |= {"max_position_embeddings": positions}
        values["ffn_dim" if kind == "opt" else "intermediate_size"] = feed
    if kind == "opt":
        values["word_embed_proj_dim"] = width
    elif kind not in ("gpt2", "phi"):
        values["num_key_value_heads"] = groups
    if kind in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        values["head_dim"] = width // heads
    if tied is not None:
        values["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(**values | more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, weight in model.named_parameters():  # fresh models answer almost the same to everything
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.12)
            elif "norm" in name or "ln_" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            else:
                torch.nn.init.normal_(weight, std=0.05)
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    saved = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def seal_decoder(folder: Path) -> Path:
    """Seal a folder as a language model of format hf."""
    artifact.seal(folder, format="hf", task=TASK, labels=(), base="made for a test")
    return folder


def make_documents(file: Path, rows: int = 120, seed: int = 0) -> Path:
    """Documents of uneven length in which words follow each other by a rule, split already."""
    import pyarrow as pa
    from pyarrow import parquet

    draw = np.random.default_rng(seed)
    words = [*PLAIN, *GOOD, *BAD]
    texts = []
    while len(texts) < rows:
        at, said = int(draw.integers(len(words))), []
        for _ in range(int(draw.integers(10, 60))):
            said.append(words[at])
            at = (at * 5 + int(draw.integers(1, 4))) % len(words)  # one of three may follow each word
        if (text := " ".join(said)) not in texts:
            texts.append(text)
    split = [("train", "train", "calibration", "calibration", "validation", "test", "test")[i % 7] for i in range(rows)]
    parquet.write_table(pa.table({"id": [str(i) for i in range(rows)], "text": texts, "split": split}), file)
    return file
