import json

import numpy as np
import pytest
import torch

from slimline import decoder, hf, sheets, technique, window
from slimline.attention import sliding_window
from slimline.errors import ConfigError, ModelError
from slimline.sheets import Document
from tests.decoders import make_decoder, seal_decoder

OWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "phi")


def slid(source, out, **options):
    out.mkdir()
    metrics = sliding_window.run(source, out, technique.configure(sliding_window, options))
    return decoder.load(out), metrics


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids), use_cache=False).logits


def text(length, seed=0, rows=1):
    return np.random.default_rng(seed).integers(2, 28, (rows, length))


def by_the_paper(folder, ids, size, sinks):
    """Logits [T, V] in float64: every token looks into a cache that is laid out for it, by positions in that cache."""
    from safetensors.numpy import load_file

    config = hf.read_config(folder)
    weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width, base = config["head_dim"], config["rope_parameters"]["rope_theta"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def turn(x, position):
        angle = position / base ** (np.arange(0, width, 2) / width)
        one, two = x[: width // 2], x[width // 2 :]
        return np.concatenate([one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)])

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (h @ weights[f"{at}.self_attn.{p}_proj.weight"].T for p in "qkv")
        q, k, v = (y.reshape(len(ids), -1, width) for y in (q, k, v))
        mixed = np.zeros((len(ids), heads, width))
        for t in range(len(ids)):
            cached = [j for j in range(t + 1) if j < sinks or t - j < size]  # what is still there, in order
            for head in range(heads):
                group = head * groups // heads
                keys = np.array([turn(k[j, group], place) for place, j in enumerate(cached)])
                score = keys @ turn(q[t, head], len(cached) - 1) / np.sqrt(width)
                share = np.exp(score - score.max())
                mixed[t, head] = share / share.sum() @ v[cached, group]
        x = x + mixed.reshape(len(ids), -1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{at}.mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize(("size", "sinks"), [(6, 2), (5, 0), (1, 3), (16, 4)])
def test_answers_are_those_of_the_papers_cache(size, sinks, tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", head_dim=16))
    model, metrics = slid(source, tmp_path / "out", window=size, sinks=sinks)
    ids = text(40)
    expected = by_the_paper(source, ids[0], size, sinks)
    np.testing.assert_allclose(logits(model, ids)[0].numpy(), expected, atol=5e-5)
    assert np.abs(expected - logits(decoder.load(source), ids)[0].numpy()).max() > 0.1
    assert metrics["cache_fraction"] == (size + sinks) / 128


@pytest.mark.parametrize("kind", OWN)
def test_up_to_its_size_a_window_changes_not_a_bit(kind, tmp_path):
    source = seal_decoder(make_decoder(kind, tmp_path / kind))
    model, _ = slid(source, tmp_path / "out", window=20, sinks=4)
    whole, ids = decoder.load(source), text(25, rows=2)
    assert torch.equal(logits(model, ids[:, :24]), logits(whole, ids[:, :24]))
    # The first token is seen still, a sink; only from the next one on is anything left out.
    torch.testing.assert_close(logits(model, ids)[:, :24], logits(whole, ids)[:, :24], atol=2e-5, rtol=1e-4)
    assert (logits(model, ids)[:, 24] - logits(whole, ids)[:, 24]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("pieces", [(1,) * 60, (7, 1, 30, 5, 1, 1, 15)])
def test_a_stream_says_what_the_whole_text_says(kind, pieces, tmp_path):
    source = seal_decoder(make_decoder(kind, tmp_path / kind))
    model, _ = slid(source, tmp_path / "out", window=9, sinks=3)
    ids, cache = torch.as_tensor(text(60, rows=2)), window.cache(model)
    found = list(window.stream(model, ids.split(list(pieces), dim=1), cache))
    ends = np.cumsum(pieces) - 1
    torch.testing.assert_close(torch.stack(found, 1), logits(model, ids)[:, ends], atol=5e-5, rtol=1e-3)


def test_a_cache_that_grows_gives_the_same(tmp_path):
    from transformers import DynamicCache

    source = seal_decoder(make_decoder("llama", tmp_path / "source"))
    model, _ = slid(source, tmp_path / "out", window=9, sinks=3)
    ids, cache = torch.as_tensor(text(40)), DynamicCache(config=model.config)
    with torch.no_grad():
        found = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(8, dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), logits(model, ids), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_text_longer_than_the_context_takes_no_more_memory_and_is_read_as_if_it_fitted(kind, tmp_path):
    source = seal_decoder(make_decoder(kind, tmp_path / "short", positions=32))
    model, _ = slid(source, tmp_path / "a", window=9, sinks=3)
    longer = seal_decoder(make_decoder(kind, tmp_path / "long", positions=256))
    expected = logits(slid(longer, tmp_path / "b", window=9, sinks=3)[0], text(200))[0]
    cache, sizes, found, places = window.cache(model), [], [], []
    for answer in window.stream(model, torch.as_tensor(text(200)).split(1, dim=1), cache):
        found.append(answer[0])
        sizes.append(window.cached_bytes(cache))
        places.append(cache.get_seq_length())
    torch.testing.assert_close(torch.stack(found), expected, atol=2e-4, rtol=1e-3)
    groups = 2 if kind == "llama" else 4
    assert set(sizes[11:]) == {
        2 * 2 * groups * 16 * 4 * 11
    }  # K and V, 2 layers, groups, width, bytes, 3 + 9 - 1 tokens
    assert max(places) == 32 and places.count(13) > 5


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_documents_have_sinks_of_their_own(kind, tmp_path):
    model, _ = slid(seal_decoder(make_decoder(kind, tmp_path / kind)), tmp_path / "out", window=5, sinks=2)
    documents = [Document(text(23, seed)[0].tolist()) for seed in (1, 2)]
    laid = sheets.lay(documents, 50)
    with torch.no_grad():
        given = sheets.inputs(model, torch.from_numpy(laid.ids_NT), torch.from_numpy(laid.positions_NT))
        together = model(**given).logits[0]
    for at, (ids, _) in zip((0, 23), documents):
        torch.testing.assert_close(together[at : at + 23], logits(model, [ids])[0], atol=5e-5, rtol=1e-3)


def test_padding_is_refused_rather_than_read(tmp_path):
    model, _ = slid(seal_decoder(make_decoder("llama", tmp_path / "a")), tmp_path / "out", window=5, sinks=2)
    ids, whole = torch.as_tensor(text(12)), torch.ones(1, 12, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=whole, use_cache=False).logits, logits(model, ids))
        with pytest.raises(ModelError, match="takes no padding"):
            model(input_ids=ids, attention_mask=whole.index_fill(1, torch.tensor([0]), 0), use_cache=False)


def test_transformers_own_generation_agrees_with_the_stream(tmp_path):
    model, _ = slid(seal_decoder(make_decoder("llama", tmp_path / "a")), tmp_path / "out", window=5, sinks=2)
    ids = torch.as_tensor(text(9))
    said = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache, given = window.cache(model), ids
    for _ in range(20):
        (answer,) = window.stream(model, [given], cache)
        given = answer.argmax(1, keepdim=True)
        ids = torch.cat([ids, given], dim=1)
    assert torch.equal(said, ids)


def test_a_window_can_be_trained_through(tmp_path):
    model, _ = slid(seal_decoder(make_decoder("llama", tmp_path / "a")), tmp_path / "out", window=5, sinks=2)
    model.requires_grad_(True)
    model(input_ids=torch.as_tensor(text(30)), use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["mistral", "phi3", "qwen2", "qwen3", "gemma2"])
def test_without_sinks_it_is_the_familys_own_window_in_plain_transformers(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    source = seal_decoder(make_decoder(kind, tmp_path / kind, layers=1))
    model, _ = slid(source, tmp_path / "out", window=6, sinks=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    whole, ids = decoder.load(source), text(20)
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model, ids)[:, :6], logits(whole, ids)[:, :6], atol=1e-5, rtol=1e-4)
    changed = ids.copy()
    changed[0, 3] = 29 - changed[0, 3]  # one layer: what lies before the window has no way to the last tokens
    moved = (logits(model, changed) - logits(model, ids)).abs().amax(2)[0]
    assert moved[3] > 1e-3 and moved[9:].max() < 1e-5
    assert (logits(whole, changed) - logits(whole, ids)).abs()[0, 9:].max() > 1e-4
    assert window.WINDOW not in hf.read_config(tmp_path / "out")


def test_what_cannot_have_sinks_is_refused(tmp_path):
    for kind in ("gpt2", "opt", "gemma2", "gemma3_text"):
        with pytest.raises(ModelError, match="sinks need rotary positions"):
            slid(seal_decoder(make_decoder(kind, tmp_path / kind)), tmp_path / f"{kind}-out", window=8)
    source = seal_decoder(make_decoder("llama", tmp_path / "llama"))
    with pytest.raises(ConfigError, match="are 128 tokens, and .* holds 128 anyway"):
        slid(source, tmp_path / "large", window=124, sinks=4)
    slid(source, tmp_path / "once", window=32)
    assert slid(tmp_path / "once", tmp_path / "twice", window=16)[1]["window"] == 16
    with pytest.raises(ConfigError, match="has a window of 32 already"):
        slid(tmp_path / "once", tmp_path / "wider", window=33)
    values = json.loads((source / "config.json").read_text())
    values["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="dynamic positions change with the length"):
        window.check(values, "the model")


def test_weights_stay_as_they_are(tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source"))
    slid(source, tmp_path / "out", window=8)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert {p.name for p in source.iterdir()} - {p.name for p in (tmp_path / "out").iterdir()} == {"manifest.json"}


@pytest.mark.parametrize("export", ["onnx", "genai", "gguf"])
def test_no_exporter_drops_the_window_in_silence(export, tmp_path):
    slid(seal_decoder(make_decoder("llama", tmp_path / "m")), tmp_path / "slid", window=16, sinks=4)
    module = technique.find(f"export.{export}")
    options = {"data": "unread"} if "data" in module.Config.model_fields else {}
    with pytest.raises(ModelError, match="a window of 16 tokens behind 4 sinks, of which .* knows nothing"):
        module.run(tmp_path / "slid", tmp_path / "out", technique.configure(module, options))


def test_a_model_with_a_window_writes_on_within_bounded_memory(tmp_path):
    from slimline import artifact, language

    slid(seal_decoder(make_decoder("llama", tmp_path / "m")), tmp_path / "slid", window=16, sinks=4)
    artifact.seal(tmp_path / "slid", format="hf", task=decoder.TASK, labels=(), base="made for a test")
    model = language.load(tmp_path / "slid")
    state = model.prefill([list(range(2, 26))], room=60)
    for _ in range(60):
        state = model.step(state)
    assert state.cache.layers[0].keys.shape[2] <= 16 + 4
