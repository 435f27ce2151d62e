import numpy as np
import pytest
import torch

from slimline import artifact, hf, technique, training
from slimline.errors import ConfigError
from slimline.prune import heads
from tests.tiny import KINDS, LABELS, make_tiny, seal_tiny

TEXTS = ["a superb film", "the plot is dull and the end is long and stale and cold", "fine"]


def config(data, **options):
    return technique.configure(heads, {"data": str(data), "multiple": 8, "epochs": 0, **options})


def pruned(source, out, data, **options):
    out.mkdir()
    return heads.run(source, out, config(data, **options))


def answers(folder):
    return hf.logits(hf.load(folder), hf.tokenizer(folder, 64), TEXTS)


def test_the_worth_of_a_group_is_its_summed_change_of_the_loss():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]]])
    grad = torch.tensor([[[1.0, 0.0, -1.0, 1.0], [0.0, -3.0, 0.0, 0.0]]])
    assert heads.taylor(x, grad, 1).tolist() == [1.0, 3.0, 3.0, 4.0]
    assert heads.taylor(x, grad, 2).tolist() == [2.0, 1.0]  # |1 - 3| and |-3 + 4|
    assert heads.taylor(torch.cat([x, x]), torch.cat([grad, -grad]), 2).tolist() == [4.0, 2.0]


def test_the_worth_of_a_head_is_the_slope_of_the_loss_in_its_mask(tmp_path, tiny_bert, tiny_data):
    model, tokenizer = hf.load(tiny_bert), hf.tokenizer(tiny_bert, 64)
    split = training.read(tiny_data, "calibration", tokenizer, LABELS)
    one = training.Split(split.texts[:1], split.targets[:1], split.lengths[:1])
    worth = heads.measure(model, tokenizer, one)[1][0].worth
    batch = hf.tensors(tokenizer.encode(one.texts), model)
    mixed = hf.layers(model)[1].get_submodule(hf.layout(model).mixed)
    mask = torch.ones(4, requires_grad=True)
    hook = mixed.register_forward_pre_hook(lambda _, inputs: (inputs[0] * mask.repeat_interleave(8),))
    torch.nn.functional.cross_entropy(model(**batch).logits, torch.from_numpy(one.targets)).backward()
    hook.remove()
    torch.testing.assert_close(worth.float(), mask.grad.abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_nothing_is_the_identity(kind, tmp_path, tiny_data):
    source = seal_tiny(make_tiny(kind, tmp_path / "model"))
    metrics = pruned(source, tmp_path / "out", tiny_data, heads=0, neurons=0)
    np.testing.assert_array_equal(answers(source), answers(tmp_path / "out"))
    assert metrics["heads_removed"] == metrics["neurons_removed"] == metrics["parameters_removed"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_answers_as_the_whole_one_with_those_parts_masked(kind, tmp_path, tiny_data):
    source = seal_tiny(make_tiny(kind, tmp_path / "model"))
    pruned(source, tmp_path / "out", tiny_data, heads=0.5, neurons=0.5, spare_last=False, reconstruct=False, even=True)
    model, tokenizer = hf.load(source), hf.tokenizer(source, 64)
    layout = hf.layout(model)
    uses = heads.measure(model, tokenizer, training.read(tiny_data, "calibration", tokenizer, LABELS))
    for layer, (head, neuron) in zip(hf.layers(model), uses):
        stay = (
            torch.zeros(4)
            .index_fill(0, torch.tensor(heads.stay([head.worth], 0.5, 1, True)[0]), 1.0)
            .repeat_interleave(8)
        )
        layer.get_submodule(layout.mixed).weight.data *= stay
        stay = torch.zeros(64).index_fill(0, torch.tensor(heads.stay([neuron.worth], 0.5, 8, True)[0]), 1.0)
        layer.get_submodule(layout.down).weight.data *= stay
    np.testing.assert_allclose(answers(tmp_path / "out"), hf.logits(model, tokenizer, TEXTS), atol=1e-5)


def test_folding_is_ridge_regression_and_exact_where_a_channel_repeats_others():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    x[:, 4], x[:, 5] = 2 * x[:, 0] - x[:, 1], 3.0  # channels that say nothing new
    grad = torch.randn(400, 2)
    linear = torch.nn.Linear(6, 3)
    whole, old = linear(x), linear.weight.data.clone()
    moments = heads.moments(x.unsqueeze(0), grad.unsqueeze(0))
    weight = (grad**2).sum(dim=1).numpy()
    ones = np.concatenate([x.numpy(), np.ones((400, 1), np.float32)], axis=1)
    np.testing.assert_allclose(moments, (ones * weight[:, None]).T @ ones, rtol=1e-4, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "RIDGE", 1e-9)
        heads.fold(linear, [0, 1, 2, 3], moments)
    kept = x[:, :4] @ linear.weight[:, :4].T + linear.bias
    torch.testing.assert_close(kept, whole, rtol=1e-3, atol=1e-3)
    stiff = torch.nn.Linear(6, 3)
    stiff.weight.data.copy_(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "RIDGE", 1e9)
        heads.fold(stiff, [0, 1, 2, 3], moments)
    torch.testing.assert_close(stiff.weight.data, old)  # a pull that strong leaves the weights alone


def test_folding_ignores_what_the_loss_does_not_depend_on():
    x, grad = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    grad[0, 3:] = 0  # padding
    moved = x.clone()
    moved[0, 3:] = 1e6
    torch.testing.assert_close(heads.moments(x, grad), heads.moments(moved, grad))
    linear = torch.nn.Linear(4, 3)
    before = linear.weight.data.clone()
    heads.fold(linear, [0, 2], heads.moments(x, torch.zeros(2, 5, 3)))
    assert torch.equal(linear.weight.data, before)


def test_a_model_reconstructed_is_nearer_to_the_whole_one(tmp_path, tiny_bert, tiny_data):
    whole = answers(tiny_bert)
    far = {}
    for reconstruct in (False, True):
        out = tmp_path / str(reconstruct)
        pruned(tiny_bert, out, tiny_data, heads=0.5, neurons=0.5, reconstruct=reconstruct)
        far[reconstruct] = np.abs(answers(out) - whole).mean()
    assert far[True] < 0.8 * far[False]


def test_even_layers_lose_the_same_heads_and_the_last_keeps_its_neurons(tmp_path, tiny_bert, tiny_data):
    metrics = pruned(tiny_bert, tmp_path / "out", tiny_data, heads=0.5, neurons=0.75, even=True)
    model = hf.load(tmp_path / "out")
    layout = hf.layout(model)
    shapes = [
        (tuple(x.get_submodule(layout.query).weight.shape), tuple(x.get_submodule(layout.up).weight.shape))
        for x in hf.layers(model)
    ]
    assert shapes == [((16, 32), (16, 32)), ((16, 32), (16, 32)), ((16, 32), (64, 32))]
    assert (metrics["heads_removed"], metrics["neurons_removed"]) == (6, 96)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tiny_bert, tmp_path / "out")]
    assert sizes[1] < sizes[0] - 4 * metrics["parameters_removed"] + 4096


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_matter_less_lose_more_and_the_model_can_be_read_back(kind, tmp_path, tiny_data):
    source = seal_tiny(make_tiny(kind, tmp_path / "model"))
    metrics = pruned(source, tmp_path / "out", tiny_data, heads=0.5, neurons=0.75)
    model = hf.load(tmp_path / "out")
    layout = hf.layout(model)
    left = [
        (len(layer.get_submodule(layout.query).weight) // 8, len(layer.get_submodule(layout.up).weight))
        for layer in hf.layers(model)
    ]
    assert sum(n for n, _ in left) == 6 and min(n for n, _ in left) >= 1
    assert sum(n for _, n in left[:2]) == 32 and min(n for _, n in left[:2]) >= 8 and left[2][1] == 64
    assert (metrics["heads_removed"], metrics["neurons_removed"]) == (6, 96)
    assert np.isfinite(answers(tmp_path / "out")).all()


@pytest.mark.parametrize(
    ("have", "drop", "multiple", "left"),
    [(12, 0.5, 1, 6), (1536, 0.66, 32, 512), (12, 0.99, 1, 1), (64, 0.9, 32, 32), (64, 0, 7, 64)],
)
def test_how_many_stay_is_the_nearest_multiple_and_never_none(have, drop, multiple, left):
    assert [len(kept) for kept in heads.stay([torch.rand(have)] * 2, drop, multiple, True)] == [left, left]


def test_the_most_worthy_stay_in_their_order_and_ties_fall_to_the_lower_index():
    assert heads.stay([torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])], 0.6, 1, True) == [[1, 2]]


def test_all_layers_are_ranked_together_in_groups_and_none_is_emptied():
    worths = [torch.tensor([9.0, 8, 7, 6]), torch.tensor([0.0, 5, 0, 5]), torch.tensor([1.0, 1, 1, 1])]
    assert heads.stay(worths, 0.5, 1, False) == [[0, 1, 2, 3], [1], [0]]
    assert heads.stay(worths, 0.5, 2, False) == [[0, 1], [1, 3], [0, 1]]
    assert heads.stay(worths, 0.3, 2, False) == [[0, 1, 2, 3], [1, 3], [0, 1]]


def test_a_group_wider_than_a_layer_is_refused(tmp_path, tiny_bert, tiny_data):
    with pytest.raises(ConfigError, match="'multiple' is 128, but a layer has 64 neurons"):
        pruned(tiny_bert, tmp_path / "out", tiny_data, multiple=128)


def test_a_pruned_model_recovers_from_its_teacher(tmp_path, tiny_bert, tiny_data):
    from slimline.train import finetune

    teacher = tmp_path / "teacher"
    teacher.mkdir()
    options = {"data": str(tiny_data), "epochs": 6, "learning_rate": 3e-3, "batch_size": 8}
    finetune.run(tiny_bert, teacher, technique.configure(finetune, options))
    seal_tiny(teacher)
    options = {"heads": 0.75, "neurons": 0.75, "epochs": 6, "learning_rate": 3e-3, "batch_size": 8}
    options["teacher"] = str(teacher)
    metrics = pruned(teacher, tmp_path / "out", tiny_data, **options)
    assert metrics["validation_accuracy"] >= metrics["validation_accuracy_cut"]
    assert metrics["validation_accuracy"] > 0.85


def test_pruning_repeats_itself_and_leaves_its_source_alone(tmp_path, tiny_bert, tiny_data):
    before = artifact.digest(tiny_bert)
    for name in "ab":
        pruned(tiny_bert, tmp_path / name, tiny_data, epochs=1, teacher=str(tiny_bert))
    assert artifact.digest(tmp_path / "a") == artifact.digest(tmp_path / "b")
    assert artifact.digest(tiny_bert) == before
