"""The gate on language models: perplexity over documents, how far next tokens stray, and multiple choice beside it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from slimline import bounds, gate
from slimline.gate import Blessing, Limits, Losses, Predictions, Speed, Strays

FAST = Speed(
    latency=(4.0, 3.8, 4.2), throughput=(2.0, 1.9, 2.1), size=4.0, memory=2.0, p50_ms=5.0, weights_bytes=90_000_000,
    asked="decoded tokens",
)  # fmt: skip
FINE = Blessing(ok=True)
NEAR = Strays(kl=0.05, agreement=0.9)


def losses(growth: float = 0.0, documents: int = 150, noise: float = 0.0, seed: int = 0) -> Losses:
    """Documents of uneven length at 3.5 nats a token, more by log(1 + growth), give or take some noise a document."""
    draw = np.random.default_rng(7)
    tokens = draw.integers(40, 400, documents)
    more = math.log1p(growth) + np.random.default_rng(seed).normal(0, noise, documents)
    return Losses([f"d{i}" for i in range(documents)], tokens.tolist(), (tokens * (3.5 + more)).tolist(), "same")


def choices(lost: int = 0, won: int = 0, n: int = 400) -> tuple[Predictions, Predictions]:
    ids, label = [str(i) for i in range(n)], ["a"] * n
    before = ["b"] * won + ["a"] * (n - won)
    after = ["a"] * (n - lost) + ["b"] * lost
    return Predictions(ids, label, after), Predictions(ids, label, before)


def decide(candidate=None, baseline=None, speed=FAST, strays=None, choices=None, **limits) -> gate.Verdict:
    limits = Limits(**{"metric": "perplexity", "margin": 0.12, **limits})
    return gate.decide(candidate or losses(0.05), baseline or losses(), speed, FINE, limits, strays, choices)


def check(verdict: gate.Verdict, name: str) -> gate.Check:
    return next(c for c in verdict.checks if c.name == name)


def test_the_growth_of_perplexity_is_the_ratio_over_all_tokens():
    verdict = decide(losses(0.05))
    assert check(verdict, "perplexity").value == pytest.approx(0.05)
    assert verdict.status == "PASS" and verdict.examples == 150
    assert verdict.sentence.startswith("PASS: perplexity +5.0% against the baseline, at worst +5.0% (allowed +12.0%)")
    assert "4.0x as fast" in verdict.sentence


def test_a_long_document_weighs_by_its_tokens():
    value, _, _ = bounds.log_ratio([10.0, 10.0, 300.0], [11.0, 10.0, 330.0], [10, 10, 300], 0.1, 0)
    assert value == pytest.approx(31 / 320)


@pytest.mark.parametrize(
    ("growth", "noise", "status"),
    [(0.05, 0.1, "PASS"), (0.30, 0.1, "FAIL"), (0.11, 0.3, "INCONCLUSIVE"), (0.125, 0.3, "INCONCLUSIVE")],
)
def test_what_is_proven_decides_and_what_is_not_stays_open(growth, noise, status):
    verdict = decide(losses(growth, noise=noise))
    found = check(verdict, "perplexity")
    assert verdict.status == status and found.low < found.value < found.high and found.limit == 0.12
    assert status != "PASS" or found.high < 0.12
    assert status != "FAIL" or found.low > 0.12


def test_an_open_verdict_names_the_documents_that_would_tell():
    found = check(decide(losses(0.09, noise=0.3, seed=3)), "perplexity")
    assert found.status == "INCONCLUSIVE" and "documents would tell; there are 150" in found.sentence


def test_at_the_margin_it_passes_in_few_of_many_tries():
    """True growth is just the margin, and documents differ by a skewed factor: a false pass in 20 is allowed."""
    passed = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        tokens = draw.integers(40, 400, 100)
        worse = tokens * math.log(1.12) * draw.gamma(4.0, 0.25, 100)
        _, _, high = bounds.log_ratio(tokens * 3.5, tokens * 3.5 + worse, tokens.tolist(), 0.1, seed)
        passed += high < math.log(1.12)
    assert passed / 200 <= 0.085  # 0.05 and two standard errors of 200 tries


def test_equal_models_pass_and_say_so():
    assert check(decide(losses()), "perplexity").value == 0.0
    assert decide(losses()).status == "PASS"


def test_strays_are_reported_and_judged_only_if_asked():
    verdict = decide(strays=NEAR)
    assert verdict.agreement == 0.9 and check(verdict, "divergence").status == "REPORTED"
    assert decide(strays=NEAR, max_kl=0.06, min_agreement=0.85).status == "PASS"
    assert decide(strays=NEAR, max_kl=0.04).status == "FAIL"
    assert decide(strays=NEAR, min_agreement=0.95).status == "FAIL"
    assert "0.040 are allowed" in decide(strays=NEAR, max_kl=0.04).sentence


def test_multiple_choice_has_a_margin_of_its_own():
    assert decide(choices=choices(10, 8)).status == "PASS"
    verdict = decide(choices=choices(60, 0))
    assert verdict.status == "FAIL" and "multiple choice" in verdict.sentence
    assert (verdict.flips_lost, verdict.flips_won) == (60, 0)
    assert decide(choices=choices(60, 0), choices_margin=0.25).status == "PASS"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"candidate": replace(losses(), text="other")}, "not measured on the same examples"),
        ({"candidate": replace(losses(), tokens=[1] * 150)}, "not measured on the same examples"),
        ({"candidate": replace(losses(), nll=[math.nan] * 150)}, "likelihood is not finite"),
        ({"candidate": replace(losses(), nll=[1.0])}, "different lengths"),
        ({"candidate": replace(losses(), ids=["d"] * 150)}, "documents more than once"),
        ({"candidate": replace(losses(), tokens=[0] * 150)}, "no token was scored"),
        ({"candidate": losses(documents=20), "baseline": losses(documents=20)}, "20 examples decide nothing"),
        ({"max_kl": 0.1}, "max_kl is asked for, but the divergence was not measured"),
        ({"min_agreement": 0.1}, "min_agreement is asked for, but the divergence was not measured"),
        ({"strays": Strays(math.nan, 0.5)}, "is no such thing"),
        ({"slices": {"label:a": 0.1}}, "a language model has none"),
        ({"metric": "accuracy"}, "accuracy is to be judged, but something else was measured"),
        ({"candidate": choices()[0]}, "perplexity is to be judged, but something else was measured"),
        ({"choices": (choices(n=400)[0], choices(n=200)[1])}, "not measured on the same examples"),
    ],
)
def test_evidence_that_does_not_fit_is_invalid_with_the_reason(change, sentence):
    verdict = decide(**change)
    assert verdict.status == "INVALID" and sentence in verdict.sentence


def test_latency_is_said_of_what_was_timed():
    slow = replace(FAST, latency=(0.5, 0.4, 0.6))
    assert "0.50x as fast on decoded tokens" in decide(speed=slow).sentence
    assert "5.00 ms in the median of decoded tokens" in decide(max_p50_ms=1.0).sentence


def test_perplexity_is_held_against_the_champions_on_the_same_documents():
    rival = gate.Champion("version 3", losses(-0.2))
    limits = Limits(metric="perplexity", margin=0.12)
    verdict = gate.decide(losses(0.05), losses(), FAST, FINE, limits, champion=rival)
    assert check(verdict, "perplexity").status == "PASS" and verdict.status == "FAIL"
    assert check(verdict, "champion").value == pytest.approx(1.05 / 0.8 - 1)
    assert "% against the champion (version 3), at worst" in check(verdict, "champion").sentence
    other = gate.Champion("version 3", replace(losses(), text="of another tokenizer"))
    verdict = gate.decide(losses(0.05), losses(), FAST, FINE, limits, champion=other)
    assert verdict.status == "INVALID" and "candidate's examples or tokens" in verdict.sentence
