import json

import numpy as np
import pytest

from slimline import artifact, bench, evidence, language, step, technique
from slimline.errors import ConfigError, DataError
from slimline.evaluate import generation
from tests.decoders import make_decoder, make_documents, seal_decoder

SMALL = {"lengths": (4, 12), "batches": (3,), "tokens": 112, "answers": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    wide = seal_decoder(make_decoder("llama", folder / "wide", layers=3, width=128))
    return wide, seal_decoder(make_decoder("llama", folder / "narrow", layers=1, width=16))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(make_documents(tmp_path_factory.mktemp("data") / "rows.parquet"))


@pytest.fixture(scope="module")
def timed(models, rows, tmp_path_factory):
    wide, narrow = models
    out = tmp_path_factory.mktemp("out") / "timed"
    options = {"data": rows, "against": (str(wide), str(narrow)), **SMALL}
    metrics = step.run_on_folder("evaluate.generation", narrow, out, options, lambda _: None)
    return metrics, json.loads((out / "latency.json").read_text(encoding="utf-8")), out


def test_all_are_measured_with_the_first_as_baseline(timed, models):
    metrics, whole, _ = timed
    assert [v["digest"] for v in whole["variants"]] == [artifact.read(m).digest for m in models], "each model once"
    assert (whole["lengths"], whole["batches"], whole["tokens"]) == ([4, 12], [3], 112)
    assert whole["tokenization"] == "left out"
    first, own = whole["variants"]
    for name in ("speedup", "batch_speedup"):
        assert [first[name], first[f"{name}_low"], first[f"{name}_high"]] == [1, 1, 1]
        assert own[f"{name}_low"] <= own[name] <= own[f"{name}_high"]
    for variant in whole["variants"]:
        assert 0 < variant["p50_low_ms"] <= variant["p50_ms"] <= variant["p50_high_ms"] <= variant["p99_ms"]
        assert variant["decode_4_tokens_per_s"] == pytest.approx(1000 / variant["p50_ms"])
        assert variant["batch_p50_ms"] == variant["ttft_12_ms"]
        assert variant["throughput_per_s"] == variant["prefill_12_tokens_per_s"] == 12_000 / variant["ttft_12_ms"]
        assert {"ttft_4_ms", "decode_12_tokens_per_s", "ttft_batch_3_ms"} < variant.keys()
        assert variant["decode_batch_3_tokens_per_s"] > variant["decode_4_tokens_per_s"], "three at once pay"
        assert variant["peak_memory_bytes"] > variant["size_bytes"] > variant["weights_bytes"] > 0
    assert own["speedup"] == pytest.approx(first["p50_ms"] / own["p50_ms"])
    assert own["speedup"] > 1.2, "a layer of 16 against three of 128"
    assert metrics == {k: v for k, v in own.items() if not isinstance(v, str)}


def test_what_is_written_is_the_gates_evidence(timed, models):
    _, whole, out = timed
    speed = evidence.speed(out, artifact.read(models[1]).digest)
    own = whole["variants"][1]
    assert speed.latency == (own["speedup"], own["speedup_low"], own["speedup_high"])
    assert speed.throughput[0] == own["batch_speedup"]
    assert speed.size > 5
    assert speed.p50_ms == own["p50_ms"]


def test_an_answer_is_what_the_model_itself_would_write(models):
    model = language.load(models[1])

    class Noting:
        """The model, and what it was made to write."""

        prefill = staticmethod(model.prefill)

        def __init__(self):
            self.written = []

        def step(self, state):
            self.written.append(int(state.logits_BV[0].argmax()))
            return model.step(state)

    noting, ids = Noting(), [5, 9, 12]
    answer = generation.Timed(noting, np.array([[ids]]), 6)
    answer(0)
    for expected in noting.written:
        assert int(model.logits([ids])[0, -1].argmax()) == expected
        ids = [*ids, expected]
    assert len(noting.written) == 6
    assert answer.first_ms[0] > 0 and (answer.others_ms[0] > 0).all()


def test_prompts_are_real_text_of_the_length_that_was_asked_for(models, rows):
    config = technique.configure(generation, {"data": rows, **SMALL})
    model = language.load(models[0])
    found = generation.prompts(model, (12, 3), config)
    assert found.shape == (6, 3, 12)
    assert len({tuple(row) for row in found.reshape(-1, 12).tolist()}) == 18
    assert (found == generation.prompts(model, (12, 3), config)).all()
    other = technique.configure(generation, {"data": rows, "seed": 1, **SMALL})
    assert (found != generation.prompts(model, (12, 3), other)).any()
    assert generation.settings(config) == [(4, 1), (12, 1), (4, 3)]


def test_memory_is_that_of_a_fresh_process_and_grows_with_what_is_read(timed, models):
    peak = timed[1]["variants"][0]["peak_memory_bytes"]
    more = bench.peak_memory_bytes(models[0], [[[3] * 64] * 256], 1)
    assert more > peak + 256 * 64 * 96 * 4, "what the feed-forward part of one layer holds for all tokens"


def test_what_cannot_be_timed_is_refused(models, rows, tmp_path):
    with pytest.raises(ConfigError, match="cannot bound a p99. Ask for 21 answers"):
        generation.run(models[1], tmp_path, technique.configure(generation, {"data": rows, "answers": 20}))
    long = technique.configure(generation, {"data": rows, **SMALL, "lengths": (100,)})
    with pytest.raises(DataError, match="the prompt is 100 tokens, and 112 more are asked for"):
        generation.run(models[1], tmp_path, long)
    with pytest.raises(ConfigError, match="lengths"):
        technique.configure(generation, {"data": rows, "lengths": (0,)})
    assert technique.stored_fields(generation.Config) == ["data", "against"]
