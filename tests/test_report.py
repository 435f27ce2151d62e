import re

import pytest

from slimline import gate, report, summary
from slimline.artifact import Stage

MODELS = [  # name, technique, accuracy, p50 ms, weights MB, memory MB
    ("finetune · hf", "train.finetune", 0.882, 21.0, 91.0, 700),
    ("finetune · onnx", "export.onnx", 0.882, 10.8, 91.0, 420),
    ("logits · hf", "distill.logits", 0.875, 11.0, 69.0, 650),
    ("heads · hf", "prune.heads", 0.869, 7.0, 57.0, 640),
    ("heads · onnx", "export.onnx", 0.869, 2.6, 57.0, 300),
    ("int8_dynamic · onnx", "quantize.int8_dynamic", 0.868, 1.5, 14.2, 150),
]


def row(index: int, name: str, technique: str, accuracy: float, p50: float, size: float, memory: float) -> report.Row:
    speedup = MODELS[0][3] / p50
    return report.Row(
        name=name,
        technique=technique,
        format=name.split(" · ")[1],
        runtime="ONNX Runtime 1.32.0 (CPUExecutionProvider)" if "onnx" in name else "PyTorch 2.13.0 (cpu)",
        quality=accuracy,
        quality_low=accuracy - 0.013,
        quality_high=accuracy + 0.012,
        p50_ms=p50,
        p50_low_ms=p50 * 0.97,
        p50_high_ms=p50 * 1.04,
        p99_ms=p50 * 2.2,
        throughput_per_s=2500 / p50,
        speedup=speedup,
        speedup_low=speedup * 0.97,
        speedup_high=speedup * 1.03,
        weights_bytes=int(size * 1e6),
        size_bytes=int(size * 1e6) + 700_000,
        peak_memory_bytes=int(memory * 1e6),
        is_baseline=index == 0,
        is_candidate=index == len(MODELS) - 1,
        others={
            "macro_f1": accuracy - 0.001,
            "recall_negative": accuracy - 0.01,
            "recall_positive": accuracy + 0.01,
            "accuracy_0_to_15_tokens": accuracy + 0.02,
            "accuracy_16_to_31_tokens": accuracy,
            "accuracy_from_64_tokens": accuracy - 0.03,
        },
    )


ROWS = tuple(row(i, *model) for i, model in enumerate(MODELS))


def check(status: str) -> gate.Check:
    sentence = "-1.4 points against the baseline, at worst -2.4 points (allowed -3.0 points)."
    return gate.Check(
        name="accuracy", status=status, value=-0.014, low=-0.024, high=-0.004, limit=-0.03, sentence=sentence
    )


def page(
    status: str = "PASS", rows: tuple[report.Row, ...] = ROWS, text: str = "It <script>alert(1)</script> bored me."
):
    verdict = gate.Verdict(
        status=status,
        sentence=f"{status}: accuracy -1.4 points against the baseline, at worst -2.4 points (allowed -3.0 points); "
        "14.0x as fast (13.6 to 14.4), 6.4x smaller.",
        limits=gate.Limits(margin=0.03),
        limits_digest="0f" * 32,
        checks=(check(status), gate.Check(name="benefit", status="PASS", value=14.0, limit=1.0, sentence="won: size.")),
        examples=2456,
        agreement=0.934,
        flips_lost=98,
        flips_won=64,
    )
    flip = report.Flip(
        text=text, label="negative", before="negative", before_score=0.91, after="positive", after_score=0.97
    )
    stages = tuple(
        Stage(
            technique=m[1],
            config={"epochs": 2, "learning_rate": 5e-5},
            metrics={"validation_accuracy": m[2]},
            parent="a" * 64,
            seconds=m[3] * 10,
            peak_memory_bytes=10**9,
        )
        for m in MODELS
    )
    return report.Page(
        name="reviews",
        version=3,
        outcome="Version 3 of reviews is now the champion in place of version 2.",
        verdict=verdict,
        terms=summary.ANSWERS,
        rows=rows,
        flips=(flip,) * 4,
        lineage=stages,
        refs={"candidate": "runs:/0/model", "verdict": "runs:/1/evaluation"},
        machine={"cpu": "AMD EPYC", "cores": 2, "isa": ["avx2"], "gpu": ""},
        data="movies.parquet",
        data_digest="ab" * 32,
        command="slimline run optimize -f recipe.yaml --set 'name=a b'",
        slimline_version="0.1.0",
        created="2026-11-23 14:00 UTC",
    )


def test_what_comes_from_outside_is_never_markup():
    drawn = report.render(page())
    assert "<script>alert" not in drawn
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    assert "name=a b" in drawn


def test_the_page_needs_nothing_from_a_network():
    drawn = report.render(page())
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", drawn)


@pytest.mark.parametrize("status", ["PASS", "FAIL", "INCONCLUSIVE", "INVALID"])
def test_every_verdict_is_drawn_with_its_sentence(status):
    drawn = report.render(page(status))
    assert f'class="verdict {status}"' in drawn and "at worst -2.4 points" in drawn


def test_every_model_stage_and_mistake_is_on_the_page():
    drawn = report.render(page())
    for name, technique, *_ in MODELS:
        assert drawn.count(name) >= 5 and technique in drawn
    assert drawn.count("bored me") == 4
    assert "98 answers that were right are now wrong" in drawn
    assert "nan" not in drawn.lower().replace("finance", "")


def test_one_model_alone_and_no_mistakes_can_be_drawn():
    alone = page(rows=ROWS[:1]).model_copy(update={"flips": ()})
    assert "nothing that was right is wrong now" in report.render(alone)


def stages(*techniques: str) -> tuple[Stage, ...]:
    return tuple(Stage(technique=t, config={}, metrics={}, parent="", seconds=10.0) for t in techniques)


def test_a_stage_is_matched_with_its_own_measurement_not_with_the_baselines_export():
    lineage = stages("fetch.local", "train.finetune", "distill.logits", "prune.heads", "export.onnx")
    found = report.bought(lineage, ROWS[:5])
    names = [step["row"] and step["row"].name for step in found]
    assert names == [None, "finetune · hf", "logits · hf", "heads · hf", "heads · onnx"]
    assert [step["before"] and step["before"].name for step in found] == [None, None, *names[1:4]]


def test_a_stage_that_was_not_measured_is_passed_over_in_what_the_next_one_bought():
    found = report.bought(stages("train.finetune", "prune.unknown", "quantize.int8_dynamic"), ROWS)
    assert [step["row"] is None for step in found] == [False, True, False]
    assert found[2]["before"] is ROWS[0]
    assert report.bought((), ROWS) == []


def test_what_a_stage_bought_is_on_the_page():
    drawn = report.render(page())
    assert "-0.7 points" in drawn and "4.01x smaller" in drawn and "88.2 %</td>" in drawn


def test_the_front_holds_what_nothing_beats_in_both():
    names = [r.name for r in report.pareto(ROWS)]
    assert names == ["int8_dynamic · onnx", "heads · onnx", "finetune · onnx"]


def test_places_on_the_plot_keep_their_order_and_stay_inside():
    drawn = report.plot(ROWS, summary.ANSWERS)
    xs = {p["row"].name: p["x"] for p in drawn["points"]}
    assert xs["int8_dynamic · onnx"] < xs["heads · onnx"] < xs["heads · hf"] < xs["finetune · hf"]
    for p in drawn["points"]:
        assert drawn["left"] <= p["x1"] <= p["x"] <= p["x2"] <= drawn["right"]
        assert drawn["top"] <= p["y2"] <= p["y"] <= p["y1"] <= drawn["bottom"]
    places = [(p["tx"], p["ty"]) for p in drawn["points"]]
    assert len(set(places)) == len(places)


def test_a_strip_shows_the_limit_left_of_an_interval_that_passes():
    places = report.strip(check("PASS"))
    assert 0 < places["limit"] < places["low"] < places["value"] < places["high"] < 100
    assert report.strip(gate.Check(name="benefit", status="PASS", value=1.0, limit=1.0, sentence="")) is None


def test_a_language_model_is_drawn_by_perplexity_of_which_less_is_better():
    terms = summary.LANGUAGE.model_copy(update={"timed": "Tokens."})
    numbers = {"base": (19.9, 12.0), "worse": (26.1, 2.0), "good": (21.7, 2.5)}
    rows = tuple(
        row(i, f"{name} · genai", "quantize.rtn", 0.5, p50, 90.0, 300).model_copy(
            update={"quality": q, "quality_low": q - 0.5, "quality_high": q + 0.5, "is_candidate": name == "good"}
        )
        for i, (name, (q, p50)) in enumerate(numbers.items())
    )
    assert [r.name for r in report.pareto(rows, terms.rising)] == ["worse · genai", "good · genai", "base · genai"]
    heights = {p["row"].name: p["y"] for p in report.plot(rows, terms)["points"]}
    assert heights["base · genai"] < heights["good · genai"] < heights["worse · genai"]  # better is up
    drawn = report.render(page(rows=rows).model_copy(update={"terms": terms}))
    assert "21.70" in drawn and "+9.0 %" in drawn and "perplexity, 21.20 to 22.20 (baseline 19.90)" in drawn
    assert "accuracy" not in drawn.split("<h2>What was asked")[0].split('<div class="tiles">')[1]
