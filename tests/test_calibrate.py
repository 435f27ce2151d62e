"""Ranges: everything is counted once, whatever order it comes in, and a range is cut where that costs least."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline import calibrate
from slimline.calibrate import BINS, Histogram


def counted(*parts):
    found = Histogram()
    for part in parts:
        found.add(np.asarray(part, dtype=np.float32))
    return found


@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), min_size=1, max_size=6))
def test_every_number_is_counted_and_none_lies_beyond_the_edge(parts):
    found = counted(*parts)
    everything = np.abs(np.concatenate(parts))
    assert found.largest == everything.max() <= found.edge * (1 + 1e-6)
    assert found.counts.sum() == len(everything)


def test_a_range_that_doubles_keeps_what_was_counted_in_its_place():
    found = counted([1.0, 0.5], [4.0])
    assert found.edge == 4.0
    middles = (np.arange(BINS) + 0.5) * 4 / BINS
    assert np.allclose(middles[found.counts > 0], [0.5, 1.0, 4.0], atol=4 / BINS)


def test_one_loud_number_among_many_is_cut_off():
    quiet = np.random.default_rng(0).uniform(0, 1, 100_000)
    assert (
        counted(*[quiet] * 30, [20.0]).clip(127) < 2
    )  # to cut there costs 18 ** 2, not to 30 * 100_000 * step ** 2 / 12
    assert counted(quiet).clip(127) == pytest.approx(1.0, rel=0.02)


def test_the_cut_is_the_best_of_all_that_are_tried():
    values = np.random.default_rng(1).standard_t(3, 20_000).astype(np.float32)
    found = counted(values)

    def error(top):
        step = top / 127
        return np.square(np.clip(np.rint(np.abs(values) / step), 0, 127) * step - np.abs(values)).sum()

    tried = calibrate.CANDIDATES * found.edge / BINS
    assert error(found.clip(127)) <= 1.02 * min(error(top) for top in tried)


@pytest.mark.filterwarnings("error")
def test_a_tensor_of_zeros_has_no_range():
    assert counted([0.0, 0.0]).largest == 0.0 == counted([0.0]).clip(127)
