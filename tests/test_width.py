"""prune.width: what is narrowed answers as the source in which the same parts give nothing."""

import json

import pytest
import torch

from slimline import decoder, layerwise, passages, technique
from slimline.errors import ConfigError, ModelError
from slimline.prune import width
from slimline.shards import Writer
from tests import plain
from tests.decoders import KINDS, make_decoder, make_documents, seal_decoder

NARROW = [kind for kind in KINDS if kind not in width.SQUARE]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return make_documents(tmp_path_factory.mktemp("data") / "documents.parquet")


def configured(documents, **options):
    none = {"neurons": 0, "heads": 0, "channels": 0, "multiple": 8, "windows": 4, "length": 32}
    return technique.configure(width, {"data": str(documents), **none, **options})


def pruned(source, out, documents, **options):
    out.mkdir()
    return width.run(source, out, configured(documents, **options))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stays(source, config, target):
    """What stays of every layer, by the worths that the source has."""
    whole, tokens_NT = width.measured(source), passages.draw(source, config)
    worths = [width.worth(layer, whole.size, config.length) for layer in layerwise.look(source, tokens_NT)]
    channels = width.best(sum(each.channels for each in worths), int(target["channels"]))
    return whole.size, [
        width.Parts(
            width.best(w.neurons, int(target["neurons"])), width.best(w.groups, int(target["groups"])), channels
        )
        for w in worths
    ]


class Centred(torch.nn.Module):
    """A LayerNorm whose mean is over some channels, and whose variance counts the others as having none."""

    def __init__(self, norm, channels):
        super().__init__()
        self.norm, self.channels = norm, channels

    def forward(self, x):
        part = x[..., self.channels]
        part = part - part.mean(-1, keepdim=True)
        part = part / (part.square().sum(-1, keepdim=True) / x.shape[-1] + self.norm.eps).sqrt()
        answer = torch.zeros_like(x)
        answer[..., self.channels] = part * self.norm.weight[self.channels] + self.norm.bias[self.channels]
        return answer


def zeroed(source, size, parts):
    """The source's logits with nothing coming from the parts that do not stay."""
    model = decoder.load(source)
    kind = decoder.FAMILIES[model.config.model_type]
    gone_channels = [i for i in range(size.channels) if i not in parts[0].channels]
    model.get_submodule(kind.embedding).weight.data[:, gone_channels] = 0
    for layer, stay in zip(model.get_submodule(kind.layers), parts):
        mixed, down = layer.get_submodule(kind.mixed), layer.get_submodule(kind.down)
        each = size.heads * size.head_width // size.groups
        for linear, count, kept in ((mixed, each, stay.groups), (down, 1, stay.neurons)):
            weight_OI = linear.weight.data.T if kind.transposed else linear.weight.data
            for i in range(weight_OI.shape[1]):
                if i // count not in kept:
                    weight_OI[:, i] = 0
            weight_OI[gone_channels] = 0
            if linear.bias is not None:
                linear.bias.data[gone_channels] = 0
    if gone_channels:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.LayerNorm):
                model.set_submodule(name, Centred(module, parts[0].channels))
    return plain.logits(model)


def assert_equals_the_zeroed_source(source, out, documents, **options):
    metrics = pruned(source, out, documents, **options)
    expected = zeroed(source, *stays(source, configured(documents, **options), metrics))
    found = plain.assert_reads_the_same(out)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    assert not torch.allclose(found, plain.logits(decoder.load(source)), atol=1e-2)
    return metrics


@pytest.mark.parametrize("kind", KINDS)
def test_without_neurons_the_model_is_the_source_in_which_they_give_nothing(kind, documents, tmp_path):
    source, out = seal_decoder(make_decoder(kind, tmp_path / "source")), tmp_path / "out"
    metrics = assert_equals_the_zeroed_source(source, out, documents, neurons=0.25)
    assert (metrics["neurons"], metrics["neurons_removed"], metrics["heads_removed"]) == (72, 48, 0)
    assert config_of(out)[width.NEURONS.get(kind, "intermediate_size")] == 72


@pytest.mark.parametrize("kind", NARROW)
def test_without_heads_the_model_is_the_source_in_which_they_give_nothing(kind, documents, tmp_path):
    source, out = seal_decoder(make_decoder(kind, tmp_path / "source", heads=8)), tmp_path / "out"
    metrics = assert_equals_the_zeroed_source(source, out, documents, heads=0.5)
    assert (metrics["heads"], metrics["heads_removed"], metrics["head_width"]) == (4, 8, 8)
    values = config_of(out)
    assert (values["num_attention_heads"], values["head_dim"], values["hidden_size"]) == (4, 8, 64)
    assert values["num_key_value_heads"] == metrics["groups"] == (4 if kind == "phi" else 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", NARROW)
def test_without_hidden_channels_it_is_the_source_in_which_they_are_zero(kind, tied, documents, tmp_path):
    source, out = seal_decoder(make_decoder(kind, tmp_path / "source", tied=tied)), tmp_path / "out"
    metrics = assert_equals_the_zeroed_source(source, out, documents, channels=0.25)
    assert (metrics["channels"], metrics["channels_removed"], metrics["head_width"]) == (48, 16, 16)
    assert decoder.load(out).get_input_embeddings().weight.shape[1] == config_of(out)["hidden_size"] == 48


def test_the_epsilon_of_norms_grows_with_what_is_removed(documents, tmp_path):
    source, out = seal_decoder(make_decoder("llama", tmp_path / "source", rms_norm_eps=0.3)), tmp_path / "out"
    assert_equals_the_zeroed_source(source, out, documents, channels=0.25)
    assert config_of(out)["rms_norm_eps"] == pytest.approx(0.4)


@pytest.mark.parametrize("kind", NARROW)
def test_all_three_go_together(kind, documents, tmp_path):
    source, out = seal_decoder(make_decoder(kind, tmp_path / "source", heads=8)), tmp_path / "out"
    metrics = assert_equals_the_zeroed_source(source, out, documents, neurons=0.5, heads=0.5, channels=0.5)
    count = sum(p.numel() for p in decoder.load(out).parameters())
    assert metrics["parameters"] == count
    assert metrics["parameters"] + metrics["parameters_removed"] == sum(
        p.numel() for p in decoder.load(source).parameters()
    )


def test_a_part_is_worth_its_mean_magnitude_in_each_window_squared_and_summed(documents, tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source"))
    tokens_NT = torch.from_numpy(passages.draw(source, configured(documents)))
    model, heard = decoder.load(source).double(), {}
    for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"):
        module = model.get_submodule(f"model.layers.1.{name}")
        module.register_forward_pre_hook(lambda _, inputs, name=name: heard.update({name: inputs[0]}))
    plain.logits(model, tokens_NT)
    loud = {name: x_NTI.abs().mean(1).square().sum(0).sqrt().float() for name, x_NTI in heard.items()}
    *_, last = layerwise.look(source, tokens_NT)
    found = width.worth(last, width.measured(source).size, 32)
    torch.testing.assert_close(found.neurons, loud["mlp.down_proj"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.channels, loud["self_attn.q_proj"] + loud["mlp.up_proj"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.groups, loud["self_attn.o_proj"].reshape(2, 32).sum(1), rtol=1e-3, atol=1e-5)


def test_the_best_keep_their_order_and_ties_fall_to_the_lower_index():
    assert width.best(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 2]
    assert width.best(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 3, 4]


def test_what_stays_is_the_nearest_multiple():
    assert width.fewer("neurons", 1536, 0.25, 32) == 1152
    assert width.fewer("neurons", 100, 0.25, 32) == 64
    assert width.fewer("neurons", 100, 0.99, 32) == 32
    assert width.fewer("neurons", 100, 0, 32) == 100
    with pytest.raises(
        ConfigError, match="neurons=0.1 removes nothing: of 64 a multiple of 32 stays. Ask for more, or"
    ):
        width.fewer("neurons", 64, 0.1, 32)


def test_a_killed_run_goes_on_where_it_was(documents, tmp_path, monkeypatch):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", layers=3))
    options = {"neurons": 0.5, "channels": 0.25}
    pruned(source, tmp_path / "whole", documents, **options)
    write = Writer.write

    def killed(self, number, tensors):
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", killed)
        pruned(source, tmp_path / "killed", documents, **options)
    assert len(list((tmp_path / "killed").glob("part-*.safetensors"))) == 2
    width.run(source, tmp_path / "killed", configured(documents, **options))
    one, other = (plain.logits(decoder.load(tmp_path / name)) for name in ("whole", "killed"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", width.SQUARE)
@pytest.mark.parametrize("option", ["heads", "channels"])
def test_families_whose_heads_fill_the_hidden_state_lose_neurons_alone(kind, option, documents, tmp_path):
    source = seal_decoder(make_decoder(kind, tmp_path / "source"))
    with pytest.raises(ModelError, match="neither can be narrowed. Ask for neurons alone"):
        pruned(source, tmp_path / "out", documents, **{option: 0.5})


def test_heads_that_a_family_cannot_have_are_refused_with_those_that_it_can(documents, tmp_path):
    source = seal_decoder(make_decoder("llama", tmp_path / "source", heads=4, groups=4))
    with pytest.raises(ConfigError, match="no llama model of 3 heads and 64 hidden channels.*Of 4 .* as 1, 2, 4."):
        pruned(source, tmp_path / "out", documents, heads=0.25)


def test_layers_of_uneven_width_are_refused(documents, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_decoder("llama", tmp_path / "source")
    state = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.1.mlp.{name}.weight"] = state[f"model.layers.1.mlp.{name}.weight"][:80].clone()
    down = state["model.layers.1.mlp.down_proj.weight"]
    state["model.layers.1.mlp.down_proj.weight"] = down[:, :80].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="layers of uneven width"):
        pruned(seal_decoder(folder), tmp_path / "out", documents, neurons=0.5)
