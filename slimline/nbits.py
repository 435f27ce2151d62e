"""Matrices of whole numbers as ONNX Runtime multiplies and looks them up: MatMulNBits and GatherBlockQuantized.

Both take a matrix in blocks of neighbouring inputs that share a scale: uint8 [O, blocks, block * bits / 8], the first
number in the lowest bits, each 2^(bits-1) too high; the last block of a row may be filled up. The kernels of ONNX
Runtime 1.32 know 2, 4 and 8 bits and blocks of 16 to 256. Other numbers are carried exactly, in wider ones: 3 bits
in 4, 5 to 7 in 8, and a scale that holds for more inputs than a block is said once for each block.

Shapes: O = outputs, I = inputs, K = inputs filled up to whole blocks, B = blocks of one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from slimline.errors import ModelError
from slimline.packed import Integers

Array = np.ndarray[Any, np.dtype[Any]]

BLOCKS = (256, 128, 64, 32, 16)
FILLED = 32
"""The block of a matrix with one scale an output whose inputs no block divides: few numbers fill up the last."""
QUICK_TWO_BITS = (128, 64, 32)
"""Blocks in which two bits have a kernel of their own; in others they are unpacked again for every token."""


@dataclass
class Blocked:
    """A matrix in blocks: (number - zero) * scale."""

    numbers_OI: Array
    """int8, from -2^(bits-1) up."""
    scale_OB: Array
    zero_OB: Array | None
    """int8 in the same range; None for 0."""
    bits: int
    block: int

    def floats(self) -> Array:
        """float32 [O, I]: what the runtime makes of it."""
        numbers_OI = self.numbers_OI.astype(np.float32)
        if self.zero_OB is not None:
            numbers_OI -= self._spread(self.zero_OB.astype(np.float32))
        floats_OI: Array = numbers_OI * self._spread(self.scale_OB.astype(np.float32))
        return floats_OI

    def _spread(self, values_OB: Array) -> Array:
        return np.repeat(values_OB, self.block, axis=1)[:, : self.numbers_OI.shape[1]]

    def data(self) -> Array:
        """uint8 [O, B, block * bits / 8]: the numbers as the kernels read them."""
        outputs, inputs = self.numbers_OI.shape
        blocks = self.scale_OB.shape[1]
        raised_OK = np.zeros((outputs, blocks * self.block), dtype=np.uint8)
        raised_OK[:, :inputs] = _raised(self.numbers_OI, self.bits)
        return _bytes(raised_OK, self.bits).reshape(outputs, blocks, -1)

    def zeros(self) -> Array | None:
        """uint8 [O, ceil(B * bits / 8)]: the zero points as the kernels read them, or None for 2^(bits-1)."""
        if self.zero_OB is None:
            return None
        raised_OB = _raised(self.zero_OB, self.bits)
        return _bytes(np.pad(raised_OB, ((0, 0), (0, -raised_OB.shape[1] % (8 // self.bits)))), self.bits)


def blocked(matrix: Integers, bits: int, name: str) -> Blocked:
    """A packed matrix in the largest blocks that its groups allow. Raises ModelError for groups that none divides."""
    inputs = matrix.numbers_OI.shape[1]
    groups = matrix.scale_OG.shape[1]
    group = inputs // groups
    block = next((size for size in BLOCKS if group % size == 0), FILLED if groups == 1 else 0)
    if not block:
        raise ModelError(
            f"{name} has a scale for every {group} inputs, but ONNX Runtime multiplies in blocks of 16, 32, 64, 128 "
            "or 256. Quantize with a group_size that one of these divides, or with 0."
        )
    blocks = -(-inputs // block)
    at = np.arange(blocks) * block // group
    zero_OB = None if matrix.zero_OG is None else matrix.zero_OG.numpy()[:, at]
    wide = next(size for size in (2, 4, 8) if size >= bits)
    return Blocked(matrix.numbers_OI.numpy(), matrix.scale_OG.numpy()[:, at], zero_OB, wide, block)


def joined(parts: list[Blocked], rows: list[tuple[int, int]]) -> Blocked:
    """One matrix of these (part, row): in the smallest block and the most bits of its parts."""
    block, bits = min(part.block for part in parts), max(part.bits for part in parts)
    asymmetric = any(part.zero_OB is not None for part in parts)
    inputs = parts[0].numbers_OI.shape[1]
    at = np.arange(-(-inputs // block)) * block
    which, row = np.array(rows).T
    numbers_OI = np.empty((len(rows), inputs), dtype=np.int8)
    scale_OB = np.empty((len(rows), len(at)), dtype=parts[0].scale_OB.dtype)
    zero_OB = np.zeros((len(rows), len(at)), dtype=np.int8)
    for number, part in enumerate(parts):
        here = which == number
        numbers_OI[here] = part.numbers_OI[row[here]]
        scale_OB[here] = part.scale_OB[row[here]][:, at // part.block]
        if part.zero_OB is not None:
            zero_OB[here] = part.zero_OB[row[here]][:, at // part.block]
    return Blocked(numbers_OI, scale_OB, zero_OB if asymmetric else None, bits, block)


def quick(matrix: Blocked, accuracy_level: int) -> Blocked:
    """The same matrix in bits that have a fast kernel: 2 bits only have one in some blocks, for int8 activations."""
    if matrix.bits == 2 and not (accuracy_level == 4 and matrix.block in QUICK_TWO_BITS):
        matrix.bits = 4
    return matrix


def _raised(numbers: Array, bits: int) -> Array:
    raised: Array = (numbers.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    return raised


def _bytes(raised_RC: Array, bits: int) -> Array:
    """uint8 [R, C * bits / 8]: neighbours in one byte, the first in the lowest bits."""
    each = 8 // bits
    parts = raised_RC.reshape(len(raised_RC), -1, each)
    whole = np.zeros(parts.shape[:2], dtype=np.uint8)
    for place in range(each):
        whole |= parts[:, :, place] << (place * bits)
    return whole
