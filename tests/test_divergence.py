import math

import numpy as np
import pytest
import torch

from slimline import answers, chunks, decoder, divergence, sheets
from slimline.sheets import Document
from tests.decoders import make_decoder

KINDS = ("forward", "reverse", "jensen_shannon")
P, Q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_divergences_are_those_of_the_papers():
    ln2 = math.log(2)
    assert divergence.apart(logs(P), logs(Q), "forward").item() == pytest.approx(0.25 * ln2)
    assert divergence.apart(logs(P), logs([0.5, 0.125, 0.375]), "reverse").item() == pytest.approx(
        0.125 * math.log(0.5) + 0.375 * math.log(1.5)
    )
    m = [0.375, 0.25, 0.375]
    half = 0.5 * math.log(0.5 / m[0]) + 0.25 * math.log(0.25 / m[2])
    assert divergence.apart(logs(P), logs(Q), "jensen_shannon").item() == pytest.approx(half)


def test_jensen_shannon_weighs_by_beta_and_goes_over_into_both_others():
    p, q, beta = np.array(P), np.array(Q), 0.1
    m = beta * p + (1 - beta) * q
    by_hand = beta * (p * np.log(p / m)).sum() + (1 - beta) * (q * np.log(q / m)).sum()
    assert divergence.apart(logs(P), logs(Q), "jensen_shannon", beta).item() == pytest.approx(by_hand)
    for kind, beta, scale in (("forward", 1e-6, 1e-6), ("reverse", 1 - 1e-6, 1e-6)):
        near = divergence.apart(logs(P), logs(Q), "jensen_shannon", beta).item() / scale
        assert near == pytest.approx(divergence.apart(logs(P), logs(Q), kind).item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_are_no_distance_apart_and_others_are(kind):
    assert divergence.apart(logs(P), logs(P), kind).item() == pytest.approx(0, abs=1e-12)
    assert divergence.apart(logs(P), logs(Q), kind).item() > 0.01


def test_known_tokens_and_the_rest_sum_to_one():
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.2, 0.3]]))
    ids, log_p = divergence.likeliest(logits, 2, 1.0)
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.4, 0.3, 0.3]]))
    softer = torch.tensor([0.4, 0.1, 0.2, 0.3]) ** 0.5
    expected = torch.tensor([[softer[0], softer[3], softer[1] + softer[2]]]) / softer.sum()
    torch.testing.assert_close(divergence.classes(logits, ids, 2.0).exp(), expected)
    assert divergence.classes(logits, torch.tensor([[3, 2, 1, 0]]), 1.0).shape == (1, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_kept_lowers_the_divergence_by_what_the_chain_rule_says(kind):
    draw = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(50, 30, generator=draw, dtype=torch.float64) for _ in range(2))
    ids, log_p = divergence.likeliest(teacher, 8, 1.0)
    log_q = divergence.classes(student, ids, 1.0)
    short = divergence.apart(log_p.double(), log_q.double(), kind)
    whole_p, whole_q = (x.log_softmax(1) for x in (teacher, student))
    whole = divergence.apart(whole_p, whole_q, kind)
    assert (short <= whole + 1e-6).all()
    rest = torch.ones(50, 30, dtype=torch.bool).scatter_(1, ids, False)
    p, q = (x.exp()[rest].reshape(50, 22) for x in (whole_p, whole_q))
    if kind == "jensen_shannon":
        bound = 0.5 * math.log(2) * (p.sum(1) + q.sum(1))
        assert (whole - short <= bound + 1e-6).all() and (whole - short).mean() > 0.001
    else:
        p, q = (p, q) if kind == "forward" else (q, p)
        lost = (p * ((p / p.sum(1, keepdim=True)) / (q / q.sum(1, keepdim=True))).log()).sum(1)
        torch.testing.assert_close(whole - short, lost, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    draw = torch.Generator().manual_seed(1)
    teacher = torch.randn(1, 6, generator=draw)
    student = torch.randn(1, 6, generator=draw).requires_grad_(True)
    ids, log_p = divergence.likeliest(teacher, 3, 1.0)
    divergence.apart(log_p, divergence.classes(student, ids, 1.0), kind).sum().backward()
    for i in range(6):
        sides = []
        for step in (1e-2, -1e-2):
            moved = student.detach().clone()
            moved[0, i] += step
            log_q = divergence.classes(moved, ids, 1.0).double()
            sides.append(divergence.apart(log_p.double(), log_q, kind).item())
        assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(student.grad[0, i].item(), abs=1e-4)


def laid():
    return sheets.lay([Document([2 + (i * j) % 20 for j in range(30)]) for i in range(1, 12)], 64)


def asked(teacher, folder, **more):
    from contextlib import nullcontext

    options = {"kept": 8, "temperature": 2.0, "precision": "fp32", "cast": nullcontext} | more
    return answers.ask(teacher, laid(), folder=folder, **options)


def test_answers_are_kept_to_half_a_percent_and_sum_to_one(tmp_path):
    teacher = make_decoder("llama", tmp_path / "teacher")
    found, text = asked(teacher, tmp_path / "cache"), laid()
    model = decoder.load(teacher)
    for row in (0, len(text) - 1):
        with torch.no_grad():
            ids_1T, positions_1T = (torch.from_numpy(whole[[row]]) for whole in (text.ids_NT, text.positions_NT))
            logits = model(**sheets.inputs(model, ids_1T, positions_1T)).logits[0]
        ids, log_p = found.read(row)
        expected = (logits / 2.0).log_softmax(1)
        assert (ids == expected.topk(8, dim=1).indices).float().mean() > 0.99
        torch.testing.assert_close(log_p[:, :8], expected.gather(1, ids), atol=5e-3, rtol=0)
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(64))
    assert 0 < found.rest() < 1


def test_answers_are_used_again_until_anything_that_matters_differs(tmp_path):
    teacher = make_decoder("llama", tmp_path / "teacher")
    asked(teacher, tmp_path / "cache")
    (before,) = (tmp_path / "cache").iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in before.iterdir()}
    asked(teacher, tmp_path / "cache")
    assert {file: file.stat().st_mtime_ns for file in before.iterdir()} == stamps
    for change in ({"temperature": 1.0}, {"kept": 9}, {"precision": "bf16"}):
        asked(teacher, tmp_path / "cache", **change)
    asked(make_decoder("llama", tmp_path / "other", seed=1), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_only_what_is_missing_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "TOKENS_A_CHUNK", 128)
    teacher = make_decoder("llama", tmp_path / "teacher")
    found = asked(teacher, tmp_path / "cache")
    files = sorted(found.chunks.folder.iterdir())
    assert len(files) == found.number >= 3
    before = {file: file.read_bytes() for file in files}
    files[1].unlink()
    stamp = files[0].stat().st_mtime_ns
    asked(teacher, tmp_path / "cache")
    assert {file: file.read_bytes() for file in files} == before
    assert files[0].stat().st_mtime_ns == stamp


def test_parts_that_two_processes_make_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "TOKENS_A_CHUNK", 128)
    teacher = make_decoder("llama", tmp_path / "teacher")
    whole = asked(teacher, tmp_path / "one")
    for part in (0, 1):
        both = asked(teacher, tmp_path / "two", share=(part, 2))
    for one, other in zip(sorted(whole.chunks.folder.iterdir()), sorted(both.chunks.folder.iterdir()), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_chunk_holds_text_and_numbers_and_reads_one_group_alone(tmp_path):
    store = chunks.Chunks(tmp_path, chunks.key(a=np.arange(3), b="x"))
    columns = {"text": ["a", "b", "c", "d"], "of": np.arange(12, dtype=np.float16).reshape(4, 3)}
    store.write(7, columns, group=2)
    assert 7 in store and 6 not in store
    assert store.read(7)["text"] == columns["text"]
    np.testing.assert_array_equal(store.read(7, ["of"], group=1)["of"], columns["of"][2:])
    assert [file.name for file in store.folder.iterdir()] == ["000007.parquet"]
