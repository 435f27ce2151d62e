"""The whole pipeline of language models, compiled, through kfp.local, on a tiny one."""

import json

import pytest
import yaml

from slimline import artifact, launch, store
from tests.decoders import make_decoder, make_documents
from tests.stores import standing_in


def make_task(folder):
    """Questions whose right answer is the word that follows by the rule of the documents."""
    from tests.tiny import BAD, GOOD, PLAIN

    words = [*PLAIN, *GOOD, *BAD]
    folder.mkdir()
    lines = []
    for at in range(24):
        follows = words[(at * 5 + 2) % len(words)]
        others = [words[(at * 5 + 2 + step) % len(words)] for step in (7, 11, 13)]
        lines.append({"id": str(at), "question": words[at], "choices": [follows, *others], "right": 0})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "follows",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "follows.yaml").write_text(yaml.safe_dump(task))
    return folder


def parameters(folder):
    """A recipe of seconds: a tiny Llama in 8 bits, with limits that a tiny test split can prove."""
    return {
        "source": str(make_decoder("llama", folder / "source", width=64, feed=96, tied=True)),
        "data": str(make_documents(folder / "documents.parquet", rows=400)),
        "task": str(make_task(folder / "task")),
        "name": "tiny-llama",
        "margin": 0.1,
        "rotate_method": "rotate",
        "quantize_method": "gptq",
        "quantize_options": {"bits": 8, "group_size": 32, "windows": 8, "length": 32},
        "perplexity_options": {"length": 64, "stride": 32},
        "divergence_options": {"length": 64, "stride": 32, "max_documents": 40},
        "generation_threads": 1,
        "generation_options": {"lengths": [8, 16], "batches": [2], "tokens": 12, "answers": 56},
        "gate_options": {"size_alone": True, "max_kl": 0.2, "choices_margin": 0.4, "must_win": ["size"]},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working directory in which the pipeline has run once, with what it told and made."""
    with standing_in(tmp_path_factory.mktemp("world")) as folder:
        values = parameters(folder)
        events: list[dict] = []
        outcome = launch.run("language", values, events.append, "slimline run language -f recipe.yaml")
        yield {"folder": folder, "values": values, "events": events, "outcome": outcome}


def test_the_pipeline_ends_with_a_champion_that_passed(world):
    said = world["outcome"].summary
    assert said["status"] == "PASS", said["sentence"]
    assert said["promoted"] and store.alias("tiny-llama", "champion") == said["version"] == 1
    assert "perplexity" in said["sentence"] and "smaller" in said["sentence"]


def test_the_champion_is_a_package_with_its_whole_history(world):
    manifest = artifact.verify(store.fetch("models:/tiny-llama@champion"))
    assert [stage.technique for stage in manifest.history] == [
        "fetch.local", "quantize.rotate", "quantize.gptq", "export.genai",
    ]  # fmt: skip
    assert manifest.format == "genai" and manifest.task == "text-generation" and manifest.labels == ()


def test_the_table_compares_it_with_the_floats_by_perplexity(world):
    base, best = world["outcome"].summary["rows"]
    assert base["is_baseline"] and best["is_candidate"] and best["weights_bytes"] < base["weights_bytes"]
    assert best["quality"] < 1.1 * base["quality"]
    assert world["outcome"].summary["terms"]["metric"] == "perplexity"
    assert best["others"]["divergence kl_mean"] < 0.2 and "multiple choice accuracy" in base["others"]


def test_it_writes_through_mlflow_as_any_other_model(world):
    import mlflow

    mlflow.set_tracking_uri(store.uri())
    model = mlflow.pyfunc.load_model("models:/tiny-llama@champion")
    answer = model.predict(["the film", "a very long story"], params={"max_tokens": 4})
    assert len(answer) == 2 and all(isinstance(text, str) for text in answer.iloc[:, 0])


def test_a_second_run_computes_nothing_anew(world):
    launch.run("language", world["values"], lambda event: None)  # once more for the gate: the champion moved
    events: list[dict] = []
    again = launch.run("language", world["values"], events.append)
    made = [e["step"] for e in events if e["event"] == "end" and not e["reused"]]
    assert again.summary["version"] == 1 and set(made) <= {"champion", "register", "promote", "report"}
