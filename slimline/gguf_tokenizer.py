"""A GGUF file's tokenizer as transformers has it, and back.

A GGUF names the rule by which text is split before it becomes tokens (tokenizer.ggml.pre). transformers knows some of
the names and splits by GPT-2's rule where it does not know one, in silence; here an unknown name is an error, and
SmolLM's rule, every digit by itself, is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimline.errors import ModelError
from slimline.gguf_header import Header

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
RULES: dict[str, Any] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
}
"""Rules that transformers has no regular expression for, as tokenizer.json writes them."""
WHOLE_WORDS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
)  # fmt: skip
"""Rules under which a word that is a token stays whole, whatever the merges say."""
PLACES = ("gguf_file", "name_or_path", "is_local", "local_files_only")
"""What transformers writes down of where a tokenizer lay."""
MODELS = ("gpt2", "llama")
PRE = "tokenizer.ggml.pre"
COMMON = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Of names for one rule, those that llama.cpp's converter writes."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def check(header: Header) -> None:
    """Raise ModelError unless the file holds a tokenizer whose rules are known here."""
    fields, where = header.fields, str(header.file)
    model, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{where} has no tokenizer inside. Convert the model again, with its tokenizer beside it.")
    if model not in MODELS:
        raise ModelError(f"{where}: its tokenizer is {model!r}. This version takes: {', '.join(MODELS)}.")
    rows = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else len(tokens)
    if len(tokens) > rows:
        raise ModelError(
            f"{where} knows {len(tokens):,} tokens, but its embedding has {rows:,} rows. Convert it again."
        )
    for key in ("bos", "eos", "unknown", "padding"):
        number = fields.get(f"tokenizer.ggml.{key}_token_id", 0)
        if type(number) is not int or not 0 <= number < len(tokens):
            raise ModelError(
                f"{where}: tokenizer.ggml.{key}_token_id is {number!r}, which is no token. Convert it again."
            )
    if model == "gpt2" and fields.get(PRE) not in {*RULES, *_splits()}:
        raise ModelError(
            f"{where}: its text is split by the rule {fields.get(PRE)!r}, which is not known here. "
            "Bring the model in from its own safetensors and tokenizer.json."
        )


def save(header: Header, out: Path) -> None:
    """Write tokenizer.json and, with the chat template, tokenizer_config.json."""
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer, which would choose the class by a table of architectures that lacks gemma.
    found: Any = PreTrainedTokenizerFast.from_pretrained(
        str(header.file.parent), gguf_file=header.file.name, local_files_only=True
    )
    found.save_pretrained(str(out), save_jinja_files=False)
    if header.fields["tokenizer.ggml.model"] == "gpt2":
        rule = header.fields[PRE]
        whole = _read(out / "tokenizer.json")
        whole["pre_tokenizer"] = RULES.get(rule, whole["pre_tokenizer"])
        whole["model"]["ignore_merges"] = rule in WHOLE_WORDS
        _write(out / "tokenizer.json", whole)
    settings = _read(out / "tokenizer_config.json")
    settings = {
        k: v for k, v in settings.items() if k not in ("gguf_file", "name_or_path", "is_local", "local_files_only")
    }
    if template := header.fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    _write(out / "tokenizer_config.json", settings)


def fields(folder: Path, rows: int) -> dict[str, Any]:
    """What a GGUF says of the tokenizer of a Hugging Face folder, whose model has so many rows of embedding.

    Raises ModelError unless it is a byte-level BPE that splits text by a rule that llama.cpp has a name for.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    whole = _read(file)
    model, added = whole["model"], whole.get("added_tokens") or []
    normalizer = (whole.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        kind = f"{model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
        raise ModelError(f"{file} is a {kind} (normalizer {normalizer}). GGUF is written of byte-level BPE alone.")
    numbers = model["vocab"] | {token["content"]: token["id"] for token in added}
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, number in numbers.items():
        if number >= rows:
            raise ModelError(f"{file} knows token {number:,}, but the embedding has {rows:,} rows.")
        tokens[number], types[number] = token, NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    settings = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        PRE: rule_of(whole, str(file)),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.add_space_prefix": False,
    }
    for key, name in SPECIAL.items():
        token = settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token in numbers:
            found[f"tokenizer.ggml.{key}_token_id"] = numbers[token]
    ids = Tokenizer.from_file(str(file)).encode("a").ids
    found["tokenizer.ggml.add_bos_token"] = ids[0] == found.get("tokenizer.ggml.bos_token_id")
    found["tokenizer.ggml.add_eos_token"] = ids[-1] == found.get("tokenizer.ggml.eos_token_id")
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(settings.get("chat_template"), str):
        found["tokenizer.chat_template"] = settings["chat_template"]
    return found


def rule_of(whole: dict[str, Any], where: str) -> str:
    """llama.cpp's name for the rule by which a tokenizer.json splits text. Raises ModelError if it has none."""
    said, keeps_words = whole.get("pre_tokenizer") or {}, bool(whole["model"].get("ignore_merges"))
    parts = said.get("pretokenizers", [said])
    parts = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts]
    for name, rule in RULES.items():
        wanted = rule.get("pretokenizers", [rule])
        if parts == [{k: v for k, v in part.items() if k != "trim_offsets"} for part in wanted] and not keeps_words:
            return name
    splits = _splits()
    for name in (*COMMON, *splits):
        split = {"type": "Split", "pattern": {"Regex": splits[name]}, "behavior": "Isolated", "invert": False}
        alone = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        if parts == [split, alone] and keeps_words == (name in WHOLE_WORDS):
            return name
    kinds = ", ".join(part.get("type", "none") for part in parts)
    raise ModelError(
        f"{where} splits text by a rule that llama.cpp has no name for ({kinds}). "
        f"Known here: {', '.join((*RULES, *COMMON))}."
    )


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _splits() -> dict[str, str]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return dict(GGUF_PRE_TOKENIZER_SPLITS)
