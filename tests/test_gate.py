import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimline import bounds, gate
from slimline.errors import ConfigError
from slimline.gate import Blessing, Limits, Predictions, Speed

FAST = Speed((6.0, 5.8, 6.2), (4.0, 3.9, 4.1), size=6.4, memory=2.0, p50_ms=1.5, weights_bytes=14_000_000,
             memory_bytes=95_000_000)  # fmt: skip
SLOW = Speed((0.8, 0.7, 0.9), (0.9, 0.8, 1.1), size=4.0, memory=1.1, p50_ms=20.0, weights_bytes=20_000_000)
FINE = Blessing(ok=True)


def answers(n: int, lost: int, won: int, wrong: int = 0) -> tuple[Predictions, Predictions]:
    """(candidate, baseline) with so many examples lost, won and wrong in both; the rest is right in both."""
    ids = [str(i) for i in range(n)]
    labels = ["a", "b"] * (n // 2) + ["a"] * (n % 2)
    other = {"a": "b", "b": "a"}
    new, old = list(labels), list(labels)
    for i in range(lost):
        new[i] = other[labels[i]]
    for i in range(lost, lost + won):
        old[i] = other[labels[i]]
    for i in range(lost + won, lost + won + wrong):
        new[i] = old[i] = other[labels[i]]
    slices = {f"label:{name}": np.array(labels) == name for name in "ab"}
    slices["length:64+"] = np.arange(n) < 20
    return Predictions(ids, labels, new, slices), Predictions(ids, labels, old, slices)


def decide(n, lost, won, speed=FAST, blessing=FINE, **limits):
    return gate.decide(*answers(n, lost, won, wrong=n // 10), speed, blessing, Limits(**limits))


# Tango's interval


@pytest.mark.parametrize(
    ("won", "lost", "n", "alpha", "low", "high"),
    [
        (1, 7, 21, 0.05, -0.517, -0.026),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake
        (0, 1, 44, 0.10, -0.096, 0.037),  # the 44 patients of Tango 1998
    ],
)
def test_the_interval_is_that_of_published_examples(won, lost, n, alpha, low, high):
    assert bounds.tango(won, lost, n, alpha) == pytest.approx((low, high), abs=6e-4)


def test_without_any_flip_the_interval_is_wilsons_for_a_count_of_zero():
    low, high = bounds.tango(0, 0, 50, 0.05)
    z = 1.959963984540054
    assert (low, high) == pytest.approx((-(z**2) / (50 + z**2), z**2 / (50 + z**2)), abs=1e-9)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(60, 400))
@settings(max_examples=40, deadline=None)
def test_changing_sides_mirrors_the_interval_and_the_value_lies_inside(won, lost, n):
    low, high = bounds.tango(won, lost, n, 0.1)
    assert bounds.tango(lost, won, n, 0.1) == pytest.approx((-high, -low), abs=1e-7)
    assert low <= (won - lost) / n <= high
    assert bounds.tango(won, lost + 1, n, 0.1)[0] < low


@pytest.mark.parametrize(("won", "lost", "n", "difference"), [(3, 9, 60, -0.02), (10, 2, 40, 0.1), (5, 5, 200, -0.03)])
def test_the_score_is_at_the_maximum_of_the_likelihood_under_the_supposed_difference(won, lost, n, difference):
    q = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400_001)[
        1:-1
    ]  # chance of losing; winning is more by d
    same = 1 - 2 * q - difference
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = lost * np.log(q) + won * np.log(q + difference) + (n - won - lost) * np.log(same)
    best = q[np.nanargmax(likelihood)]
    spread = math.sqrt(n * (2 * best + difference - difference**2))
    assert bounds.score(won, lost, n, difference) == pytest.approx((won - lost - n * difference) / spread, rel=1e-3)


# Simulation


def passes(n: int, drop: float, flips: float, margin: float, times: int, seed: int) -> float:
    """How often a candidate that truly loses `drop` passes, by the bound that `decide` uses."""
    draw = np.random.default_rng(seed)
    chances = [(flips - drop) / 2, (flips + drop) / 2, 1 - flips]
    counts, how_often = np.unique(draw.multinomial(n, chances, size=times)[:, :2], axis=0, return_counts=True)
    # low > -margin exactly when the score at -margin exceeds the quantile
    proven = [bounds.score(int(w), int(x), n, -margin) > 1.6448536269514722 for w, x in counts]
    return float(how_often[np.array(proven)].sum() / times)


@pytest.mark.parametrize("n", [500, 2000])
def test_a_candidate_at_the_margin_passes_in_six_of_a_hundred_tries_at_most(n):
    assert passes(n, 0.01, 0.08, 0.01, 20_000, seed=n) <= 0.06


@pytest.mark.parametrize(("flips", "margin"), [(0.02, 0.01), (0.08, 0.01), (0.1, 0.02)])
def test_with_the_examples_that_are_named_an_equal_candidate_passes_in_three_of_four_tries(flips, margin):
    n = bounds.examples_needed(flips, margin)
    assert passes(n, 0.0, flips, margin, 20_000, seed=1) >= 0.75


def test_not_significant_is_never_read_as_equal():
    n, drop, flips, times = 500, 0.03, 0.08, 4000
    draw = np.random.default_rng(0)
    won, lost, _ = draw.multinomial(n, [(flips - drop) / 2, (flips + drop) / 2, 1 - flips], size=times).T
    before = 0.88 * n + (lost - won) / 2
    p1, p2 = before / n, (before - lost + won) / n
    pooled = (p1 + p2) / 2
    unpaired = (p1 - p2) / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert (unpaired < 1.96).mean() > 0.5  # "no significant difference" lets most of them through
    assert passes(n, drop, flips, 0.01, times, seed=0) < 0.01


def test_the_bound_in_the_simulation_is_the_bound_of_the_verdict():
    for lost in range(10, 40, 3):
        verdict = decide(2000, lost, 10, margin=0.01)
        proven = bounds.score(10, lost, 2000, -0.01) > 1.6448536269514722
        assert (verdict.checks[0].status == "PASS") == proven


def test_macro_f1_at_the_margin_passes_in_six_of_a_hundred_tries_at_most_even_where_flips_are_few():
    label, half, lows = np.repeat(["a", "b"], 50), 50, {}
    for a in range(4):
        for b in range(4):
            new = label.copy()
            new[:a], new[half : half + b] = "b", "a"
            lows[a, b] = bounds.bootstrap(label, label, new, 0.1, seed=0)[0]
    for loss in (0.01, 0.02, 0.03):  # of each label alike, so that macro F1 falls by just as much: it is the margin
        chance = [math.comb(half, lost) * loss**lost * (1 - loss) ** (half - lost) for lost in range(4)]
        passed = [pair for pair, low in lows.items() if low > -loss]
        assert sum(chance[a] * chance[b] for a, b in passed) <= 0.06  # exact, no simulation
        assert all(max(pair) < 3 for pair in passed)  # so none with more losses passes either


def test_no_flip_seen_proves_no_margin_by_itself():
    for metric in ("accuracy", "macro_f1"):
        assert decide(100, 0, 0, metric=metric, margin=0.005).status == "INCONCLUSIVE"
        assert decide(2000, 0, 0, metric=metric, margin=0.005).status == "PASS"


def test_one_label_with_few_examples_widens_macro_f1():
    label = np.array(["a"] * 390 + ["rare"] * 10)
    low, high = bounds.bootstrap(label, label, label, 0.1, seed=0)
    lost = 10 * 1.6448536269514722**2 / (10 + 1.6448536269514722**2)  # Wilson's bound for none lost of 10
    rare, common = 2 * (10 - lost) / (20 - lost), 780 / (780 + lost)
    assert low == pytest.approx((rare + common) / 2 - 1, abs=1e-4) and high == -low


# Verdicts


def test_proven_within_the_margin_and_faster_passes():
    verdict = decide(2400, 60, 50, margin=0.02)
    assert verdict.status == "PASS" and verdict.allows_promotion
    assert verdict.sentence.startswith("PASS: accuracy -0.4 points") and "6.0x as fast (5.8 to 6.2)" in verdict.sentence
    assert (verdict.flips_lost, verdict.flips_won, verdict.examples) == (60, 50, 2400)
    assert verdict.agreement == pytest.approx(1 - 110 / 2400)


def test_proven_worse_fails_and_says_so():
    verdict = decide(2400, 200, 20, margin=0.02)
    assert verdict.status == "FAIL" and not verdict.allows_promotion
    assert "proven worse" in verdict.sentence


def test_what_cannot_be_told_is_inconclusive_and_names_the_examples_that_would_tell():
    verdict = decide(500, 20, 20, margin=0.01)
    assert verdict.status == "INCONCLUSIVE"
    assert "about 4947 examples would tell; there are 500" in verdict.sentence


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
@pytest.mark.parametrize(("n", "lost", "won"), [(100, 0, 0), (100, 1, 0), (100, 2, 3), (120, 2, 2), (150, 3, 1)])
def test_the_examples_that_would_tell_are_more_than_there_are(metric, n, lost, won):
    verdict = decide(n, lost, won, metric=metric, margin=0.02)
    assert verdict.status == "INCONCLUSIVE"
    assert int(verdict.sentence.split("about ")[1].split()[0]) > n


def test_the_examples_needed_are_six_point_eighteen_flips_over_the_margin_squared():
    assert bounds.examples_needed(0.08, 0.01) == 4947 == math.ceil(6.1826 * 0.08 / 0.01**2)
    assert bounds.examples_needed(0.08, 0.005) == pytest.approx(4 * 4947, abs=4)
    assert bounds.examples_needed(0.0, 0.01) > 0


def test_a_model_that_does_not_run_is_invalid_with_the_reason():
    verdict = decide(2400, 0, 0, blessing=Blessing(ok=False, problem="answers with NaN."))
    assert verdict.status == "INVALID" and "answers with NaN" in verdict.sentence


def test_evidence_that_does_not_fit_together_is_invalid():
    candidate, baseline = answers(400, 0, 0)
    turned = Predictions(candidate.ids[::-1], candidate.labels[::-1], candidate.predicted[::-1])
    assert gate.decide(turned, baseline, FAST, FINE, Limits()).status == "INVALID"
    assert decide(50, 0, 0).status == "INVALID"
    broken = Speed((float("nan"), 1.0, 1.0), (1.0, 1.0, 1.0), 1.0, 1.0, 1.0, 1)
    assert decide(400, 0, 0, speed=broken).status == "INVALID"
    upside_down = Speed((6.0, 6.2, 5.8), (1.0, 1.0, 1.0), 1.0, 1.0, 1.0, 1)
    assert "low end above" in decide(400, 0, 0, speed=upside_down).sentence
    assert "no slice 'label:c'" in decide(400, 0, 0, slices={"label:c": 0.1}).sentence


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"predicted": ["a"] * 399}, "different lengths: 399, 400"),
        ({"slices": {"label:a": np.ones(5, dtype=bool)}}, "different lengths: 5, 400"),
        ({"ids": ["0"] * 400}, "399 examples more than once"),
        ({"predicted": [None] * 400}, "without an answer"),
    ],
)
def test_answers_that_are_broken_by_themselves_are_invalid_and_nothing_is_raised(change, reason):
    candidate, baseline = answers(400, 0, 0)
    verdict = gate.decide(replace(candidate, **change), baseline, FAST, FINE, Limits(slices={"label:a": 0.1}))
    assert verdict.status == "INVALID" and reason in verdict.sentence


def test_a_hair_less_memory_is_not_a_win():
    same = Speed((1.0, 0.98, 1.02), (1.0, 0.98, 1.02), size=1.0, memory=1.01, p50_ms=9.0, weights_bytes=91_000_000)
    assert "nothing is won" in decide(2400, 0, 0, speed=same).sentence
    assert decide(2400, 0, 0, speed=replace(same, memory=1.5)).status == "PASS"


def test_slower_than_the_baseline_fails_unless_size_alone_was_asked_for():
    assert "slower than the baseline" in decide(2400, 0, 0, speed=SLOW).sentence
    assert decide(2400, 0, 0, speed=SLOW, size_alone=True).status == "PASS"


def test_nothing_won_fails():
    verdict = decide(2400, 0, 0, speed=SLOW, size_alone=True, must_win=("latency", "throughput"))
    assert verdict.status == "FAIL" and "nothing is won" in verdict.sentence


@pytest.mark.parametrize(
    ("limit", "status"),
    [
        ({"min_speedup": 5.0}, "PASS"),
        ({"min_speedup": 6.1}, "INCONCLUSIVE"),
        ({"min_speedup": 7.0}, "FAIL"),
        ({"max_p50_ms": 1.0}, "FAIL"),
        ({"max_p50_ms": 2.0}, "PASS"),
        ({"max_size_bytes": 13_000_000}, "FAIL"),
        ({"max_size_bytes": 14_000_000}, "PASS"),
        ({"max_memory_bytes": 90_000_000}, "FAIL"),
        ({"max_memory_bytes": 100_000_000}, "PASS"),
        ({"min_agreement": 0.999}, "FAIL"),
        ({"min_agreement": 0.9}, "PASS"),
    ],
)
def test_every_limit_is_held(limit, status):
    assert decide(2400, 60, 50, margin=0.02, **limit).status == status


def test_memory_that_was_not_measured_is_within_no_limit():
    assert decide(2400, 0, 0, speed=replace(FAST, memory_bytes=0), max_memory_bytes=10**12).status == "FAIL"


# Against the champion


def against(n, lost, won, **limits):
    """The baseline answers as the champion does; of the champion's answers so many are lost and won."""
    candidate, champion = answers(n, lost, won, wrong=n // 10)
    baseline = replace(champion, predicted=candidate.predicted)
    rival = gate.Champion("version 3", champion)
    return gate.decide(candidate, baseline, FAST, FINE, Limits(**limits), champion=rival)


def test_a_candidate_must_also_hold_against_the_champion():
    worse = against(2400, 200, 0)
    assert worse.status == "FAIL" and [c.status for c in worse.checks][:2] == ["PASS", "FAIL"]
    assert worse.checks[1].name == "champion"
    assert worse.checks[1].sentence.startswith("-8.3 points against the champion (version 3), at worst")
    assert against(2400, 20, 20).status == "PASS"
    assert against(2400, 45, 2).status == "INCONCLUSIVE"
    assert against(2400, 200, 0, against_champion=False).status == "PASS"


def test_the_champion_has_a_margin_of_its_own_if_one_is_given():
    assert against(2400, 20, 20, champion_margin=0.001).status == "INCONCLUSIVE"
    assert against(2400, 200, 0, champion_margin=0.15).status == "PASS"
    assert against(2400, 20, 20, champion_margin=0.001).checks[1].limit == -0.001


@pytest.mark.parametrize("change", [{"ids": ["x"] * 2400}, {"labels": ["b", "a"] * 1200}, None])
def test_a_champion_that_was_not_measured_on_the_same_examples_is_replaced_only_if_that_is_asked_for(change):
    candidate, baseline = answers(2400, 0, 0, wrong=240)
    measured = replace(baseline, **change) if change else None
    rival = gate.Champion("version 3", measured)
    verdict = gate.decide(candidate, baseline, FAST, FINE, Limits(), champion=rival)
    assert verdict.status == "INVALID" and "the champion (version 3) was not measured on" in verdict.sentence
    assert "against_champion: false" in verdict.sentence
    unseen = Limits(against_champion=False)
    assert gate.decide(candidate, baseline, FAST, FINE, unseen, champion=rival).status == "PASS"


def test_a_slice_has_its_own_margin_and_one_that_is_too_small_is_reported_not_passed():
    assert decide(2400, 60, 50, margin=0.02, slices={"label:a": 0.04}).status == "PASS"
    assert decide(2400, 60, 50, margin=0.02, slices={"label:a": 0.001}).status == "INCONCLUSIVE"
    small = decide(2400, 60, 50, margin=0.02, slices={"length:64+": 0.05})
    assert small.status == "PASS"
    assert next(c for c in small.checks if c.name == "length:64+").status == "REPORTED"


def test_macro_f1_is_the_mean_of_the_labels_f1():
    label = np.array(["a", "a", "a", "b"])
    predicted = np.array(["a", "a", "b", "b"])
    assert bounds.macro_f1(label, predicted) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_macro_f1_is_gated_by_a_bootstrap_near_tangos_interval_where_labels_balance():
    exact = decide(1200, 40, 30, margin=0.03)
    verdict = decide(1200, 40, 30, metric="macro_f1", margin=0.03)
    assert verdict.checks[0].low == pytest.approx(exact.checks[0].low, abs=0.004)
    assert verdict == decide(1200, 40, 30, metric="macro_f1", margin=0.03)
    assert decide(1200, 0, 0, metric="macro_f1").status == "PASS"


# Limits


def test_the_digest_of_the_limits_changes_with_each_of_them():
    other = {
        "metric": "macro_f1", "margin": 0.03, "confidence": 0.9, "min_examples": 50, "slices": {"label:a": 0.1},
        "slice_min_examples": 10, "min_agreement": 0.5, "must_win": ("size",), "min_speedup": 2.0, "max_p50_ms": 3.0,
        "max_size_bytes": 5, "size_alone": True, "seed": 1, "max_kl": 0.1, "choices_margin": 0.1,
        "max_memory_bytes": 5, "against_champion": False, "champion_margin": 0.01, "require_approval": True,
    }  # fmt: skip
    assert set(other) == set(Limits.model_fields)
    digests = {Limits(**{key: value}).digest() for key, value in other.items()}
    assert len(digests | {Limits().digest()}) == len(other) + 1
    assert Limits().digest() == Limits().digest()


def test_limits_that_cannot_be_are_refused_by_name():
    with pytest.raises(ConfigError, match="gate limit 'margin'"):
        gate.limits_from({"margin": -1})
    with pytest.raises(ConfigError, match=r"gate limit 'margn'.*The limits are: metric, margin"):
        gate.limits_from({"margn": 0.1})


def test_a_verdict_survives_being_written_down():
    verdict = decide(2400, 60, 50, margin=0.02, slices={"label:a": 0.04})
    assert gate.Verdict.model_validate_json(verdict.model_dump_json()) == verdict
