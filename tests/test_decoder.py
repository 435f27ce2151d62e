"""Language models are read as transformers reads them, and what does not belong together is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimline import artifact, decoder, hf
from slimline.errors import ModelError
from slimline.fetch import local
from slimline.shards import Weights, Writer
from tests.decoders import KINDS, make_decoder

WORDS = 29  # in the vocabulary of tests.decoders


def answers(model, tokens_BT):
    with torch.no_grad():
        return model(input_ids=tokens_BT).logits


def tokens(windows=3, length=17, seed=0):
    return torch.randint(0, WORDS, (windows, length), generator=torch.Generator().manual_seed(seed))


def change(folder, name, make=None):
    """Replace one tensor of a folder, or remove it."""
    weights = load_file(folder / "model.safetensors")
    old = weights.pop(name, None)
    if make:
        weights[name] = make(old)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def shard(folder):
    """Split the weights of a folder into three shards with an index."""
    weights = load_file(folder / "model.safetensors")
    writer, names = Writer(folder, 3), sorted(weights)
    for part in range(3):
        writer.write(part, {name: weights[name] for name in names[part::3]})
    writer.finish()
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_says_what_transformers_says(kind, attention, tmp_path):
    more = {"sliding_window": 6} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    folder = make_decoder(kind, tmp_path / kind, layers=3, **more)
    ours = decoder.load(folder)
    if kind == "gemma2":
        assert ours.config._attn_implementation == "eager", "sdpa leaves out what caps the scores"
        attention = "eager"
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    assert (answers(ours, tokens()) - answers(theirs, tokens())).abs().max() < 1e-5
    assert decoder.is_decoder(folder) and not ours.training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision_are_computed_with_in_float32(kind, dtype, tmp_path):
    folder = make_decoder(kind, tmp_path / kind)
    half = {k: v.to(getattr(torch, dtype)) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    configure(folder, dtype=dtype)
    ours = decoder.load(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (answers(ours, tokens()) - answers(theirs, tokens())).abs().max() < 1e-5


def test_shards_say_what_one_file_says(tmp_path):
    folder = make_decoder("qwen2", tmp_path / "qwen2")
    whole = answers(decoder.load(folder), tokens())
    shard(folder)
    assert torch.equal(answers(decoder.load(folder), tokens()), whole)


def test_a_head_that_is_the_embedding_may_be_stored_beside_it_but_not_differ(tmp_path):
    folder = make_decoder("llama", tmp_path / "llama", tied=True)
    whole = answers(decoder.load(folder), tokens())
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, "lm_head.weight", lambda _: embedding.clone())
    assert torch.equal(answers(decoder.load(folder), tokens()), whole)
    change(folder, "lm_head.weight", lambda old: old + 1e-3)
    with pytest.raises(ModelError, match=r"a head of its own, but .* Set tie_word_embeddings to false"):
        decoder.load(folder)
    configure(folder, tie_word_embeddings=False)
    assert not torch.equal(answers(decoder.load(folder), tokens()), whole)


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", None, r"lacks model.norm.weight"),
        ("lm_head.weight", None, r"lacks lm_head.weight"),
        ("model.layers.0.adapter", lambda _: torch.ones(2), r"holds model.layers.0.adapter, which its family has not"),
        ("model.layers.2.mlp.up_proj.weight", lambda _: torch.ones(96, 64), r"holds model.layers.2.mlp.up_proj"),
    ],
)  # fmt: skip
def test_a_tensor_too_few_or_too_many_is_named(name, make, sentence, tmp_path):
    folder = make_decoder("llama", tmp_path / "llama", tied=False)
    change(folder, name, make)
    with pytest.raises(ModelError, match=sentence):
        decoder.load(folder)


def test_buffers_that_older_checkpoints_hold_are_left_aside(tmp_path):
    folder = make_decoder("gpt2", tmp_path / "gpt2")
    whole = answers(decoder.load(folder), tokens())
    change(folder, "transformer.h.0.attn.bias", lambda _: torch.ones(1, 1, 8, 8).tril())
    assert torch.equal(answers(decoder.load(folder), tokens()), whole)


def test_a_family_that_is_not_known_is_named(tmp_path):
    folder = make_decoder("llama", tmp_path / "llama")
    configure(folder, model_type="mamba")
    with pytest.raises(ModelError, match=r"is a mamba model. Of language models this version takes llama, mistral"):
        decoder.load(folder)


def test_layers_of_uneven_width_are_cut_to_their_weights(tmp_path):
    folder = make_decoder("llama", tmp_path / "llama")
    for name, rows in (("gate", slice(40)), ("up", slice(40)), ("down", (slice(None), slice(40)))):
        change(folder, f"model.layers.1.mlp.{name}_proj.weight", lambda old, rows=rows: old[rows].clone())
    layers = decoder.load(folder).model.layers
    assert [layer.mlp.up_proj.out_features for layer in layers] == [96, 40]


def test_what_is_saved_loads_to_the_same_and_is_stored_in_the_type_asked_for(tmp_path):
    folder = make_decoder("gemma", tmp_path / "gemma", tied=True)
    (tmp_path / "out").mkdir()
    decoder.save(decoder.load(folder), folder, tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored and {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert hf.read_config(tmp_path / "out")["dtype"] == "bfloat16"
    source = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], source[name].bfloat16()) for name in source)


BESIDE = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"eos_token_id": 0}'}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_comes_in_with_all_that_belongs_to_it(kind, tmp_path):
    folder = make_decoder(kind, tmp_path / kind)
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text("left behind")
    out = tmp_path / "out"
    out.mkdir()
    metrics = local.run(folder, out, local.Config())
    own = load_file(folder / "model.safetensors")
    assert metrics["parameters"] == sum(math.prod(t.shape) for t in own.values())
    assert (metrics["layers"], metrics["width"]) == (2, 64)
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", *BESIDE}
    assert {file.name for file in out.iterdir()} == names
    assert torch.equal(answers(decoder.load(out), tokens()), answers(decoder.load(folder), tokens()))


def test_shards_of_a_language_model_stay_shards_with_their_bytes(tmp_path):
    folder = make_decoder("mistral", tmp_path / "mistral")
    shard(folder)
    out = tmp_path / "out"
    out.mkdir()
    local.run(folder, out, local.Config())
    shards = {file.name for file in folder.glob("*.safetensors")}
    assert len(shards) == 3 and shards == {file.name for file in out.glob("*.safetensors")}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in shards)
    assert set(Weights(out).stored()) == set(Weights(folder).stored())
    artifact.seal(out, format="hf", task=decoder.TASK, labels=(), base="")
    assert torch.equal(answers(decoder.load(out), tokens()), answers(decoder.load(folder), tokens()))


def test_the_tokenizer_of_another_model_is_refused_and_an_embedding_with_rows_to_spare_is_not(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    padded = make_decoder("llama", tmp_path / "padded", vocabulary=64)
    assert local.run(padded, out, local.Config())["layers"] == 2
    other = make_decoder("llama", tmp_path / "other", vocabulary=20)
    with pytest.raises(ModelError, match=rf"knows token {WORDS - 1}, but the embedding has 20 rows"):
        local.run(other, out, local.Config())
