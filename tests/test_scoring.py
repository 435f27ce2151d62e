import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from slimline import artifact, data, decoder, language, scoring, step, technique
from slimline.errors import ConfigError, DataError, ModelError
from slimline.evaluate import divergence, perplexity
from tests.decoders import make_decoder, make_documents, seal_decoder

WINDOWS = {"length": 16, "stride": 6}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("data") / "rows.parquet")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return seal_decoder(make_decoder("llama", tmp_path_factory.mktemp("llama") / "model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return seal_decoder(make_decoder("llama", tmp_path_factory.mktemp("other") / "model", seed=1))


def evaluated(module, model, out, **options):
    """Metrics of an evaluation, made into a folder of its own."""
    out.mkdir(parents=True)
    return module.run(model, out, technique.configure(module, options))


def table(folder, name):
    return pq.read_table(folder / name).to_pydict()


def cross_entropy(model, ids, length, stride):
    """Sum of negative log likelihoods of ids[1:] by torch, over windows cut as in Hugging Face's guide."""
    import torch

    total, scored = 0.0, 0
    for start in range(0, len(ids) - 1, stride):
        stop = min(start + length, len(ids) - 1)
        read, follow = torch.tensor(ids[start:stop])[None], torch.tensor(ids[start + 1 : stop + 1])
        fresh = stop - scored
        with torch.no_grad():
            answer = model(input_ids=read).logits[0]
        total += float(torch.nn.functional.cross_entropy(answer[-fresh:], follow[-fresh:], reduction="sum"))
        scored = stop
        if stop == len(ids) - 1:
            return total
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_perplexity_is_exp_of_the_mean_cross_entropy_that_torch_finds_in_float64(kind, tmp_path, rows):
    model = seal_decoder(make_decoder(kind, tmp_path / "model"))
    metrics = evaluated(perplexity, model, tmp_path / "out", data=str(rows), **WINDOWS)
    double, tokenizer = decoder.load(model).double(), language.Tokenizer(model)
    found = data.documents(rows, "test")
    parts = [[tokenizer.bos, *tokenizer.encode(text)] for text in found.texts]
    expected = [cross_entropy(double, part, **WINDOWS) for part in parts]
    written = table(tmp_path / "out", perplexity.DOCUMENTS)
    assert written["id"] == found.ids
    assert written["tokens"] == [len(part) - 1 for part in parts]
    assert written["bytes"] == [len(text.encode()) for text in found.texts]
    assert written["nll"] == pytest.approx(expected, rel=1e-6)
    assert max(written["tokens"]) > WINDOWS["length"], "some texts need several windows"
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(expected) / sum(written["tokens"])), rel=1e-6)
    bits = sum(expected) / math.log(2) / sum(written["bytes"])
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert metrics["perplexity_low"] < metrics["perplexity"] < metrics["perplexity_high"]
    assert metrics["bits_per_byte_low"] < bits < metrics["bits_per_byte_high"]


def test_joined_texts_are_one_stream_in_which_only_their_own_tokens_are_scored(tmp_path, rows, llama):
    evaluated(perplexity, llama, tmp_path / "out", data=str(rows), length=40, stride=40, joined=True)
    tokenizer, double = language.Tokenizer(llama), decoder.load(llama).double()
    parts = [[tokenizer.bos, *tokenizer.encode(text)] for text in data.documents(rows, "test").texts]
    written = table(tmp_path / "out", perplexity.DOCUMENTS)
    whole = cross_entropy(double, [token for part in parts for token in part], 40, 40)
    ends = whole - sum(written["nll"])  # what the tokens that begin the other texts would cost
    assert written["tokens"] == [len(part) - 1 for part in parts]
    assert 0 < ends < whole / 5


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 4), (5, 2), (7, 1), (100, 50)])
@pytest.mark.parametrize("count", [2, 3, 5, 6, 8, 23])
def test_each_token_is_scored_once_behind_enough_context(count, length, stride):
    ids = np.arange(100, 100 + count)
    windows = list(scoring.cut(ids, np.zeros(count, dtype=np.int64), length, stride))
    assert np.concatenate([w.target_S for w in windows]).tolist() == ids[1:].tolist()
    for window in windows:
        assert len(window.ids_T) <= length
        assert window.ids_T[window.at_S].tolist() == (window.target_S - 1).tolist(), "each from the token before it"
        enough = np.minimum(length - stride, window.target_S - 101)
        assert (window.at_S >= enough).all()


def test_log_likelihoods_of_float32_logits_are_exact():
    from scipy.special import log_softmax

    draw = np.random.default_rng(0)
    logits = draw.normal(0, 30, (130, 5000)).astype(np.float32)
    target = draw.integers(0, 5000, 130)
    exact = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(130), target]
    assert scoring.surprise(logits, target) == pytest.approx(exact, rel=1e-14, abs=1e-13)
    in_float32 = -log_softmax(logits, axis=1)[np.arange(130), target]
    assert np.abs(in_float32 - exact).max() > 1e-7, "float32 alone would not do"


def test_a_text_of_one_token_counts_only_where_something_begins_it(tmp_path, llama):
    rows = tmp_path / "rows.jsonl"
    texts = ["film", "the film was dull", "a warm and lovely story"]
    rows.write_text("\n".join(json.dumps({"text": t, "split": "test"}) for t in texts))
    evaluated(perplexity, llama, tmp_path / "with", data=str(rows), **WINDOWS)
    assert table(tmp_path / "with", perplexity.DOCUMENTS)["tokens"] == [1, 4, 5]
    assert table(tmp_path / "with", perplexity.DOCUMENTS)["bytes"] == [len(t) for t in texts]
    bare = make_decoder("llama", tmp_path / "bare", bos_token_id=None, eos_token_id=None)
    evaluated(perplexity, seal_decoder(bare), tmp_path / "without", data=str(rows), **WINDOWS)
    without = table(tmp_path / "without", perplexity.DOCUMENTS)
    assert without["tokens"] == [0, 3, 4]
    assert without["bytes"] == [0, len(" film was dull"), len(" warm and lovely story")]
    assert without["nll"][0] == 0
    with pytest.raises(DataError, match="no text of two tokens"):
        evaluated(perplexity, bare, tmp_path / "none", data=str(rows), max_documents=1, **WINDOWS)


def test_one_text_has_no_interval(tmp_path, rows, llama):
    metrics = evaluated(perplexity, llama, tmp_path / "out", data=str(rows), max_documents=1, **WINDOWS)
    assert metrics["documents"] == 1
    assert set(metrics) == {"documents", "tokens", "bytes", "perplexity", "bits_per_byte"}


def test_a_model_compared_with_itself_has_not_changed(tmp_path, rows, llama):
    evaluated(perplexity, llama, tmp_path / "base", data=str(rows), **WINDOWS)
    base = str(tmp_path / "base")
    metrics = evaluated(perplexity, llama, tmp_path / "again", data=str(rows), baseline=base, **WINDOWS)
    for name in ("log_perplexity_ratio", "bits_per_byte_change"):
        assert [metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"]] == [0, 0, 0]


def test_a_change_is_paired_text_by_text(tmp_path, rows, llama, other):
    first = evaluated(perplexity, llama, tmp_path / "base", data=str(rows), **WINDOWS)
    base = str(tmp_path / "base")
    second = evaluated(perplexity, other, tmp_path / "other", data=str(rows), baseline=base, **WINDOWS)
    change = math.log(second["perplexity"] / first["perplexity"])
    assert second["log_perplexity_ratio"] == pytest.approx(change)
    assert second["bits_per_byte_change"] == pytest.approx(second["bits_per_byte"] - first["bits_per_byte"])
    assert second["log_perplexity_ratio_low"] < change < second["log_perplexity_ratio_high"]


def test_another_tokenizer_is_compared_by_bytes_alone(tmp_path, rows, llama):
    from tokenizers import Tokenizer, models

    spelled = make_decoder("llama", tmp_path / "spelled", vocabulary=300)
    letters = {letter: i for i, letter in enumerate(["<|end|>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    fast = Tokenizer.from_file(str(spelled / "tokenizer.json"))
    fast.model = models.BPE(vocab=letters, merges=[], unk_token="<unk>")
    fast.save(str(spelled / "tokenizer.json"))
    evaluated(perplexity, llama, tmp_path / "base", data=str(rows), **WINDOWS)
    options = {"data": str(rows), "baseline": str(tmp_path / "base"), **WINDOWS}
    metrics = evaluated(perplexity, seal_decoder(spelled), tmp_path / "out", **options)
    assert metrics["tokens"] > 3 * sum(table(tmp_path / "base", perplexity.DOCUMENTS)["tokens"])
    assert "bits_per_byte_change" in metrics
    assert "log_perplexity_ratio" not in metrics
    with pytest.raises(ModelError, match="token 2 is 'fine' to one and '' to the other.*bits per byte"):
        evaluated(divergence, spelled, tmp_path / "kl", data=str(rows), base=str(llama), **WINDOWS)


def test_a_baseline_of_other_texts_or_windows_is_refused(tmp_path, rows, llama):
    evaluated(perplexity, llama, tmp_path / "base", data=str(rows), **WINDOWS)
    options = {"data": str(rows), "baseline": str(tmp_path / "base")}
    with pytest.raises(DataError, match="texts which are not the 5"):
        evaluated(perplexity, llama, tmp_path / "a", max_documents=5, **WINDOWS, **options)
    with pytest.raises(DataError, match='"length": 16.*not.*"length": 20'):
        evaluated(perplexity, llama, tmp_path / "b", length=20, stride=6, **options)
    with pytest.raises(DataError, match=r"no documents\.parquet"):
        evaluated(perplexity, llama, tmp_path / "c", **(options | {"baseline": str(llama)}), **WINDOWS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 16, "stride": 17}, "stride to at most 16"),
        ({"length": 129, "stride": 17}, "holds 128. Set length to at most 128"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path, rows, llama, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluated(perplexity, llama, tmp_path / "out", data=str(rows), **options)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path, rows):
    small = seal_decoder(make_decoder("llama", tmp_path / "small", vocabulary=20))
    with pytest.raises(ModelError, match="has 29 tokens but the model 20"):
        evaluated(perplexity, small, tmp_path / "out", data=str(rows), **WINDOWS)


def test_evaluations_repeat_themselves_and_are_sealed_as_such(tmp_path, rows, llama, other):
    for module, more in ((perplexity, {}), (divergence, {"base": str(other)})):
        name = module.__name__.removeprefix("slimline.")
        options = {"data": str(rows), **WINDOWS, **more}
        made = [step.run_on_folder(name, llama, tmp_path / name / s, options, lambda _: None) for s in "ab"]
        assert made[0] == made[1]
        kinds = [artifact.read(tmp_path / name / s) for s in "ab"]
        assert kinds[0].digest == kinds[1].digest
        assert kinds[0].format == "evaluation"


# Divergence


def test_identical_models_have_no_divergence_and_agree(tmp_path, rows, llama):
    metrics = evaluated(divergence, llama, tmp_path / "out", data=str(rows), base=str(llama), **WINDOWS)
    still = ("kl_mean", "kl_mean_low", "kl_mean_high", "kl_median", "kl_p99", "flips", "flips_lost", "flips_won")
    assert [metrics[name] for name in still] == [0] * 8
    assert metrics["agreement"] == metrics["agreement_low"] == 1
    written = table(tmp_path / "out", divergence.DIVERGENCE)
    assert written["agreed"] == written["tokens"]


def test_divergence_of_three_words_is_what_paper_and_pencil_find():
    base = np.log([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).astype(np.float32) + 7  # logits may have any offset
    model = np.log([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).astype(np.float32)
    kl, sure, agreed, was_right, is_right = divergence.compare(base, model, np.array([0, 2]))
    assert kl == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)  # 0.5 log 2 - 0.25 log 2
    assert sure == pytest.approx([0.5, 0.8], abs=1e-6)
    assert agreed.tolist() == [False, True]
    assert was_right.tolist() == [True, False]
    assert is_right.tolist() == [False, False]


def test_what_the_base_never_says_costs_nothing_and_what_it_says_and_the_model_cannot_is_infinite():
    never, even = np.array([[0.0, 0.0, -np.inf]]), np.array([[0.0, 0.0, 0.0]])
    assert divergence.compare(never, even, np.array([0]))[0] == pytest.approx([math.log(1.5)])
    assert divergence.compare(never, never, np.array([0]))[0].tolist() == [0]
    assert divergence.compare(even, never, np.array([0]))[0].tolist() == [np.inf]


def test_divergence_is_that_of_whole_texts_read_at_once(tmp_path, rows, llama, other):
    import torch

    options = {"data": str(rows), "base": str(llama), "length": 100, "stride": 100}
    metrics = evaluated(divergence, other, tmp_path / "out", **options)
    written = table(tmp_path / "out", divergence.DIVERGENCE)
    tokenizer, pair = language.Tokenizer(llama), [decoder.load(m).double() for m in (llama, other)]
    sums, largest, agreed, right = [], [], [], []
    for text in data.documents(rows, "test").texts:
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)]])
        p, q = (model(input_ids=ids[:, :-1]).logits[0].log_softmax(1).detach() for model in pair)
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
        sums, largest = [*sums, float(kl.sum())], [*largest, float(kl.max())]
        agreed.append(int((p.argmax(1) == q.argmax(1)).sum()))
        right.append([(model.argmax(1) == ids[0, 1:]).numpy() for model in (p, q)])
    assert written["kl_sum"] == pytest.approx(sums, rel=1e-5)
    assert written["kl_max"] == pytest.approx(largest, rel=1e-5)
    assert written["agreed"] == agreed
    assert metrics["kl_mean"] == pytest.approx(sum(sums) / sum(written["tokens"]), rel=1e-5)
    assert metrics["kl_mean_low"] < metrics["kl_mean"] < metrics["kl_mean_high"]
    assert metrics["kl_median"] < metrics["kl_p99"] <= max(largest) * 1.0001
    assert metrics["agreement"] == sum(agreed) / sum(written["tokens"])
    assert metrics["flips"] == sum(written["tokens"]) - sum(agreed)
    assert metrics["flips_lost"] == sum(int((was & ~now).sum()) for was, now in right)
    assert metrics["flips_won"] == sum(int((~was & now).sum()) for was, now in right)


def test_vocabularies_padded_to_different_sizes_are_compared_over_what_both_have(tmp_path, rows, llama):
    import torch
    from safetensors.torch import load_file, save_file

    padded = make_decoder("llama", tmp_path / "padded", vocabulary=64, tied=False)
    state = load_file(llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state.get(name, state["model.embed_tokens.weight"]), torch.ones(64 - 29, 64)])
    save_file(state, padded / "model.safetensors", metadata={"format": "pt"})
    metrics = evaluated(divergence, seal_decoder(padded), tmp_path / "out", data=str(rows), base=str(llama), **WINDOWS)
    assert metrics["vocabulary"] == 29
    assert metrics["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert metrics["agreement"] == 1


def test_tokens_that_mean_something_else_are_refused(tmp_path, rows, llama):
    swapped = make_decoder("llama", tmp_path / "swapped")
    file = swapped / "tokenizer.json"
    whole = json.loads(file.read_text())
    words = whole["model"]["vocab"]
    words["▁film"], words["▁plot"] = words["▁plot"], words["▁film"]
    file.write_text(json.dumps(whole))
    with pytest.raises(ModelError, match="is 'film' to one and 'plot' to the other"):
        evaluated(divergence, seal_decoder(swapped), tmp_path / "out", data=str(rows), base=str(llama), **WINDOWS)


def test_a_model_that_answers_nan_is_refused(tmp_path, rows, llama):
    from safetensors.torch import load_file, save_file

    broken = make_decoder("llama", tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    seal_decoder(broken)
    for module, more in ((perplexity, {}), (divergence, {"base": str(llama)})):
        with pytest.raises(ModelError, match="NaN or infinity"):
            evaluated(module, broken, tmp_path / module.__name__, data=str(rows), **WINDOWS, **more)
