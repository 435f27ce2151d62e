import numpy as np
import pytest

from slimline import bench
from slimline.errors import ConfigError, ModelError
from tests import words


@pytest.mark.parametrize(
    ("percentile", "over", "confidence", "queries"),
    [(0.99, 1, 0.99, 662), (0.99, 0, 0.99, 459), (0.9, 1, 0.99, 64), (0.99, 1, 0.95, 473), (0.5, 1, 0.95, 8)],
)
def test_the_fewest_queries_agree_with_the_published_ones(percentile, over, confidence, queries):
    assert bench.queries_needed(percentile, over, confidence) == queries


def test_the_bound_of_a_p99_is_the_second_largest_of_662_and_the_largest_of_459():
    assert bench.upper_bound(np.arange(1, 663.0), 0.99) == 661
    assert bench.upper_bound(np.arange(1, 460.0), 0.99) == 459


def test_too_few_queries_give_no_bound():
    with pytest.raises(ConfigError, match="at least 459"):
        bench.upper_bound(np.arange(458.0), 0.99)


def test_the_bound_of_a_p90_holds_as_often_as_it_promises():
    rng = np.random.default_rng(0)
    held = [bench.upper_bound(rng.exponential(size=64), 0.9) >= np.log(10) for _ in range(2000)]
    assert 0.98 < np.mean(held) <= 1


def test_a_tail_is_a_p99_from_662_queries_on_a_p90_from_64_on_and_nothing_below():
    assert bench.tail(np.arange(662.0))[0] == 99
    assert bench.tail(np.arange(661.0))[0] == 90
    assert bench.tail(np.arange(64.0)) == (90, 62.0)
    with pytest.raises(ConfigError, match="at least 64"):
        bench.tail(np.arange(63.0))


def test_a_median_of_eight_lies_between_the_first_and_the_last_and_of_ten_between_second_and_ninth():
    assert bench.median_interval(np.arange(1, 9.0)) == (1.0, 4.5, 8.0)
    assert bench.median_interval(np.arange(1, 11.0)) == (2.0, 5.5, 9.0)
    with pytest.raises(ConfigError, match="at least 6"):
        bench.median_interval(np.arange(5.0))


def test_what_takes_half_the_time_in_every_block_is_exactly_twice_as_fast():
    blocks = [np.array([10.0, 20.0, 30.0]), np.array([40.0, 50.0])]
    assert bench.speedup(blocks, [block / 2 for block in blocks]) == (2.0, 2.0, 2.0)


def test_a_slow_moment_that_hits_both_does_not_move_the_ratio():
    weather = np.random.default_rng(0).uniform(1, 5, size=30)
    base = [np.full(10, 8.0 * w) for w in weather]
    fast = [np.full(10, 2.0 * w) for w in weather]
    assert bench.speedup(base, fast) == pytest.approx((4.0, 4.0, 4.0))


def test_equal_variants_on_a_noisy_machine_have_an_interval_that_holds_one():
    rng = np.random.default_rng(1)
    blocks = [[rng.lognormal(size=10) for _ in range(30)] for _ in range(2)]
    ratio, low, high = bench.speedup(*blocks)
    assert low < 1 < high
    assert low < ratio < high


def test_every_variant_answers_every_query_once_besides_warming_and_in_abba_order():
    asked = []
    calls = {name: lambda i, name=name: asked.append((name, i)) for name in "ab"}
    times = bench.interleave(calls, queries=8, blocks=2)
    assert [len(block) for block in times["a"]] == [4, 4]
    assert {name: sum(map(len, blocks)) for name, blocks in times.items()} == {"a": 8, "b": 8}
    turns = "".join(name for name, _ in asked[-24:])
    assert turns == "aaabbbbbbaaa" * 2 or turns == "aaabbbbbbaaa" * 2
    first_turn = [i for _, i in asked[-24:][:3]]
    assert first_turn == [0, 0, 1], "one call to fill the caches, then the queries"
    timed = {name: [i for n, i in asked[-24:] if n == name] for name in "ab"}
    assert timed["a"] == timed["b"], "the same queries for all"


def test_what_is_warm_already_is_called_no_more_often_than_it_is_timed():
    asked = []
    bench.interleave({"a": asked.append}, queries=6, blocks=3, warm=True)
    assert asked == [0, 1, 2, 3, 4, 5]


def test_more_blocks_than_queries_are_refused():
    with pytest.raises(ConfigError, match="2 queries do not fill 3 blocks"):
        bench.interleave({"a": lambda i: None}, queries=2, blocks=3)


def test_warming_up_stops_when_a_round_is_no_faster_than_the_one_before():
    ticks = iter([0, 10, 10, 15, 15, 20, 20, 99])  # rounds of 10, 5 and 5 seconds
    assert bench.warm_up(lambda i: None, queries=3, clock=lambda: next(ticks)) == 30


def test_warming_up_ends_even_if_it_only_ever_gets_faster():
    starts = np.cumsum(np.repeat(0.5 ** np.arange(50), 2))
    ticks = iter(starts)
    assert bench.warm_up(lambda i: None, queries=3, patience=4, clock=lambda: next(ticks)) <= 40


def test_a_model_that_needs_more_memory_than_another_is_seen_to(tmp_path):
    folder = words.onnx_model(tmp_path / "model")
    assert bench.peak_memory_bytes(folder, [["good", "bad"]], threads=1) > 10_000_000


def test_a_model_that_does_not_load_has_no_peak_of_memory(tmp_path):
    with pytest.raises(ModelError, match="fresh process"):
        bench.peak_memory_bytes(tmp_path, [["good"]], threads=1)


def test_the_machine_is_described():
    found = bench.machine()
    assert found["cores"] >= 1
    assert found["cpu"]
    assert set(found["isa"]) <= set(bench.ISA)
    assert found["memory_bytes"] > 0
