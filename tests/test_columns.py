"""How a GPU's kernels for blocks of columns are put together, with PyTorch in the kernels' place."""

import sys
import types

import pytest
import torch

from slimline import obq
from slimline.obq import Moments, Rounding, quantize


def spread(left_OB, root_BB, scale_OB, zero_OB, bits):
    """What columns.spread says of itself, a column at a time."""
    left_OB, numbers_OB, errors_OB = left_OB.clone(), torch.empty_like(left_OB), torch.empty_like(left_OB)
    for i in range(left_OB.shape[1]):
        steps_O = (left_OB[:, i] / scale_OB[:, i] + zero_OB[:, i]).round()
        numbers_OB[:, i] = steps_O.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        gone_O = left_OB[:, i] - (numbers_OB[:, i] - zero_OB[:, i]) * scale_OB[:, i]
        errors_OB[:, i] = gone_O / root_BB[i, i]
        left_OB -= errors_OB[:, i, None] * root_BB[i]
    return numbers_OB.to(torch.int8), errors_OB


def sweep(slope_OB, within_BB, scale_O, numbers_OB, bits):
    """What columns.sweep says of itself, a column at a time."""
    slope_OB, found_OB = slope_OB.clone(), numbers_OB.clone()
    for i in range(slope_OB.shape[1]):
        best_O = (found_OB[:, i] - slope_OB[:, i] / (within_BB[i, i] * scale_O)).round()
        found_OB[:, i] = best_O.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        slope_OB += ((found_OB[:, i] - numbers_OB[:, i]) * scale_O)[:, None] * within_BB[i]
    return found_OB, (found_OB - numbers_OB) * scale_O[:, None]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, True), (3, 48, False), (4, 0, True)])
def test_blocks_in_kernels_round_as_columns_one_by_one(bits, group_size, symmetric, act_order, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    heard_XI = torch.randn(400, 192, generator=draw) @ torch.randn(192, 192, generator=draw)
    weight_OI, seen = torch.randn(24, 192, generator=draw), Moments(heard_XI.T @ heard_XI)
    plan = Rounding(data="", bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    loops = quantize(weight_OI, seen, plan.scheme, plan)
    monkeypatch.setitem(sys.modules, "slimline.columns", types.SimpleNamespace(spread=spread, sweep=sweep))
    monkeypatch.setattr("slimline.columns", sys.modules["slimline.columns"], raising=False)
    monkeypatch.setattr(obq, "has_kernels", lambda _: True)
    blocks = quantize(weight_OI, seen, plan.scheme, plan)
    assert (blocks.whole.numbers_OI != loops.whole.numbers_OI).float().mean() < 0.01
    assert blocks.loss == pytest.approx(loops.loss, rel=0.01)


def test_a_block_is_as_wide_as_registers_allow_and_ends_where_a_group_does():
    assert [obq.narrow(block, 0) for block in (1, 100, 4096)] == [1, 100, 128]
    assert [obq.narrow(128, size) for size in (64, 192, 28672, 7)] == [64, 96, 128, 7]


def test_a_processor_has_no_kernels():
    assert not obq.has_kernels(torch.ones(2, 2))
