"""Structured pruning: attention heads and feed-forward neurons that matter least are removed, then the rest recovers.

What a head or neuron is worth is how much the loss would change without it, to first order: |activation * gradient|,
summed over a text and averaged over the calibration texts (Michel et al., 2019, arXiv 1905.10650; Molchanov et al.,
2019, arXiv 1906.10771). Layers are ranked together: those lose most that matter least. Rows and columns go for good, so
the model is smaller and faster in any runtime. What the lost channels gave is folded into those that stay, by least
squares (Luo et al., 2017, arXiv 1707.06342; Kwon et al., 2022, arXiv 2204.09656). It then learns from a teacher again
for a while; with `hidden` its states also follow those that it had when whole.

Shapes: B = texts, T = tokens, C = channels, W = width, H = heads, N = neurons, L = labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from slimline import artifact, hf, imitation, training
from slimline.errors import ConfigError
from slimline.technique import Metrics, Stored, track

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RIDGE = 0.1
"""Pull of the folded weights towards the old ones, beside the mean square of a channel."""


class Use(NamedTuple):
    """How a layer's map out of its heads, or out of its neurons, uses its C input channels."""

    worth: torch.Tensor
    """Of each head [H] or neuron [N]."""
    moments: torch.Tensor
    """[C + 1, C + 1]: products of two channels, the last a constant one, each token weighed by how much it matters."""


class Config(imitation.Imitation):
    """Options of prune.heads."""

    data: Stored = Field(description="data set: calibration split to measure on, train split to recover on")
    teacher: Stored = Field("", description="model to learn from again; without one, from the labels alone")
    heads: float = Field(0.5, ge=0, lt=1, description="fraction of the heads that goes")
    neurons: float = Field(0.5, ge=0, lt=1, description="fraction of the feed-forward neurons that goes")
    even: bool = Field(False, description="take the same fraction of every layer")
    spare_last: bool = Field(
        True, description="keep the last layer's neurons: after export they work on one token of each text alone"
    )
    reconstruct: bool = Field(True, description="fold what went into what stays, so that layers answer as before")
    multiple: int = Field(32, gt=0, description="neurons are kept in groups of so many, which kernels like")
    epochs: int = Field(1, ge=0, le=1000, description="how often the train split is read to recover")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Prune the model in `source`, let it recover, and write it to `out`."""
    labels = artifact.read(source).labels
    model = hf.load(source)
    before = sum(p.numel() for p in model.parameters())
    tokenizer = hf.tokenizer(source, hf.max_length(source))
    place = Path(config.data)
    calibration, train, validation = (
        training.read(place, name, tokenizer, labels) for name in ("calibration", "train", "validation")
    )
    whole = training.validate(model, tokenizer, validation)[0]
    heads, neurons = remove(model, measure(model, tokenizer, calibration), config)
    cut = training.validate(model, tokenizer, validation)[0]
    metrics: Metrics = {}
    if config.epochs and (heads or neurons):
        metrics = recover(model, hf.load(source), tokenizer, train, validation, config)
    hf.save(model, source, out)
    after = sum(p.numel() for p in model.parameters())
    return metrics | {
        "heads_removed": float(heads),
        "neurons_removed": float(neurons),
        "parameters": float(after),
        "parameters_removed": float(before - after),
        "validation_accuracy_before": whole,
        "validation_accuracy_cut": cut,
    }


def measure(model: torch.nn.Module, tokenizer: hf.Tokenizer, split: training.Split) -> list[tuple[Use, Use]]:
    """How every layer uses its heads and its neurons on these texts. Leaves the weights and their gradients alone."""
    import torch

    layout, width = hf.layout(model), hf.head_width(model)
    places = [(i, name) for i in range(len(hf.layers(model))) for name in (layout.mixed, layout.down)]
    seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(key: tuple[int, str]) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[0].retain_grad()
            output.retain_grad()
            seen[key] = inputs[0], output

        return hook

    hooks = [hf.layers(model)[i].get_submodule(name).register_forward_hook(keep((i, name))) for i, name in places]
    uses: dict[tuple[int, str], Use] = {}
    model.eval()
    try:
        for rows in track(list(hf.by_length(split.lengths, 32)), "measuring heads and neurons"):
            batch = hf.tensors(tokenizer.encode([split.texts[i] for i in rows]), model)
            targets_B = torch.from_numpy(split.targets[rows]).to(hf.config_device(model))
            value = torch.nn.functional.cross_entropy(model(**batch).logits, targets_B, reduction="sum")
            value.backward()  # type: ignore[no-untyped-call]
            for key, (x_BTC, y_BTW) in seen.items():
                assert x_BTC.grad is not None and y_BTW.grad is not None
                group = width if key[1] == layout.mixed else 1
                found = Use(taylor(x_BTC.detach(), x_BTC.grad, group), moments(x_BTC.detach(), y_BTW.grad))
                uses[key] = Use(*map(torch.add, uses[key], found)) if key in uses else found
            model.zero_grad(set_to_none=True)
    finally:
        for hook in hooks:
            hook.remove()
    each = [Use(*(total / len(split.texts) for total in uses[key])) for key in places]
    return list(zip(each[::2], each[1::2]))


def taylor(x_BTC: torch.Tensor, grad_BTC: torch.Tensor, group: int) -> torch.Tensor:
    """Sum over texts of |sum over tokens and the group's channels of activation * gradient|: [C / group]."""
    change_BC = (x_BTC.double() * grad_BTC.double()).sum(dim=1)
    return change_BC.reshape(len(change_BC), -1, group).sum(dim=2).abs().sum(dim=0)


def moments(x_BTC: torch.Tensor, grad_BTW: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of |gradient of what comes out|^2 [1, x] [1, x]': [C + 1, C + 1].

    A token that the loss does not depend on, such as padding, has no gradient and so no weight.
    """
    import torch

    x_XC = torch.nn.functional.pad(x_BTC.flatten(0, 1), (0, 1), value=1.0)
    weight_X1 = (grad_BTW.flatten(0, 1) ** 2).sum(dim=1, keepdim=True)
    return (x_XC * weight_X1).T @ x_XC


def remove(model: torch.nn.Module, uses: list[tuple[Use, Use]], config: Config) -> tuple[int, int]:
    """Cut the least worthy heads and neurons out, in place. Returns how many of each went."""
    layout, width = hf.layout(model), hf.head_width(model)
    layers = list(hf.layers(model))
    end = len(layers) - config.spare_last
    heads = stay([use.worth for use, _ in uses], config.heads, 1, config.even)
    neurons = stay([use.worth for _, use in uses[:end]], config.neurons, config.multiple, config.even)
    neurons += [list(range(len(use.worth))) for _, use in uses[end:]]
    for layer, (head_use, neuron_use), keep_heads, keep_neurons in zip(layers, uses, heads, neurons):
        channels = [head * width + d for head in keep_heads for d in range(width)]
        for rows, columns, kept, use in (
            ((layout.query, layout.key, layout.value), layout.mixed, channels, head_use),
            ((layout.up,), layout.down, keep_neurons, neuron_use),
        ):
            out: Any = layer.get_submodule(columns)
            if len(kept) == out.in_features:
                continue
            for name in rows:
                _keep_rows(layer.get_submodule(name), kept)
            if config.reconstruct:
                fold(out, kept, use.moments)
            _keep_columns(out, kept)
    gone_heads = sum(len(use.worth) - len(kept) for (use, _), kept in zip(uses, heads))
    return gone_heads, sum(len(use.worth) - len(kept) for (_, use), kept in zip(uses, neurons))


def stay(worths: list[torch.Tensor], drop: float, multiple: int, even: bool) -> list[list[int]]:
    """Per layer, the indexes that stay, in their old order. Ties fall to the lower index and the earlier layer.

    They stay in groups of `multiple`, the most worthy together, of all layers or of each; a layer keeps one at least.
    """
    if drop == 0:
        return [list(range(len(worth))) for worth in worths]
    if even and len(worths) > 1:
        return [kept for worth in worths for kept in stay([worth], drop, multiple, even)]
    groups = []
    for layer, worth in enumerate(worths):
        if multiple > len(worth):
            raise ConfigError(
                f"prune.heads: option 'multiple' is {multiple}, but a layer has {len(worth)} neurons. Ask for fewer."
            )
        ranked = [int(i) for i in worth.argsort(descending=True, stable=True)]
        for at in range(0, len(ranked), multiple):
            group = ranked[at : at + multiple]
            groups.append((at > 0, -float(worth[group].sum()), layer, group))
    chosen = sorted(groups)[: max(len(worths), round((1 - drop) * len(groups)))]
    return [sorted(i for *_, of, group in chosen if of == layer for i in group) for layer in range(len(worths))]


def fold(linear: Any, columns: Sequence[int], moments: torch.Tensor) -> None:
    """Change the weights of these columns, and the bias, so that they alone answer as all columns did.

    Ridge regression on the moments: of V that uses the columns K alone, the least |(W - V) x|^2 + r |V - W|^2.
    """
    import torch

    old = torch.cat([linear.weight.data, linear.bias.data.unsqueeze(1)], dim=1).double()
    stay = [*columns, old.shape[1] - 1]
    ridge = RIDGE * moments.diagonal()[stay].double().mean()
    if ridge == 0:  # nothing depends on this layer
        return
    pulled = moments.double() + ridge * torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    new = torch.linalg.solve(pulled[stay][:, stay], (old @ pulled[:, stay]).T).T
    linear.weight.data[:, list(columns)] = new[:, :-1].to(linear.weight.dtype)
    linear.bias.data = new[:, -1].to(linear.bias.dtype)


def _keep_rows(linear: Any, rows: Sequence[int]) -> None:
    linear.weight.data = linear.weight.data[list(rows)].clone()
    linear.bias.data = linear.bias.data[list(rows)].clone()
    linear.out_features = len(rows)


def _keep_columns(linear: Any, columns: Sequence[int]) -> None:
    linear.weight.data = linear.weight.data[:, list(columns)].clone()
    linear.in_features = len(columns)


def recover(
    model: torch.nn.Module,
    whole: torch.nn.Module,
    tokenizer: hf.Tokenizer,
    train: training.Split,
    validation: training.Split,
    config: Config,
) -> Metrics:
    """Let the pruned model learn from the teacher again, or from the labels alone, and follow its own whole states."""
    import torch

    if config.teacher:
        place = Path(config.teacher)
        answers_NL = imitation.ask(hf.load(place), hf.tokenizer(place, hf.max_length(place)), train)
    else:
        known: Any = whole.config
        answers_NL = torch.zeros(len(train.texts), known.num_labels)
        config = config.model_copy(update={"mixing": 0.0})
    loss = imitation.lesson(config, train, tokenizer.mask, answers_NL, whole, range(len(hf.layers(model))))
    return training.fit(model, tokenizer, train, validation, config, loss, "recovering")
