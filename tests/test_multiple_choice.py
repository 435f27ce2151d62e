import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from slimline import artifact, data, evidence, harness, language, step, taskfile, technique
from slimline.errors import DataError
from slimline.evaluate import multiple_choice
from tests.decoders import WORDS, make_decoder, seal_decoder

EXAMPLE = Path(__file__).parent.parent / "examples" / "smollm"
TASK = """
task: films
dataset_path: json
dataset_kwargs: {data_files: {test: films.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
"""
FILMS = [
    {"id": "a", "question": "the film was", "choices": ["fine", "dull"], "answer": 0, "better": 1},
    {"id": "b", "question": "the plot was", "choices": ["dull", "fine", "cold"], "answer": 0, "better": 3},
    {"id": "c", "question": "the end was", "choices": ["a", "superb superb"], "answer": 1, "better": 0},
]
LIKES = {"fine": 4.0, "superb": 3.0, "a": 2.0, "dull": 1.0}
"""Logits of words, whatever came before; all others have 0."""


def make_task(folder, text=TASK, rows=FILMS):
    folder.mkdir()
    (folder / "films.yaml").write_text(text)
    (folder / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make_opinionated(folder, likes=LIKES):
    """A llama that says words by how much it likes them: layers add nothing, and every word enters as ones."""
    import torch
    from safetensors.torch import load_file, save_file

    make_decoder("llama", folder, tied=False)
    state = load_file(folder / "model.safetensors")
    for name, weight in state.items():
        if "o_proj" in name or "down_proj" in name:
            weight.zero_()
        elif "norm" in name or "embed" in name:
            weight.fill_(1)
    logits = torch.tensor([likes.get(word, 0.0) for word in WORDS])
    state["lm_head.weight"] = (logits / 64)[:, None].repeat(1, 64)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return seal_decoder(folder)


def log_likelihood(words, likes=LIKES):
    total = math.log(sum(math.exp(likes.get(word, 0.0)) for word in WORDS))
    return sum(likes.get(word, 0.0) - total for word in words.split())


def evaluated(model, out, **options):
    out.mkdir()
    return multiple_choice.run(model, out, technique.configure(multiple_choice, options))


def table(folder):
    return pq.read_table(folder / multiple_choice.PREDICTIONS).to_pydict()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_opinionated(tmp_path_factory.mktemp("model") / "opinionated")


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path / "task")


def test_a_model_of_known_likes_answers_by_them(tmp_path, model, task):
    metrics = evaluated(model, tmp_path / "out", task=str(task), metric="acc")
    written = table(tmp_path / "out")
    assert written["id"] == ["a", "b", "c"]
    assert written["text"] == [row["question"] for row in FILMS]
    assert written["label"] == ["A", "A", "B"]
    assert written["predicted"] == ["A", "B", "A"]
    assert written["choices"] == [row["choices"] for row in FILMS]
    assert written["length_tokens"] == [3, 3, 3]
    for row, question in enumerate(FILMS):
        likely = [log_likelihood(choice) for choice in question["choices"]]
        found = [written[f"logit_{i}"][row] for i in range(3)]
        assert found == [pytest.approx(x, abs=1e-5) for x in likely] + [None] * (3 - len(likely))
    assert written["score"][0] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-5)
    assert metrics["acc"] == metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert metrics["accuracy_low"] < 1 / 3 < metrics["accuracy_high"]


def test_long_choices_are_judged_by_the_character_if_so_asked(tmp_path, model, task):
    metrics = evaluated(model, tmp_path / "out", task=str(task))
    short, long = log_likelihood("a"), log_likelihood("superb superb")
    assert short > long and short / 1 < long / len("superb superb")
    assert table(tmp_path / "out")["predicted"] == ["A", "B", "B"]
    assert metrics["accuracy"] == metrics["acc_norm"] == pytest.approx(2 / 3)
    assert metrics["acc"] == pytest.approx(1 / 3)


def test_a_template_may_be_anything_that_calls_nothing(tmp_path, model):
    rows = [{"q": "film", "c": {"label": ["X", "Y"], "text": ["cold", "fine"]}, "key": "Y"}]
    text = TASK.replace("question", "\"the {{q}}{{ ' was' if q }}\"").replace("choices", '"{{c.text}}"')
    text = text.replace("doc_to_target: answer", 'doc_to_target: "{{c.label.index(key)}}"')
    metrics = evaluated(model, tmp_path / "out", task=str(make_task(tmp_path / "task", text, rows)))
    written = table(tmp_path / "out")
    assert (written["id"], written["text"], written["label"]) == (["0"], ["the film was"], ["B"])
    assert written["logit_1"] == [pytest.approx(log_likelihood("fine"), abs=1e-5)]
    assert metrics["accuracy"] == 1


def test_a_template_that_reaches_for_code_is_refused(tmp_path, model):
    from lm_eval import utils

    before, variables = utils.env, dict(os.environ)
    trap = tmp_path / "trap"
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    call = f"{{{{ cycler.__init__.__globals__.os.mkdir('{trap}') }}}}"
    for number, template in enumerate((reach, call)):
        text = TASK.replace("doc_to_text: question", f'doc_to_text: "{template}"')
        with pytest.raises(DataError, match="unsafe"):
            harness.ask(language.load(model), make_task(tmp_path / str(number), text))
    assert not trap.exists()
    assert utils.env is before, "the harness is left as it was"
    assert dict(os.environ) == variables


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("process_docs: !function films.evil", "!function.*code, which no task may bring"),
        ("doc_to_text: !function films.evil", "!function.*code"),
        ("metadata: !!python/object/apply:os.getcwd []", "python/object/apply.*code"),
        ("include: /etc/passwd.yaml", "sets 'include', which this version does not take"),
        ("process_docs: films.evil", "sets 'process_docs'"),
        ("custom_dataset: films.evil", "sets 'custom_dataset'"),
        ("use_prompt: promptsource:x", "sets 'use_prompt'"),
        ("dataset_path: allenai/ai2_arc", "from 'allenai/ai2_arc'. Only local files"),
        ("dataset_path: films.py", "Only local files"),
        ("dataset_kwargs: {data_files: {test: ../task/../secret.jsonl}}", "no file in its folder"),
        ("dataset_kwargs: {data_files: {test: 'https://example.org/films.jsonl'}}", "no file in its folder"),
        ("dataset_kwargs: {data_files: films.jsonl}", "Only local files are read"),
        ("test_split: validation", "test_split is 'validation', but data_files has test"),
        ("output_type: generate_until", "output_type is 'generate_until'. Set multiple_choice"),
        ("metric_list: [{metric: bleu}]", "the metric 'bleu'. This version computes acc and acc_norm"),
        ("doc_to_choice: 3", "doc_to_choice is 3"),
        ("num_fewshot: 1000000", "from 0 to 64"),
        ("doc_to_text: '{{nowhere}}'", "'nowhere' is undefined"),
        ("doc_to_target: 7", "does not fit its data: list index out of range"),
        ("doc_to_target: 2", "does not fit its data: list index out of range"),
        ("doc_to_target: better", "question 1 has the answer 3 and 3 choices"),
    ],
)
def test_what_a_task_from_outside_may_not_ask_for_is_refused(tmp_path, model, line, said):
    key = line.partition(":")[0]
    kept = [row for row in TASK.strip().split("\n") if not row.startswith(f"{key}:")]
    (tmp_path / "secret.jsonl").write_text("{}")
    folder = make_task(tmp_path / "task", "\n".join([*kept, line]))
    (folder / "films.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nevil = None")
    with pytest.raises(DataError, match=said):
        evaluated(model, tmp_path / "out", task=str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_one_task_file_is_refused(tmp_path, model, task):
    (task / "films.yaml").rename(task / "films.txt")
    with pytest.raises(DataError, match="has 0 YAML files"):
        evaluated(model, tmp_path / "out", task=str(task))


def test_answers_are_those_of_every_choice_read_alone_by_torch(tmp_path, task):
    import torch

    from slimline import decoder

    made = seal_decoder(make_decoder("qwen2", tmp_path / "model"))
    evaluated(made, tmp_path / "out", task=str(task))
    written, tokenizer, double = table(tmp_path / "out"), language.Tokenizer(made), decoder.load(made).double()
    for row, question in enumerate(FILMS):
        for number, choice in enumerate(question["choices"]):
            ids = torch.tensor(tokenizer.encode(f"{question['question']} {choice}"))
            answer = double(input_ids=ids[None, :-1]).logits[0].log_softmax(1)
            alone = float(answer[torch.arange(2, len(ids) - 1), ids[3:]].sum())
            assert written[f"logit_{number}"][row] == pytest.approx(alone, abs=1e-5)


def test_few_shots_stand_before_the_question(tmp_path, model):
    text = TASK.replace("{test: films.jsonl}", "{test: films.jsonl, train: more.jsonl}")
    folder = make_task(tmp_path / "task", f"{text}fewshot_split: train\nnum_fewshot: 1\nfewshot_delimiter: ' | '\n")
    (folder / "more.jsonl").write_text(json.dumps(FILMS[0] | {"question": "a scene was"}))
    evaluated(model, tmp_path / "out", task=str(folder), limit=2)
    assert table(tmp_path / "out")["text"] == ["a scene was fine | the film was", "a scene was fine | the plot was"]


def test_too_long_a_prompt_is_cut_on_the_left(model):
    loaded = language.load(model)
    whole = harness.log_likelihoods(loaded, [([3] * 127, [2, 7])])
    longer = harness.log_likelihoods(loaded, [([4] * 500 + [3] * 127, [2, 7])])
    assert whole == longer
    assert whole[0][0] == pytest.approx(log_likelihood(" ".join((WORDS[2], WORDS[7]))), abs=1e-5)
    assert [answer[1] for answer in harness.log_likelihoods(loaded, [([3], [2, 2]), ([3], [2, 7])])] == [True, False]


def test_only_texts_of_one_length_are_read_together():
    made = harness.batches([5, 400, 5, 400, 400, 2000])
    assert made == [[5], [1, 3], [4], [0, 2]]


def test_a_baseline_is_compared_question_by_question(tmp_path, model, task):
    evaluated(model, tmp_path / "base", task=str(task), metric="acc")
    base = {"task": str(task), "metric": "acc", "baseline": str(tmp_path / "base")}
    still = evaluated(model, tmp_path / "same", **base)
    assert [still[k] for k in ("agreement", "flips_lost", "flips_won", "kl_mean")] == [1, 0, 0, 0]
    other = make_opinionated(tmp_path / "other", {"dull": 2.0, "a": 1.0})
    moved = evaluated(other, tmp_path / "moved", **base)
    assert table(tmp_path / "moved")["predicted"] == ["B", "A", "A"]
    assert (moved["agreement"], moved["flips_lost"], moved["flips_won"]) == (pytest.approx(1 / 3), 1, 1)
    fine = 1 / (1 + math.exp(-3))
    even = [math.log(1 / (1 + math.exp(2))), math.log(1 / (1 + math.exp(-2)))]
    first = fine * (math.log(fine) - even[0]) + (1 - fine) * (math.log(1 - fine) - even[1])
    pair = [
        np.array([t[f"logit_{i}"][0] for i in (0, 1)]) for t in (table(tmp_path / "base"), table(tmp_path / "moved"))
    ]
    assert multiple_choice.divergence(*pair) == pytest.approx(first, abs=1e-5)
    assert moved["kl_mean"] > 0
    with pytest.raises(DataError, match="answered 3 questions which are not the 2"):
        evaluated(model, tmp_path / "fewer", **base, limit=2)
    with pytest.raises(DataError, match="no questions with choices"):
        evaluated(model, tmp_path / "none", **(base | {"baseline": str(model)}))


def test_answers_are_the_gates_evidence(tmp_path, model, task):
    evaluated(model, tmp_path / "out", task=str(task))
    answers = evidence.predictions(tmp_path / "out")
    assert (list(answers.labels), list(answers.predicted)) == (["A", "A", "B"], ["A", "B", "B"])
    assert answers.slices["label:A"].tolist() == [True, True, False]


def test_two_runs_of_the_step_are_the_same(tmp_path, model, task):
    made = [
        step.run_on_folder("evaluate.multiple_choice", model, tmp_path / side, {"task": str(task)}, lambda _: None)
        for side in "ab"
    ]
    assert made[0] == made[1]
    assert artifact.read(tmp_path / "a").digest == artifact.read(tmp_path / "b").digest
    assert "data" not in made[0] and artifact.read(tmp_path / "a").format == "evaluation"


def test_the_examples_questions_are_those_that_its_script_makes():
    spec = importlib.util.spec_from_file_location("make_choices", EXAMPLE / "make_choices.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = data.documents(EXAMPLE / "newspaper.parquet", "test")
    settings, splits = taskfile.read(EXAMPLE / "choices")
    assert splits["test"] == script.questions(found.ids, found.texts)
    texts = dict(zip(found.ids, found.texts))
    for row in splits["test"]:
        own = texts[row["id"].partition("_")[0]]
        assert [choice in own for choice in row["choices"]].index(True) == row["label"]
        assert row["context"] in own and len(set(row["choices"])) == 4
    assert len(splits["test"]) > 300 and settings["task"] == "newspaper_next_sentence"
