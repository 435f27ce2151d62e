"""Nothing foreign runs: what an incoming Hugging Face model folder may hold, checked before anything opens it.

Weights come as safetensors, whose header is read here, with bounds, and everything else as JSON or text. A config is an
input, not a setting: keys that name code to load are refused at any depth. Nothing in here imports a library that could
follow such a key. Files that are neither taken nor dangerous (a README, pickles beside safetensors) are left behind.
"""

# Long because what a folder may hold is one list, checked in one place.
from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slimline.errors import ModelError

MODEL_TYPES = (
    "bert", "roberta", "xlm-roberta", "electra", "distilbert",
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "opt",
)  # fmt: skip
EMBEDDINGS = ("word_embeddings.weight", "embed_tokens.weight", "wte.weight")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
MAX_HEADER_BYTES = 25_000_000
MAX_JSON_BYTES = 100_000_000
CHUNK_BYTES = 1 << 24  # finite or not is looked at in pieces, so that memory stays small

HOOKS = ("auto_map", "custom_pipelines", "custom_generate", "use_kernels", "kernel_config", "experts_implementation")
HARMLESS = ("_name_or_path", "_commit_hash", "_num_labels", "_from_model_config", "_attn_implementation_autoset")


class Tensor(NamedTuple):
    """Where one tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check(folder: Path) -> None:
    """Raise ModelError, naming file and key or tensor, for whatever in the folder is foreign, broken or missing."""
    _files(folder)
    config = read_config(folder)
    found = tensors(folder)
    for name, tensor in found.items():
        _finite(name, tensor)
    _tokenizer(folder, found, config)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, of a supported kind of model and with no key that names code."""
    config = _json(folder / "config.json")
    _refuse_hooks(folder / "config.json", config)
    if config.get("quantization_config"):
        kind = config["quantization_config"]
        kind = kind.get("quant_method", "unknown") if isinstance(kind, dict) else kind
        raise ModelError(f"{folder} is already quantized ({kind}). Start from the model it was made of.")
    if config.get("model_type") not in MODEL_TYPES:
        raise ModelError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}. "
            f"This version takes: {', '.join(MODEL_TYPES)}."
        )
    return config


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model by name, from one file or from the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    placed = _json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{folder / INDEX} has no weight_map. Copy the file again from where it came from.")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, placed.values()))):
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", shard):
            raise ModelError(
                f"{folder / INDEX} names the shard {shard!r}, which is not a plain .safetensors file name."
            )
        if not (folder / shard).is_file():
            raise ModelError(f"{folder} lacks {shard}, which {INDEX} names. Copy all shards.")
        for name, tensor in header(folder / shard).items():
            if name in found or placed.get(name) != shard:
                raise ModelError(f"{folder / shard} holds {name!r}, which {INDEX} places elsewhere. Copy both again.")
            found[name] = tensor
    if missing := sorted(placed.keys() - found.keys()):
        raise ModelError(f"{folder / INDEX} names {missing[0]!r}, which no shard holds. Copy all shards again.")
    return found


def header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file. Every offset is checked against the file's size before it is believed."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise _truncated(file, 8 + (length if size >= 8 else 0), size)
        if length > MAX_HEADER_BYTES:
            raise ModelError(f"{file}: its header is {length:,} bytes, more than {MAX_HEADER_BYTES:,}. {_AGAIN}")
        raw = handle.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: its header is not JSON, so this is not safetensors. {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise ModelError(f"{file}: its header is not a JSON object. {_AGAIN}")
    entries.pop("__metadata__", None)
    found = {name: _entry(file, name, entry, 8 + length) for name, entry in entries.items()}
    if not found:
        raise ModelError(f"{file} holds no tensors. {_AGAIN}")
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != end:
            raise ModelError(f"{file}: tensor {name!r} overlaps another or leaves a gap before it. {_AGAIN}")
        end = tensor.end
    if end > size:
        raise _truncated(file, end, size)
    if end < size:
        raise ModelError(f"{file}: {size - end:,} bytes follow the last tensor. {_AGAIN}")
    return found


_AGAIN = "Copy the file again from where it came from."


def _truncated(file: Path, expected: int, found: int) -> ModelError:
    return ModelError(f"{file} is truncated: {expected:,} bytes expected, {found:,} found. {_AGAIN}")


def _entry(file: Path, name: str, entry: Any, base: int) -> Tensor:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ModelError(f"{file}: the entry of tensor {name!r} is malformed. {_AGAIN}")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ModelError(f"{file}: tensor {name!r} is {dtype!r}. Save it as one of {', '.join(WIDTHS)}.")
    if 0 in shape:
        raise ModelError(f"{file}: tensor {name!r} has no elements (shape {shape}). Save the model without it.")
    if offsets[1] - offsets[0] != math.prod(shape) * WIDTHS[dtype]:
        raise ModelError(f"{file}: tensor {name!r} of shape {shape} does not fill its {offsets} bytes. {_AGAIN}")
    return Tensor(file, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def chunks(tensor: Tensor) -> Iterator[bytes]:
    """The tensor's bytes, in pieces of bounded size."""
    with tensor.file.open("rb") as handle:
        handle.seek(tensor.start)
        for at in range(tensor.start, tensor.end, CHUNK_BYTES):
            yield handle.read(min(CHUNK_BYTES, tensor.end - at))


def _finite(name: str, tensor: Tensor) -> None:
    import numpy as np

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    for raw in chunks(tensor):
        if tensor.dtype == "BF16":  # all exponent bits set is what NaN and infinity have in common
            fine = bool(((np.frombuffer(raw, "<u2") & 0x7F80) != 0x7F80).all())
        else:
            fine = tensor.dtype not in kinds or bool(np.isfinite(np.frombuffer(raw, kinds[tensor.dtype])).all())
        if not fine:
            raise ModelError(f"{tensor.file}: tensor {name!r} holds NaN or infinity. Train or export it again.")


def _files(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder. Give the folder that holds config.json and {WEIGHTS}.")
    for file in sorted(folder.rglob("*")):
        if file.is_symlink():
            raise ModelError(f"{file} is a symbolic link. Copy the folder with `cp -rL` and give the copy.")
        if file.suffix.lower() in CODE:
            raise ModelError(f"{file} is code, and code that comes with a model is not run. Remove it if not needed.")
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise _no_weights(folder)
    for needed in ("config.json", "tokenizer.json"):
        if not (folder / needed).is_file():
            how = " `AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes it." if "tok" in needed else ""
            raise ModelError(f"{folder} has no {needed}. Add it.{how}")


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(f.name for f in folder.rglob("*") if f.suffix.lower() in PICKLES)
    if not pickles:
        how = "Bring its GGUF in with fetch.gguf" if any(folder.glob("*.gguf")) else "Give a folder with safetensors"
        return ModelError(f"{folder} has no {WEIGHTS}. {how}.")
    return ModelError(
        f"{folder / pickles[0]} is a pickle, which can run code when it is opened. Convert it where that does no harm: "
        f"weights = torch.load({pickles[0]!r}, weights_only=True); "
        f"safetensors.torch.save_file({{k: v.clone() for k, v in weights.items()}}, {WEIGHTS!r})"
    )


def _tokenizer(folder: Path, found: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if (folder / name).is_file():
            _refuse_hooks(folder / name, _json(folder / name))
    file = folder / "tokenizer.json"
    content = _json(file)
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not vocabulary or not isinstance(added, list):
        raise ModelError(f"{file} has no vocabulary. Save the tokenizer again with save_pretrained.")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.get("id") if isinstance(token, dict) else None for token in added]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"{file}: a token has no whole number as its id. Save the tokenizer again.")
    embeddings = [t.shape[0] for name, t in found.items() if name.endswith(EMBEDDINGS) and t.shape]
    if not embeddings:
        names = " or ".join(EMBEDDINGS)
        raise ModelError(f"{folder}: no tensor {names}, so this is no {config['model_type']} model.")
    if max(ids) >= min(embeddings):
        raise ModelError(
            f"{file} knows token {max(ids):,}, but the embedding has {min(embeddings):,} rows. "
            f"Give the tokenizer that the model was trained with."
        )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelError(f"{file} does not exist. Copy it from where the model came from.")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{file} is {file.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}. {_AGAIN}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not JSON. {_AGAIN}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} is a JSON {type(content).__name__}, not an object. {_AGAIN}")
    return content


def _refuse_hooks(file: Path, content: Any) -> None:
    todo = [content]
    while todo:
        node = todo.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            private = key.startswith("_") and key not in HARMLESS
            kernel = key.endswith("attn_implementation") and value not in (None, "eager", "sdpa")
            if key in HOOKS or key.endswith("trust_remote_code") or private or kernel:
                raise ModelError(f"{file}: the key {key!r} can name code to load. Remove it, if the model is yours.")
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
