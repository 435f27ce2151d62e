import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from slimline import artifact, chat, language, probe, serve
from slimline.errors import DataError, ModelError
from slimline.sampling import Sampling
from tests.decoders import make_decoder, seal_decoder

PROMPTS = ["the film is", "a long and very dull story with a bright end and", "plot", ""]
SHORT = Sampling.of({"max_tokens": 12})
HELLO = [{"role": "user", "content": "the film is fine"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return seal_decoder(make_decoder("llama", tmp_path_factory.mktemp("llama") / "model", seed=3))


@pytest.fixture(scope="module")
def model(folder):
    return language.load(folder, threads=1)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model that may be changed; sealing it again is the test's part."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    return tmp_path / "model"


def greedy(model, prompt, count):
    """The likeliest continuation, by reading everything again for each token."""
    ids = model.encode(prompt)
    made = []
    while len(made) < count:
        token = int(model.logits([ids + made])[0, -1].argmax())
        if token in model.ends:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "phi", "mistral"])
def test_an_answer_is_the_likeliest_token_again_and_again(kind, tmp_path):
    one = language.load(seal_decoder(make_decoder(kind, tmp_path / "model", seed=5)), threads=1)
    for prompt in PROMPTS[:2]:
        ids = one.encode(prompt)
        assert list(one.continuation(ids, SHORT)) == greedy(one, prompt, 12)


def test_prompts_of_uneven_length_are_answered_together_as_alone(model):
    together = model.generate(PROMPTS, SHORT)
    assert together == [model.generate([prompt], SHORT)[0] for prompt in PROMPTS]
    drawn = Sampling.of({"max_tokens": 12, "temperature": 1.0, "seed": 4})
    assert model.generate(PROMPTS, drawn) == [model.generate([prompt], drawn)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, drawn) != together


def test_a_stream_is_the_answer_in_pieces(model):
    parts = list(model.stream(PROMPTS[0], SHORT))
    assert len(parts) > 1
    assert "".join(parts) == model.generate(PROMPTS[:1], SHORT)[0]
    assert parts[0].startswith(" ")  # the prompt's end is known, so the space between is not lost


def test_a_stop_ends_the_answer_and_is_not_part_of_it(model):
    whole = model.generate(PROMPTS[:1], SHORT)[0]
    stop = whole.split()[3]
    found = model.generate(PROMPTS[:1], Sampling.of({"max_tokens": 12, "stop": stop}))[0]
    assert found == whole[: whole.index(stop)]


def test_reading_step_by_step_gives_the_logits_of_reading_at_once(model):
    ids = model.encode(PROMPTS[1])
    at_once = model.logits([ids])[0]
    state = model.prefill([ids[:4]], room=len(ids))
    for at in range(4, len(ids)):
        np.testing.assert_allclose(state.logits_BV[0], at_once[at - 1], atol=1e-4)
        state = model.step(state, ids[at])
    assert state.length == len(ids)


def test_several_texts_of_one_length_go_on_together(model):
    rows = [[3, 4, 5, 6], [9, 8, 7, 6]]
    state = model.step(model.prefill(rows, room=4))
    for row, logits in zip(rows, state.logits_BV):
        alone = model.step(model.prefill([row], room=4))
        np.testing.assert_allclose(logits, alone.logits_BV[0], atol=1e-4)


def test_a_prompt_with_no_room_for_an_answer_is_refused_with_both_numbers(model):
    with pytest.raises(DataError, match=r"100 tokens, and 40 more .* holds 128"):
        model.generate(["the " * 99 + "the"], Sampling.of({"max_tokens": 40}))
    with pytest.raises(DataError, match=r"300 tokens, and 1 more .* holds 128"):
        model.generate(["the " * 299 + "the"])
    assert isinstance(model.generate(["the " * 99 + "the"])[0], str)  # without a wish, what the context leaves


def test_there_is_no_step_beyond_the_room(model):
    state = model.step(model.prefill([[3, 4]], room=1))
    with pytest.raises(DataError, match="room for 3 tokens"):
        model.step(state)


def test_an_end_token_ends_an_answer(copy):
    values = json.loads((copy / "config.json").read_text())
    first = greedy(language.load(seal_decoder(copy)), PROMPTS[0], 3)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first[2]]}))
    model = language.load(seal_decoder(copy))
    assert model.ends == {values["eos_token_id"], first[2]}
    assert list(model.continuation(model.encode(PROMPTS[0]), SHORT)) == first[: first.index(first[2])]


# Chats


def test_a_chat_is_rendered_by_the_models_template(folder, model):
    assert chat.render(folder, HELLO) == "user the film is fine <|end|> "
    assert model.chat(HELLO, SHORT) == model.generate([HELLO], SHORT)[0]
    assert model.encode(HELLO) == model.tokenizer.encode("user the film is fine <|end|> ")


def test_without_a_template_a_chat_is_refused_and_a_text_is_answered(copy):
    (copy / "tokenizer_config.json").write_text("{}")
    model = language.load(seal_decoder(copy))
    with pytest.raises(ModelError, match="no chat template"):
        model.chat(HELLO, SHORT)
    assert isinstance(model.generate(PROMPTS[:1], SHORT)[0], str)


@pytest.mark.parametrize(
    ("template", "kind", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", ModelError, "cannot render"),
        ("{{ messages.append(1) }}", ModelError, "cannot render"),
        ("{% for %}", ModelError, "cannot render"),
        ("{{ raise_exception('roles must alternate') }}", DataError, "roles must alternate"),
        ("{{ nothing.at.all }}", ModelError, "cannot render"),
    ],
)
def test_a_template_can_neither_reach_out_nor_fail_loudly(copy, template, kind, words):
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(kind, match=words) as error:
        chat.render(copy, HELLO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", ["hello", [], [{"role": "user"}], [{"role": "user", "content": None}], ["hello"]])
def test_what_is_no_list_of_messages_is_refused(model, messages):
    with pytest.raises(DataError, match="message"):
        model.chat(messages)


# As MLflow asks, and the mechanical blessing


@pytest.mark.parametrize("given", [PROMPTS[:2], pd.DataFrame({"text": PROMPTS[:2]}), pd.Series(PROMPTS[:2])])
def test_mlflow_gets_a_table_of_text(folder, model, given):
    table = serve._load_pyfunc(str(folder)).predict(given, {"max_tokens": 12, "stop": np.array([], dtype=object)})
    assert list(table.columns) == ["generated"]
    assert table["generated"].tolist() == model.generate(PROMPTS[:2], SHORT)


def test_mlflow_may_chat_and_stream(folder, model):
    asked = serve._load_pyfunc(str(folder))
    settings = {"max_tokens": 12, "chat": True}
    expected = model.chat(HELLO, SHORT)
    assert asked.predict(["the film is fine"], settings)["generated"].tolist() == [expected]
    assert "".join(asked.predict_stream(json.dumps(HELLO), settings)) == expected


def test_a_language_model_gives_no_labels(folder):
    with pytest.raises(ModelError, match="language model"):
        serve.load(folder)


def test_a_sound_model_is_blessed(folder):
    found = probe.probe(folder)
    assert (found["ok"], found["problem"]) == (True, "")
    assert found["digest"] == artifact.read(folder).digest


def test_a_model_that_says_nothing_finite_is_not_blessed(copy):
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    found = probe.probe(seal_decoder(copy))
    assert not found["ok"] and "not finite" in found["problem"]


def test_memory_is_measured_in_a_process_that_writes(folder):
    done = subprocess.run(
        [sys.executable, "-m", "slimline.probe", str(folder), "1"], input='[[[2, 3, 4]]]',
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) > 100_000_000


@pytest.mark.parametrize(
    ("history", "allowed"),
    [
        (("fetch.local",), probe.TOLERANCE),
        (("fetch.local", "export.genai"), probe.TOLERANCE),
        (("quantize.gptq",), probe.TOLERANCE),
        (("quantize.gptq", "export.genai"), probe.ROUNDED_TOLERANCE),
        (("quantize.smoothquant",), probe.ROUNDED_TOLERANCE),
    ],
)
def test_only_models_that_round_activations_may_move_further_in_company(history, allowed):
    stages = [artifact.Stage(technique=t, config={"accuracy_level": 4}, metrics={}, parent="") for t in history]
    manifest = artifact.Manifest(
        format="hf", task="text-generation", labels=(), base="", digest="", files={}, history=tuple(stages)
    )
    assert probe.allowed(manifest) == allowed
