import numpy as np
import pytest
import torch

from slimline import artifact, hf, imitation, technique
from slimline.distill import logits
from slimline.errors import ConfigError
from tests.tiny import KINDS, make_tiny, seal_tiny


def distilled(source, out, data, **options):
    out.mkdir()
    return logits.run(source, out, technique.configure(logits, {"data": str(data), "epochs": 1, **options}))


@pytest.mark.parametrize(
    ("have", "keep", "kept"),
    [
        (6, 3, [1, 3, 5]),
        (6, 2, [2, 5]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (12, 4, [2, 5, 8, 11]),
        (6, 1, [5]),
        (3, 2, [1, 2]),
    ],
)
def test_layers_are_kept_evenly_and_the_last_always(have, keep, kept):
    assert logits.evenly(have, keep) == kept


def test_more_layers_than_the_teacher_has_are_refused():
    with pytest.raises(ConfigError, match="'layers' is 7, but the teacher has 6"):
        logits.evenly(6, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_starts_with_the_teachers_layers_and_loads_with_fewer(kind, tmp_path, tiny_data):
    source = seal_tiny(make_tiny(kind, tmp_path / "teacher"))
    metrics = distilled(source, tmp_path / "out", tiny_data, layers=2, learning_rate=1e-9)
    teacher, student = hf.load(source), hf.load(tmp_path / "out")
    assert len(hf.layers(student)) == metrics["layers"] == 2
    down = hf.layout(student).down
    for mine, theirs in zip(hf.layers(student), (hf.layers(teacher)[i] for i in (1, 2))):
        torch.testing.assert_close(
            mine.get_submodule(down).weight, theirs.get_submodule(down).weight, atol=1e-5, rtol=0
        )


def test_a_student_with_all_layers_and_no_rate_to_speak_of_answers_as_its_teacher(tmp_path, tiny_bert, tiny_data):
    distilled(tiny_bert, tmp_path / "out", tiny_data, layers=3, learning_rate=1e-12)
    tokenizer = hf.tokenizer(tiny_bert, 64)
    texts = ["a fine film", "dull and very very long", "the end"]
    one, other = (hf.logits(hf.load(folder), tokenizer, texts) for folder in (tiny_bert, tmp_path / "out"))
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_student_comes_nearer_to_its_teacher(tmp_path, tiny_bert, tiny_data, hidden):
    near = distilled(
        tiny_bert, tmp_path / "near", tiny_data, layers=2, learning_rate=3e-3, mixing=1.0, epochs=6, hidden=hidden
    )
    far = distilled(tiny_bert, tmp_path / "far", tiny_data, layers=2, learning_rate=1e-9, mixing=1.0, hidden=hidden)
    assert near["train_loss"] < 0.7 * far["train_loss"]


def test_distilling_repeats_itself_and_leaves_the_teacher_alone(tmp_path, tiny_bert, tiny_data):
    before = artifact.digest(tiny_bert)
    distilled(tiny_bert, tmp_path / "a", tiny_data, layers=2)
    distilled(tiny_bert, tmp_path / "b", tiny_data, layers=2)
    assert artifact.digest(tmp_path / "a") == artifact.digest(tmp_path / "b")
    assert artifact.digest(tiny_bert) == before


def test_states_are_no_distance_from_themselves_and_padding_does_not_count(tmp_path, tiny_bert):
    model, tokenizer = hf.load(tiny_bert), hf.tokenizer(tiny_bert, 64)
    batch = hf.tensors(tokenizer.encode(["a fine film", "dull and very very long and cold"]), model)
    states, mask = imitation.show(model, batch).hidden_states, batch["attention_mask"]
    assert imitation.apart(states, states, mask, range(3)) == 0
    moved = [states[0]]
    for state in states[1:]:
        real = mask[:, : state.shape[1]].bool()
        moved.append(torch.where(real.unsqueeze(-1), state + 2, state + 1000))
    assert float(imitation.apart(moved, states, mask, range(3))) == pytest.approx(4, rel=1e-4)
