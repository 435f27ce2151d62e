"""GGUF: the one file that llama.cpp and what is built on it (Ollama, LM Studio) run, tokenizer and chat template in it.

Matrices are stored as floats or in blocks of 32 numbers with a scale of 16 bits: q8_0 (8.5 bits a weight) or q4_0 (4.5)
by rounding to nearest, as llama.cpp itself does; norms and biases stay float32. Nothing is calibrated; blocks are read
back at once, and how far they lie from the source is measured. Works tensor by tensor: memory is the largest one's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from slimline import allowlist, gguf_families, gguf_settings, gguf_tokenizer, keys_values, window
from slimline.allowlist import Tensor
from slimline.errors import ModelError
from slimline.gguf_families import Array, Family, Place
from slimline.technique import BaseConfig, Metrics, track

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

NEEDS, GIVES = "hf", "gguf"
FILE = "model.gguf"
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}
"""What llama.cpp calls a file whose matrices are mostly of this type."""
CHUNK_ELEMENTS = 1 << 22


class Config(BaseConfig):
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"] = Field(
        "q8_0", description="how the matrices of the layers are stored"
    )
    # llama.cpp spares them, too: every word's logit hangs on the head, which is the embedding where the two are tied.
    head: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"] = Field(
        "auto", description="how embedding and head are stored; auto: as the rest, but q8_0 where that is 4 bits"
    )


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write model.gguf into `out`."""
    import gguf

    where = source / "config.json"
    given = json.loads(where.read_text(encoding="utf-8"))
    window.refuse(given, str(where), "llama.cpp")
    keys_values.refuse(given, str(where), "llama.cpp")
    architecture, family, values = gguf_settings.described(given, str(where))
    said = gguf_settings.fields(values, str(where))
    places = gguf_families.places(values, str(where))
    weights = weights_of(source, places)
    tokenizer = gguf_tokenizer.fields(source, values["vocab_size"])
    kinds = {place.gguf: kind_of(family, place, config) for place in places}
    writer = gguf.GGUFWriter(str(out / FILE), architecture)
    for key, value in {**said, "vocab_size": values["vocab_size"]}.items():
        put(writer, f"{architecture}.{key}", value)
    put(writer, "general.file_type", FILE_TYPES[config.type])
    put(writer, "general.quantization_version", gguf.GGML_QUANT_VERSION)
    for key, value in tokenizer.items():
        put(writer, key, value)
    error = write(writer, family, places, kinds, weights, values)
    matrices = [place for place in places if len(place.shape) > 1]
    sizes = {kind: 8 * width / block for kind, (block, width) in gguf.GGML_QUANT_SIZES.items()}
    bits = sum(math.prod(p.shape) * sizes[kinds[p.gguf]] for p in matrices)
    return {
        "parameters": float(sum(math.prod(place.shape) for place in places)),
        "bits_per_weight": bits / sum(math.prod(place.shape) for place in matrices),
        "weight_error": error,
        "size_bytes": float((out / FILE).stat().st_size),
    }


def weights_of(source: Path, places: list[Place]) -> dict[str, Tensor]:
    """Where each tensor lies in the source's safetensors. Raises ModelError if one is missing or of another shape."""
    found: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        found |= allowlist.header(file)
    for place in places:
        tensor = found.get(place.name)
        if tensor is None or tensor.shape != place.shape:
            what = "is missing" if tensor is None else f"is {list(tensor.shape)}"
            raise ModelError(
                f"{source}: {place.name} {what}, but config.json asks for {list(place.shape)}. GGUF has one width for "
                "all layers, and no weights in integers of another kind: export the model before that."
            )
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ModelError(f"{source}: {place.name} is {tensor.dtype}. Export the model before it is quantized.")
    return found


def kind_of(family: Family, place: Place, config: Config) -> GGMLQuantizationType:
    """What a tensor is stored as: rows that blocks of 32 do not fill are f16, as llama.cpp has them."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(place.shape) == 1 or place.gguf.startswith("position_embd"):
        return GGMLQuantizationType.F32
    name: str = config.type
    if place.gguf in ("token_embd.weight", "output.weight"):
        name = ("q8_0" if config.type.startswith("q4") else config.type) if config.head == "auto" else config.head
    kind = GGMLQuantizationType[name.upper()]
    fits = gguf_families.stored_shape(family, place)[-1] % GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else GGMLQuantizationType.F16


def put(writer: GGUFWriter, key: str, value: Any) -> None:
    """Write one setting in the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def write(
    writer: GGUFWriter,
    family: Family,
    places: list[Place],
    kinds: dict[str, GGMLQuantizationType],
    weights: dict[str, Tensor],
    values: dict[str, Any],
) -> float:
    """Write everything; how far the matrices lie from the source, as a fraction of their own length."""
    from gguf import GGMLQuantizationType, quants

    factors = gguf_settings.slowed(values)
    shapes = {place.gguf: (gguf_families.stored_shape(family, place), kinds[place.gguf]) for place in places}
    if factors is not None:
        shapes = {gguf_families.ROPE_FREQS: (factors.shape, GGMLQuantizationType.F32), **shapes}
    for name, (shape, kind) in shapes.items():
        in_bytes = quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    lost = length = 0.0
    for place in track(places, "writing tensors"):
        packed = []
        for rows in pieces(weights[place.name], gguf_families.to_gguf(family, place, values)):
            packed.append(quants.quantize(rows, kinds[place.gguf]).view(np.uint8))
            if len(place.shape) > 1:
                length += float(np.vdot(rows, rows))
                rows = rows - quants.dequantize(packed[-1], kinds[place.gguf]).reshape(rows.shape)
                lost += float(np.vdot(rows, rows))
        writer.write_tensor_data(np.concatenate(packed))
    writer.close()
    return math.sqrt(lost / length)


def pieces(tensor: Tensor, change: Any) -> Iterator[Array]:
    """A tensor as GGUF has it, in float32, some rows at a time. Raises ModelError for NaN and infinity."""
    raw: Array = np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.end - tensor.start,))
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    stored = raw.view(kinds[tensor.dtype]).reshape(tensor.shape)
    step = max(1, CHUNK_ELEMENTS // math.prod(tensor.shape[1:])) if change is None else len(stored)
    for at in range(0, len(stored), step):
        rows = stored[at : at + step]
        rows = (rows.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else rows.astype(np.float32)
        if not np.isfinite(rows).all():
            raise ModelError(f"{tensor.file} holds NaN or infinity. Train or bring the model in again.")
        yield np.ascontiguousarray(change(rows) if change else rows)
