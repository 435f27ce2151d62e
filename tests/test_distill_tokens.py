import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from slimline import artifact, bookmark, decoder, hf, sheets, technique, tuition
from slimline.distill import tokens
from slimline.errors import ModelError
from slimline.sheets import Document
from tests.decoders import make_decoder, make_tokenizer, seal_decoder
from tests.taught import QUICK, known_documents, shortened_student, taught_teacher  # noqa: F401  fixtures

ROOT = Path(__file__).parent.parent


def config(data, teacher, **options):
    return technique.configure(tokens, {"data": str(data), "teacher": str(teacher), **QUICK, **options})


def run(source, out, data, teacher, **options):
    out.mkdir(parents=True)
    return tokens.run(source, out, config(data, teacher, **options))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_a_student_that_lost_a_layer_comes_back(kind, tmp_path, data, teacher, student):
    metrics = run(student, tmp_path / "out", data, teacher, divergence=kind, steps=30)
    assert metrics["validation_loss_before"] > metrics["validation_loss"] + 0.3
    assert metrics["steps"] == 30 and 0 < metrics["teacher_rest"] < 1
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, decoder.load(tmp_path / "out")(ids).logits)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_loss_is_the_papers_formula_on_every_token_that_counts(tmp_path, data, teacher, student):
    plan = config(data, teacher, temperature=2.0, mixing=0.7, kept=4, validation_tokens=0)
    text = sheets.lay([Document([3, 9, 4, 12, 7, 5]), Document([8, 2, 6])], 16)
    answered = tokens.answers.ask(teacher, text, 4, 2.0, tmp_path, "fp32", tuition.casting(plan))
    course, model = tokens.Following(text, answered, plan), decoder.load(student)
    batch = course.batch(model, 0, [0])
    with torch.no_grad():
        logits = model(**sheets.inputs(model, batch.ids_BT, batch.positions_BT)).logits
        shown = decoder.load(teacher)(**sheets.inputs(model, batch.ids_BT, batch.positions_BT)).logits
    total = 0.0
    for at, follows in [(0, 9), (1, 4), (2, 12), (3, 7), (4, 5), (6, 2), (7, 6)]:
        mine, theirs = logits[0, at].double().numpy(), shown[0, at].double().numpy()
        total -= 0.3 * (mine[follows] - np.log(np.exp(mine).sum()))
        q, p = (np.exp(x / 2) / np.exp(x / 2).sum() for x in (mine, theirs))
        top = np.argsort(-p)[:4]
        q, p = (np.append(x[top], 1 - x[top].sum()) for x in (q, p))
        total += 0.7 * 4 * (p * np.log(p / q)).sum()
    assert float(course.loss(logits, batch)) == pytest.approx(total, rel=2e-3)


def test_distilling_repeats_itself_and_leaves_its_models_alone(tmp_path, data, teacher, student):
    before = [artifact.digest(folder) for folder in (teacher, student)]
    run(student, tmp_path / "a", data, teacher, steps=4)
    run(student, tmp_path / "b", data, teacher, steps=4, cache=str(tmp_path / "cache"))
    run(student, tmp_path / "c", data, teacher, steps=4, cache=str(tmp_path / "cache"))
    other = run(student, tmp_path / "d", data, teacher, steps=4, seed=1)
    assert len({artifact.digest(tmp_path / side) for side in "abc"}) == 1 and other["steps"] == 4
    assert artifact.digest(tmp_path / "d") != artifact.digest(tmp_path / "a")
    assert [artifact.digest(folder) for folder in (teacher, student)] == before


def test_pieces_of_a_batch_and_layers_computed_again_change_nothing(tmp_path, data, teacher, student):
    run(student, tmp_path / "whole", data, teacher, steps=3, tokens_at_once=512)
    run(student, tmp_path / "pieces", data, teacher, steps=3, tokens_at_once=64)
    run(student, tmp_path / "again", data, teacher, steps=3, tokens_at_once=512, recompute=True)
    whole, pieces, again = (decoder.load(tmp_path / side).state_dict() for side in ("whole", "pieces", "again"))
    for name, weight in whole.items():
        torch.testing.assert_close(pieces[name], weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(again[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_families_that_drop_out_learn_without(kind, tmp_path, data):
    source = seal_decoder(make_decoder(kind, tmp_path / kind))
    run(source, tmp_path / "a", data, source, steps=2)
    run(source, tmp_path / "b", data, source, steps=2, recompute=True, seed=0)
    one, other = (decoder.load(tmp_path / side).state_dict() for side in "ab")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)


def test_what_was_pruned_stays_pruned(tmp_path, data, teacher):
    model = decoder.load(teacher)
    matrix = model.model.layers[0].mlp.up_proj.weight
    matrix.data[:, ::2] = 0
    (tmp_path / "pruned").mkdir()
    decoder.save(model, teacher, tmp_path / "pruned")
    seal_decoder(tmp_path / "pruned")
    for keep in (True, False):
        run(tmp_path / "pruned", tmp_path / f"{keep}", data, teacher, steps=2, keep_zeros=keep)
        after = decoder.load(tmp_path / f"{keep}").model.layers[0].mlp.up_proj.weight
        assert ((after[:, ::2] == 0).float().mean() == 1) == keep and (after[:, 1::2] != matrix[:, 1::2]).any()


def test_weights_are_written_in_the_type_they_came_in(tmp_path, data, teacher, student):
    (tmp_path / "half").mkdir()
    decoder.save(decoder.load(student), student, tmp_path / "half", dtype="bfloat16")
    run(seal_decoder(tmp_path / "half"), tmp_path / "out", data, teacher, steps=1)
    assert decoder.Weights(tmp_path / "out").raw("model.norm.weight").dtype == torch.bfloat16


def test_another_vocabulary_and_packed_integers_are_refused(tmp_path, data, teacher, student):
    other = make_decoder("llama", tmp_path / "other")
    make_tokenizer(other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"▁film"', '"▁movie"'))
    with pytest.raises(ModelError, match="another vocabulary"):
        run(student, tmp_path / "a", data, seal_decoder(other))
    packed = shutil.copytree(student, tmp_path / "packed", ignore=shutil.ignore_patterns("manifest.json"))
    values = hf.read_config(packed) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (packed / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="is quantized, and training would undo that"):
        run(packed, tmp_path / "b", data, teacher)


DISTIL = """
import json, sys
from pathlib import Path
from slimline import technique
from slimline.distill import tokens
source, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
print(json.dumps(tokens.run(source, out, technique.configure(tokens, options))))
"""


def test_a_run_that_was_killed_goes_on_from_its_bookmark_and_ends_in_the_same_bytes(tmp_path, data, teacher, student):
    options = config(data, teacher, steps=40, save_every=5).model_dump()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
    expected = tokens.run(student, whole, technique.configure(tokens, options))
    command = [sys.executable, "-c", DISTIL, str(student), str(killed), json.dumps(options)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    mark = killed / "work" / bookmark.FILE
    while not mark.is_file() and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and mark.is_file() and not (killed / "model.safetensors").exists()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(second.stdout.splitlines()[-1])
    assert artifact.digest(killed) == artifact.digest(whole)
    assert {k: v for k, v in found.items() if k != "tokens_per_s"} == {
        k: v for k, v in expected.items() if k != "tokens_per_s"
    }


def test_a_bookmark_of_another_plan_is_not_taken(tmp_path, student):
    model = tuition.student(student)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(2, 9)[None]).logits.sum().backward()
    optimizer.step()
    bookmark.write(tmp_path, model, optimizer, {"key": "a", "step": 1})
    fresh = tuition.student(student)
    assert bookmark.read(tmp_path, fresh, torch.optim.AdamW(fresh.parameters()), "b") == {}
    before = fresh.model.norm.weight.clone()
    assert bookmark.read(tmp_path, fresh, torch.optim.AdamW(fresh.parameters()), "a")["step"] == 1
    assert not torch.equal(fresh.model.norm.weight, before)
    assert torch.equal(fresh.model.norm.weight, model.model.norm.weight)


TWO = """
import json, sys
from pathlib import Path
from accelerate import PartialState, debug_launcher
from slimline import technique
from slimline.distill import tokens

def work(source, *jobs):
    for out, options in zip(jobs[::2], jobs[1::2]):
        metrics = tokens.work(Path(source), Path(out), technique.configure(tokens, json.loads(options)))
        Path(f"{out}-{PartialState().process_index}.json").write_text(json.dumps(metrics))

debug_launcher(work, tuple(sys.argv[1:]), num_processes=2)
"""


def test_two_processes_learn_what_one_learns_even_if_one_has_nothing_to_do(tmp_path, data, teacher, student):
    plans = {n: config(data, teacher, steps=3, tokens_at_once=128, batch_tokens=n).model_dump() for n in (448, 64)}
    jobs, expected = [], {}
    for tokens_a_step, options in plans.items():
        alone, both = tmp_path / f"alone-{tokens_a_step}", tmp_path / f"both-{tokens_a_step}"
        alone.mkdir()
        both.mkdir()
        expected[both] = alone, tokens.run(student, alone, technique.configure(tokens, options))
        jobs += [str(both), json.dumps(options)]
    command = [sys.executable, "-c", TWO, str(student), *jobs]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    for both, (alone, metrics) in expected.items():
        first, second = (json.loads(Path(f"{both}-{i}.json").read_text()) for i in (0, 1))
        for name in ("train_loss", "validation_loss_before", "validation_loss", "teacher_rest"):
            assert first[name] == second[name] == pytest.approx(metrics[name], rel=1e-5)
        one, other = decoder.load(alone).state_dict(), decoder.load(both).state_dict()
        for name, weight in one.items():
            torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-3)
