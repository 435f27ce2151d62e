import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline import profiles
from slimline.errors import ConfigError, ModelError
from slimline.export import tensorrt as export
from slimline.profiles import Shapes, Span

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
BATCH = Span(1, 4, 8)


def distance(lengths, number):
    """The least total distance to the medians of `number` runs of the sorted lengths, by trying every cut."""
    ordered = sorted(lengths)
    best = np.inf
    for cut in itertools.combinations(range(1, len(ordered)), number - 1):
        runs = np.split(np.array(ordered), cut)
        best = min(best, sum(np.abs(run - np.median(run)).sum() for run in runs))
    return best


def nearest(lengths, spans):
    """The total distance of each length to the opt of the span that holds it."""
    return sum(abs(n - next(s.opt for s in spans if s.min <= n <= s.max)) for n in lengths)


def test_one_span_is_tuned_for_the_median():
    assert profiles.spans([3, 4, 5, 30, 31], longest=64, number=1) == [Span(1, 5, 64)]


def test_two_spans_part_short_from_long():
    assert profiles.spans([3, 4, 5, 30, 31], longest=64, number=2) == [Span(1, 4, 5), Span(6, 30, 64)]


def test_a_further_profile_is_made_only_where_it_pays():
    assert len(profiles.spans([10, 10, 10, 11], longest=64)) == 1
    # apart by 40 of 44 tokens: the second profile saves 80 of 88 tokens of distance, a third saves nothing
    assert profiles.spans([4, 4, 44, 44], longest=64) == [Span(1, 4, 4), Span(5, 44, 64)]


@given(LENGTHS, st.integers(1, 3))
def test_no_other_cut_brings_texts_nearer_to_their_opt(lengths, number):
    number = min(number, len(set(lengths)))
    found = profiles.spans(lengths, longest=64, number=number)
    assert len(found) == number
    assert nearest(lengths, found) == pytest.approx(distance(lengths, number))


@given(LENGTHS)
def test_every_length_that_can_be_served_is_in_exactly_one_span(lengths):
    found = profiles.spans(lengths, longest=64)
    assert [n for span in found for n in range(span.min, span.max + 1)] == list(range(1, 65))
    assert all(span.min <= span.opt <= span.max for span in found)


def test_more_profiles_than_lengths_are_refused():
    with pytest.raises(ConfigError, match="3 profiles were asked for but the texts have 2 lengths"):
        profiles.spans([4, 4, 9], longest=64, number=3)


def test_an_input_that_no_text_tells_the_shape_of_is_refused():
    with pytest.raises(ModelError, match=r"the input pixels \(-1, 3\) is open where no text says how long"):
        profiles.of({"pixels": (-1, 3)}, [BATCH], [Span(1, 4, 8)])


def test_a_batch_goes_to_the_profile_that_holds_it():
    made = profiles.of({"input_ids": (-1, -1)}, [BATCH], [Span(1, 4, 8), Span(9, 20, 64)])
    assert made[0] == {"input_ids": Shapes(min=(1, 1), opt=(4, 4), max=(8, 8))}
    assert [profiles.fitting(made, {"input_ids": (2, n)}) for n in (1, 8, 9, 64)] == [0, 0, 1, 1]


@pytest.mark.parametrize("shape", [(9, 4), (1, 65), (0, 4), (4,)])
def test_a_batch_that_no_profile_holds_is_refused_with_its_shape(shape):
    made = profiles.of({"input_ids": (-1, -1)}, [BATCH], [Span(1, 4, 64)])
    with pytest.raises(ModelError, match="no profile of this engine holds input_ids"):
        profiles.fitting(made, {"input_ids": shape})


def test_a_text_alone_gets_profiles_of_its_own_and_they_are_chosen_first():
    config = export.Config(data="texts", single=True, opt_batch=8, max_batch=32)
    assert export.batches(config) == [Span(1, 1, 1), Span(2, 8, 32)]
    made = profiles.of({"input_ids": (-1, -1)}, export.batches(config), [Span(1, 4, 8), Span(9, 20, 64)])
    assert [p["input_ids"].opt for p in made] == [(1, 4), (1, 20), (8, 4), (8, 20)]
    assert profiles.fitting(made, {"input_ids": (1, 30)}) == 1 and profiles.fitting(made, {"input_ids": (2, 30)}) == 3


def test_without_a_second_text_a_text_alone_needs_no_profile_of_its_own():
    assert export.batches(export.Config(data="texts", single=True, max_batch=1)) == [Span(1, 1, 1)]
    assert export.batches(export.Config(data="texts", opt_batch=8, max_batch=4)) == [Span(1, 4, 4)]
    assert export.batches(export.Config(data="texts", single=True, opt_batch=1)) == [Span(1, 1, 1), Span(2, 2, 32)]
