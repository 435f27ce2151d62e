"""What a GGUF file says of itself: settings, and where each tensor lies. Every length is checked before it is believed.

The reader of the `gguf` package believes lengths as they stand (an array of 2^60 numbers keeps it busy for ever), and
makes an object of every token; this one takes 0.2 s for SmolLM2's 100,000 strings. Tensors are then read through a
memory map, de-quantized by `gguf.quants` a few rows at a time.

Shapes: R = rows, C = columns; GGUF itself says them the other way round.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slimline.errors import ModelError

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CHUNK_ELEMENTS = 1 << 23
"""How many numbers are de-quantized at a time: 32 MB of float32, several times that on the way."""
AGAIN = "Copy the file again from where it came from."
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Tensor(NamedTuple):
    """Where one tensor lies, and how: bytes `start` to `end` of the file, of ggml's type `kind`."""

    kind: int
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return (self.end - self.start) // math.prod(self.shape[:-1])


class Header(NamedTuple):
    file: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read(file: Path) -> Header:
    """Settings and tensors of one file. Raises ModelError for what is no GGUF, is cut short or contradicts itself."""
    with file.open("rb") as handle:
        start = handle.read(24)
        if start[:4] != MAGIC:
            raise ModelError(f"{file} is not a GGUF file: it starts with {start[:4]!r}. Give one that llama.cpp loads.")
        if len(start) < 24:
            raise _truncated(file, 24, len(start))
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(file, data).header()


class _Cursor:
    """A place in a file that never leaves it."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at, self.size = file, data, 4, len(data)

    def header(self) -> Header:
        (version,) = self.take("I")
        if version not in VERSIONS:
            order = " (or its bytes are in the order of another kind of machine)" if version & 0xFFFF == 0 else ""
            raise ModelError(f"{self.file} is GGUF version {version}{order}. Versions 2 and 3 are read: convert again.")
        num_tensors, num_fields = self.take("QQ")
        fields: dict[str, Any] = {}
        for _ in range(self.room_for(num_fields, 12)):
            name = self.string()
            fields[name] = self.value(self.take("I")[0])
        entries = [self.entry() for _ in range(self.room_for(num_tensors, 24))]
        alignment = fields.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self.file}: general.alignment is {alignment!r}, not a power of two. {AGAIN}")
        base = -(-self.at // alignment) * alignment
        return Header(self.file, fields, self.placed(entries, base, alignment))

    def take(self, form: str) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{form}")
        self.room_for(width, 1)
        self.at += width
        return struct.unpack_from(f"<{form}", self.data, self.at - width)

    def room_for(self, count: int, width: int) -> int:
        """The count, if so many things of at least `width` bytes can still follow."""
        if count * width > self.size - self.at:
            raise _truncated(self.file, self.at + count * width, self.size)
        return count

    def string(self) -> str:
        length = self.room_for(self.take("Q")[0], 1)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.file}: a text at byte {self.at - length:,} is not UTF-8. {AGAIN}") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            (found,) = self.take(SCALARS[kind])
            return shortest(found) if kind == 6 else found
        if kind != ARRAY:
            raise ModelError(f"{self.file}: a setting before byte {self.at:,} is of the unknown kind {kind}. {AGAIN}")
        inner, count = self.take("IQ")
        if inner == STRING:
            return [self.string() for _ in range(self.room_for(count, 8))]
        if inner not in SCALARS:
            raise ModelError(f"{self.file}: a list before byte {self.at:,} is of the unknown kind {inner}. {AGAIN}")
        self.room_for(count, struct.calcsize(SCALARS[inner]))
        return list(self.take(f"{count}{SCALARS[inner]}"))

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (num_dims,) = self.string(), self.take("I")
        if not 1 <= num_dims <= 4:
            raise ModelError(f"{self.file}: tensor {name!r} has {num_dims} dimensions. {AGAIN}")
        shape = tuple(reversed(self.take(f"{num_dims}Q")))
        kind, offset = self.take("IQ")
        return name, shape, kind, offset

    def placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], base: int, alignment: int
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, shape, kind, offset in entries:
            block, width = block_of(self.file, name, kind)
            if name in found or 0 in shape or shape[-1] % block or offset % alignment:
                raise ModelError(f"{self.file}: tensor {name!r} of shape {list(shape)} is malformed. {AGAIN}")
            found[name] = Tensor(kind, shape, base + offset, base + offset + math.prod(shape) // block * width)
        if not found:
            raise ModelError(f"{self.file} holds no tensors. Give a whole model, not a vocabulary alone.")
        end = base
        for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise ModelError(f"{self.file}: tensor {name!r} overlaps another. {AGAIN}")
            end = tensor.end
        if end > self.size:
            raise _truncated(self.file, end, self.size)
        return found


def block_of(file: Path, name: str, kind: int) -> tuple[int, int]:
    """How many numbers a block of this type holds, and in how many bytes. Raises ModelError if it cannot be read."""
    import gguf

    try:
        known = gguf.GGMLQuantizationType(kind)
        block, width = gguf.GGML_QUANT_SIZES[known]
        gguf.quants.dequantize(np.zeros((1, width), np.uint8), known)
    except ValueError:
        raise _unreadable(file, name, f"of the unknown type {kind}") from None
    except NotImplementedError:
        raise _unreadable(file, name, known.name) from None
    return block, width


def rows(header: Header, name: str, elements: int = CHUNK_ELEMENTS) -> Iterator[Floats]:
    """The tensor as float32, [R, C] or [C], a few rows at a time, first to last."""
    import gguf

    tensor = header.tensors[name]
    bytes_RC = np.memmap(header.file, np.uint8, "r", tensor.start, (math.prod(tensor.shape[:-1]), tensor.width))
    step = max(1, elements // tensor.shape[-1])
    for at in range(0, len(bytes_RC), step):
        floats_RC = gguf.quants.dequantize(bytes_RC[at : at + step], gguf.GGMLQuantizationType(tensor.kind))
        yield floats_RC.astype(np.float32, copy=False).reshape(-1, *tensor.shape[1:])


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _truncated(file: Path, expected: int, found: int) -> ModelError:
    return ModelError(f"{file} is truncated: {expected:,} bytes expected at least, {found:,} found. {AGAIN}")


def _unreadable(file: Path, name: str, kind: str) -> ModelError:
    return ModelError(f"{file}: tensor {name!r} is {kind}, which cannot be read. Take the file in Q8_0, Q4_K or F16.")
