"""The innermost loops of rounding a column at a time, on a GPU: a block of columns in one Triton kernel.

In obq.spread and obq.sweep a column waits for the one before it, but the rows of a matrix do not know each other. In
PyTorch each column is a dozen launches, and a layer of a large model some hundred thousand columns: the GPU mostly
waits. Here a program takes a few rows through all columns of a block. Arithmetic is that of obq's own loops, in
float32; only how sums are fused may differ in their last bit. Imported where a matrix is on a GPU, and there alone.

Shapes: O = outputs, B = columns of the block.
"""

from __future__ import annotations

import torch
import triton  # comes with torch for CUDA
import triton.language as tl

ROWS = 16
"""Of a program: with the columns of a block they fit into its registers."""


@triton.jit
def _nearest(values, lowest, highest):  # type: ignore[no-untyped-def]
    """To whole numbers, ties to even, and cut to the grid."""
    near = tl.minimum(tl.maximum(values, lowest - 1.0), highest + 1.0)
    return tl.minimum(tl.maximum((near + 12582912.0) - 12582912.0, lowest), highest)


@triton.jit  # type: ignore[untyped-decorator]
def _spread(  # type: ignore[no-untyped-def]
    left, root, scale, zero, numbers, errors, outputs, columns, lowest, highest, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    there, inside = rows < outputs, at < columns
    both = there[:, None] & inside[None, :]
    place = rows[:, None] * columns + at[None, :]
    values = tl.load(left + place, mask=both, other=0.0)
    for i in range(columns):
        now = tl.sum(tl.where(at[None, :] == i, values, 0.0), axis=1)
        by = tl.load(scale + rows * columns + i, mask=there, other=1.0)
        less = tl.load(zero + rows * columns + i, mask=there, other=0.0)
        number = _nearest(now / by + less, lowest, highest)
        error = (now - (number - less) * by) / tl.load(root + i * columns + i)
        behind = tl.load(root + i * columns + at, mask=inside & (at >= i), other=0.0)
        values -= error[:, None] * behind[None, :]
        tl.store(numbers + rows * columns + i, number.to(tl.int8), mask=there)
        tl.store(errors + rows * columns + i, error, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    slope, within, scale, numbers, moved, outputs, columns, lowest, highest, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    there, inside = rows < outputs, at < columns
    place = rows[:, None] * columns + at[None, :]
    slopes = tl.load(slope + place, mask=there[:, None] & inside[None, :], other=0.0)
    by = tl.load(scale + rows, mask=there, other=1.0)
    for i in range(columns):
        now = tl.sum(tl.where(at[None, :] == i, slopes, 0.0), axis=1)
        number = tl.load(numbers + rows * columns + i, mask=there, other=0.0)
        best = _nearest(number - now / (tl.load(within + i * columns + i) * by), lowest, highest)
        step = (best - number) * by
        slopes += step[:, None] * tl.load(within + i * columns + at, mask=inside, other=0.0)[None, :]
        tl.store(numbers + rows * columns + i, best, mask=there)
        tl.store(moved + rows * columns + i, step, mask=there)


def spread(
    left_OB: torch.Tensor, root_BB: torch.Tensor, scale_OB: torch.Tensor, zero_OB: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers int8, errors float32) [O, B] of a block's columns, rounded in order, each error spread over the rest."""
    left_OB, root_BB = left_OB.contiguous(), root_BB.contiguous()
    numbers_OB, errors_OB = torch.empty_like(left_OB, dtype=torch.int8), torch.empty_like(left_OB)
    outputs, columns = left_OB.shape
    _spread[(triton.cdiv(outputs, ROWS),)](
        left_OB, root_BB, scale_OB.contiguous(), zero_OB.contiguous(), numbers_OB, errors_OB, outputs, columns,
        -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1), ROWS, max(16, triton.next_power_of_2(columns)),
    )  # fmt: skip
    return numbers_OB, errors_OB


def sweep(
    slope_OB: torch.Tensor, within_BB: torch.Tensor, scale_O: torch.Tensor, numbers_OB: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers, by how much the weights moved) [O, B], float32: each column moved in order to its best given the rest.

    `slope_OB` is half the derivative of the loss. Nothing that is given is written to.
    """
    numbers_OB, moved_OB = (
        numbers_OB.clone(memory_format=torch.contiguous_format),
        torch.empty_like(slope_OB, memory_format=torch.contiguous_format),
    )
    outputs, columns = slope_OB.shape
    _sweep[(triton.cdiv(outputs, ROWS),)](
        slope_OB.contiguous(), within_BB.contiguous(), scale_O.contiguous(), numbers_OB, moved_OB, outputs, columns,
        -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1), ROWS, max(16, triton.next_power_of_2(columns)),
    )  # fmt: skip
    return numbers_OB, moved_OB
