import json

import numpy as np
import pytest
import torch

from slimline import artifact, decoder, language, sheets, speech, technique, tuition
from slimline.distill import on_policy, sequences
from slimline.errors import DataError
from tests.decoders import make_decoder, seal_decoder
from tests.taught import QUICK, known_documents, shortened_student, taught_teacher  # noqa: F401  fixtures

COMMON = {key: value for key, value in QUICK.items() if key not in ("length", "kept")}
COMMON |= {"prompt": 8, "answer": 16}


def config(module, data, teacher, **options):
    return technique.configure(module, {"data": str(data), "teacher": str(teacher), **COMMON, **options})


def run(module, source, out, data, teacher, **options):
    out.mkdir()
    return module.run(source, out, config(module, data, teacher, **options))


def test_a_number_falls_on_the_token_whose_share_it_lies_in():
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(6, 3)
    drawn = torch.tensor([0.0, 0.49, 0.51, 0.69, 0.71, 0.999999])
    assert speech.draw(logits, drawn).tolist() == [0, 0, 1, 1, 2, 2]
    zero = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert speech.draw(zero, torch.tensor([0.0])).tolist() == [1]


def test_going_on_takes_the_likeliest_token_after_all_before_it(tmp_path):
    model = decoder.load(make_decoder("llama", tmp_path / "llama"))
    prompts = torch.tensor([[3, 9, 4], [8, 2, 6]])
    answers, real = speech.go_on(model, prompts, 5)
    whole = torch.cat([prompts, answers], dim=1)
    with torch.no_grad():
        assert torch.equal(model(whole).logits[:, 2:-1].argmax(2), answers)
    assert real.all()
    drawn = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    both, _ = speech.go_on(model, prompts, 5, drawn_BA=drawn)
    alone, _ = speech.go_on(model, prompts[1:], 5, drawn_BA=drawn[1:])
    assert torch.equal(both[1:], alone)


def test_nothing_is_real_behind_the_end(tmp_path):
    model = decoder.load(make_decoder("llama", tmp_path / "llama"))
    prompts = torch.tensor([[3, 9, 4], [8, 2, 6]])
    free, _ = speech.go_on(model, prompts, 6)
    end = int(free[0, 2])
    answers, real = speech.go_on(model, prompts, 6, end=end)
    for row in range(2):
        stop = free[row].tolist().index(end) + 1 if end in free[row].tolist() else 6
        assert answers[row, :stop].tolist() == free[row, :stop].tolist()
        assert real[row].tolist() == [True] * stop + [False] * (6 - stop)
    beamed, there = speech.beam(model, prompts, 6, end, 3)
    assert beamed.shape == there.shape == (2, 6)


def test_a_beam_finds_an_answer_at_least_as_likely_as_the_greedy_one(tmp_path):
    model = decoder.load(make_decoder("llama", tmp_path / "llama"))
    prompts = torch.tensor([[3, 9, 4], [8, 2, 6], [5, 5, 7]])

    def said(answers):
        whole = torch.cat([prompts, answers], dim=1)
        with torch.no_grad():
            log_p = model(whole).logits[:, 2:-1].log_softmax(2)
        return log_p.gather(2, answers.unsqueeze(2)).sum((1, 2))

    greedy, _ = speech.go_on(model, prompts, 4)
    beamed, _ = speech.beam(model, prompts, 4, None, 8)
    assert (said(beamed) >= said(greedy) - 1e-4).all() and (said(beamed) > said(greedy) + 1e-3).any()


@pytest.mark.parametrize("options", [{"own_text": 1.0, "divergence": "reverse"}, {"own_text": 0.5}])
def test_a_student_learns_from_what_its_teacher_says_to_its_own_text(options, tmp_path, data, teacher, student):
    metrics = run(on_policy, student, tmp_path / "out", data, teacher, steps=24, **options)
    assert metrics["validation_loss"] < metrics["validation_loss_before"] - 0.3
    assert not (tmp_path / "out" / "work").exists()


def test_own_text_and_documents_take_turns_and_only_answers_count(tmp_path, data, teacher, student):
    plan = config(on_policy, data, teacher, own_text=0.3)
    texts = [list(range(2, 22)), list(range(2, 27))]
    course = on_policy.Speaking([*texts, [1, 2]], 0, decoder.load(teacher), plan)
    model = decoder.load(student)
    turns = [course.speaks(step) for step in range(200)]
    assert 0.2 < np.mean(turns) < 0.4 and len(course) == 2
    read = course.batch(model, turns.index(False), [0, 1])
    assert read.ids_BT[0].tolist() == texts[0] + [0] * 4 and read.ids_BT[1].tolist() == texts[1][:24]
    assert read.counted_BT.sum(1).tolist() == [12, 16] and not read.counted_BT[:, :7].any()
    step = turns.index(True)
    own, again, alone = (course.batch(model, step, rows) for rows in ([0, 1], [0, 1], [1]))
    assert torch.equal(own.ids_BT, again.ids_BT) and torch.equal(own.ids_BT[1:], alone.ids_BT)
    assert own.ids_BT[:, :8].tolist() == [text[:8] for text in texts] and own.ids_BT[1].tolist() != texts[1][:24]


def test_the_loss_on_own_text_is_the_divergence_over_the_whole_vocabulary(tmp_path, data, teacher, student):
    plan = config(on_policy, data, teacher, own_text=0.0, divergence="reverse", temperature=2.0)
    shown, model = decoder.load(teacher), decoder.load(student)
    course = on_policy.Speaking([list(range(2, 22))], 0, shown, plan)
    batch = course.batch(model, 0, [0])
    with torch.no_grad():
        mine, theirs = (m(batch.ids_BT, use_cache=False).logits[0, 7:19].double().numpy() for m in (model, shown))
        q, p = (np.exp(x / 2) / np.exp(x / 2).sum(1, keepdims=True) for x in (mine, theirs))
        found = course.loss(model(batch.ids_BT, use_cache=False).logits, batch)
    assert float(found) == pytest.approx(4 * (q * np.log(q / p)).sum(), rel=1e-4)


def test_documents_shorter_than_a_prompt_are_no_course(tmp_path, data, teacher, student):
    for module in (on_policy, sequences):
        with pytest.raises(DataError, match="no document is longer than the 500 tokens of a prompt"):
            run(module, student, tmp_path / module.__name__, data, teacher, prompt=500)


@pytest.mark.parametrize("speaking", ["greedy", "sample", "beam"])
def test_a_student_learns_to_say_what_its_teacher_says(speaking, tmp_path, data, teacher, student):
    metrics = run(sequences, student, tmp_path / "out", data, teacher, speaking=speaking, steps=20, length=64, beams=2)
    assert metrics["validation_loss"] < metrics["validation_loss_before"] - 0.1
    prompts = torch.tensor([language.Tokenizer(teacher).encode("the film was very long")])
    told, _ = speech.go_on(decoder.load(teacher), prompts, 8)
    before, after = (speech.go_on(decoder.load(folder), prompts, 8)[0] for folder in (student, tmp_path / "out"))
    if speaking == "greedy":
        assert (after == told).sum() >= (before == told).sum()


def test_what_the_teacher_said_is_used_again_and_chunks_that_are_missing_are_said_again(tmp_path, data, teacher):
    plan = config(sequences, data, teacher, speaking="sample", answers=2, answer=6)
    first = sequences.speak(plan, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    files = sorted(folder.iterdir())
    before = {file: file.read_bytes() for file in files}
    files[2].unlink()
    assert sequences.speak(plan, tmp_path / "cache") == first
    assert {file: file.read_bytes() for file in files} == before
    prompts = [prompt for prompt, _, _ in first]
    assert prompts[::2] == prompts[1::2] and first[::2] != first[1::2]
    other = sequences.speak(config(sequences, data, teacher, speaking="sample", answers=2, answer=6, seed=1), tmp_path)
    assert other != first and [p for p, _, _ in other] == prompts


def test_a_student_of_another_vocabulary_learns_the_answer_and_not_the_prompt(tmp_path, data, teacher):
    source = make_decoder("llama", tmp_path / "other")
    values = json.loads((source / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = dict(zip(vocabulary, [0, 1, *range(len(vocabulary) - 1, 1, -1)]))
    (source / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = language.Tokenizer(source)
    ids, start = sequences.understand(tokenizer, "the film was", " very long", True)
    assert tokenizer.decode(ids[:start]) == "the film was" and tokenizer.decode(ids[start:]) == "very long"
    assert ids[-1] == tokenizer.eos and ids[0] != language.Tokenizer(teacher).encode("the")[0]
    counted = sheets.lay([sheets.Document(ids, start)], 8).counted_NT
    assert counted.sum() == 3
    metrics = run(sequences, seal_decoder(source), tmp_path / "out", data, teacher, steps=6, length=64)
    assert metrics["validation_loss"] < metrics["validation_loss_before"]


@pytest.mark.parametrize("module", [on_policy, sequences])
def test_speaking_repeats_itself(module, tmp_path, data, teacher, student):
    for side in "ab":
        run(module, student, tmp_path / side, data, teacher, steps=3)
    assert artifact.digest(tmp_path / "a") == artifact.digest(tmp_path / "b")


def test_a_course_that_forgets_layers_still_speaks_with_a_cache(tmp_path, data, teacher, student):
    run(on_policy, student, tmp_path / "a", data, teacher, steps=3, own_text=1.0)
    run(on_policy, student, tmp_path / "b", data, teacher, steps=3, own_text=1.0, recompute=True)
    one, other = (decoder.load(tmp_path / side).state_dict() for side in "ab")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)
    assert tuition.precision(config(on_policy, data, teacher, precision="bf16")) == "bf16"
