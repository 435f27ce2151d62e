"""GGUF: a language model from the file that llama.cpp runs, as plain floats that every other step can work on.

Reads one .gguf file (or the only one of a folder), one tensor at a time: memory is the largest tensor's few megabytes,
however large the model. Quantized weights become the floats that llama.cpp computes with, exactly; what quantization
has lost stays lost. The tokenizer and its chat template come from the file, too. Nothing in a GGUF is run, and every
length in it is checked against the file's size first. SmolLM2-135M takes 9 seconds, 2 of them for the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from slimline import allowlist, gguf_families, gguf_header, gguf_settings, gguf_tokenizer, streaming
from slimline.errors import ModelError
from slimline.gguf_families import Place
from slimline.gguf_header import Floats, Header
from slimline.technique import BaseConfig, Metrics, track

if TYPE_CHECKING:
    import torch

NEEDS, GIVES = "path", "hf"
SUFFIX = ".gguf"
PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
"""ggml's types that are no blocks."""
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
IGNORED = (gguf_families.ROPE_FREQS,)
"""Tensors that become settings."""


class Config(BaseConfig):
    # A block's scale times its number fits no 16-bit float, so that rounding once more would be a second loss.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="what weights are written in; auto: what the file's are, and float32 if they are quantized"
    )


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write safetensors, config.json and the tokenizer of a GGUF file into `out`."""
    file = only_file(source)
    header = gguf_header.read(file)
    if header.fields.get("split.count", 1) > 1:
        raise ModelError(f"{file} is one of {header.fields['split.count']} parts. Join them: llama-gguf-split --merge.")
    gguf_tokenizer.check(header)
    freqs = header.tensors.get(gguf_families.ROPE_FREQS)
    values = gguf_settings.settings(
        header.fields,
        {name: tensor.shape for name, tensor in header.tensors.items()},
        next(gguf_header.rows(header, gguf_families.ROPE_FREQS)) if freqs else None,
        str(file),
    )
    dtype = dtype_of(header) if config.dtype == "auto" else config.dtype
    places = gguf_families.places(values, str(file))
    check(header, places)
    write(header, places, values, dtype, out / allowlist.WEIGHTS)
    save_config(values, dtype, out)
    gguf_tokenizer.save(header, out)
    matrices = [t for t in header.tensors.values() if len(t.shape) > 1]
    return {
        "parameters": float(sum(math.prod(place.shape) for place in places)),
        "size_bytes": float(sum(f.stat().st_size for f in out.iterdir())),
        "layers": float(next(values[k] for k in ("num_hidden_layers", "n_layer") if k in values)),
        "width": float(next(values[k] for k in ("hidden_size", "n_embd") if k in values)),
        "source_bits_per_weight": 8
        * sum(t.end - t.start for t in matrices)
        / sum(math.prod(t.shape) for t in matrices),
    }


def only_file(source: Path) -> Path:
    """The source itself, or the one GGUF file in it. Raises ModelError if there is none, or several."""
    if source.is_file():
        return source
    found = sorted(file.name for file in source.iterdir() if file.suffix == SUFFIX)
    if len(found) != 1:
        what = (
            f"{len(found)} GGUF files ({', '.join(found[:3])}). Name one of them" if found else "no GGUF file. Name one"
        )
        raise ModelError(f"{source} holds {what}.")
    return source / found[0]


def dtype_of(header: Header) -> str:
    """What the file's matrices are stored in; float32 if they are in blocks, or of several kinds."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return PLAIN.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def check(header: Header, places: list[Place]) -> None:
    """Raise ModelError unless the file holds what its own settings ask for, and nothing else."""
    _, family = gguf_families.family_of(header.fields, str(header.file))
    for place in places:
        tensor, wanted = header.tensors.get(place.gguf), gguf_families.stored_shape(family, place)
        if tensor is None:
            raise ModelError(f"{header.file} lacks {place.gguf!r} ({place.name}). {gguf_header.AGAIN}")
        if tensor.shape != wanted:
            raise ModelError(
                f"{header.file}: tensor {place.gguf!r} is {list(tensor.shape)}, but its settings ask for "
                f"{list(wanted)}. {gguf_header.AGAIN}"
            )
    if strange := sorted(header.tensors.keys() - {place.gguf for place in places} - set(IGNORED)):
        raise ModelError(
            f"{header.file} holds {strange[0]!r}, which transformers' {family.model_type} has no place for. "
            "Bring the model in from its own safetensors."
        )


def write(header: Header, places: list[Place], values: dict[str, Any], dtype: str, out: Path) -> None:
    """Write one safetensors file, tensor by tensor. Raises ModelError for a number that is not finite in `dtype`."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    sizes = {place.name: (DTYPES[dtype], place.shape) for place in places}
    with out.open("wb") as handle:
        handle.write(streaming.head(sizes))
        for place in track(places, "reading tensors"):
            for floats in pieces(header, place, values):
                converted = torch.from_numpy(floats).to(kind)
                if not bool(converted.isfinite().all()):
                    raise ModelError(
                        f"{header.file}: tensor {place.gguf!r} is not finite in {dtype}. Set another dtype."
                    )
                handle.write(converted.view(torch.uint8).numpy().tobytes())


def pieces(header: Header, place: Place, values: dict[str, Any]) -> Iterator[Floats]:
    """A tensor as transformers has it, in row order: a few rows at a time where its rows stay where they are."""
    _, family = gguf_families.family_of(header.fields, str(header.file))
    change, found = gguf_families.from_gguf(family, place, values), gguf_header.rows(header, place.gguf)
    if change is None:
        yield from (np.require(rows, requirements=("C", "W")) for rows in found)
    else:
        yield np.require(change(np.concatenate(list(found))), requirements=("C", "W"))


def save_config(values: dict[str, Any], dtype: str, out: Path) -> None:
    """Write config.json as transformers itself would."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(**values)
    said, wanted = config.to_dict(), {*values, *config.to_diff_dict()}  # without the defaults of other kinds of models
    whole = {k: v for k, v in said.items() if k in wanted and k != "transformers_version" and not k.startswith("_")}
    whole |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]], "dtype": dtype}
    (out / "config.json").write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
