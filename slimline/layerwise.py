"""A language model one layer at a time: what calibrates and rewrites models that need not fit into memory.

The calibration text goes through the embedding once; then every layer in turn is filled with its weights, changed, run
in its changed form to make the next one's inputs, written as a shard, and let go. So each layer is calibrated on what
the changed layers before it give, as it will be when it serves (Frantar et al., 2022, arXiv 2210.17323), and memory is
one layer, its calibration inputs and whatever the change itself needs. A layer that an earlier, killed try has written
is read back instead of made again, and what comes out is the same to the byte.

    for layer in walk(source, out, tokens_NT):
        layer.store(...)        # every layer is stored exactly once

A layer is gone when the next one comes: what is to be summed over layers goes into `layer.numbers`, which is written
with the layer and so outlives a kill, and comes out of `walk` in `totals`. With several GPUs each works on its part of
the samples, on a copy of the layer.

Shapes: N = windows of calibration text, T = tokens of one, W = width, I = inputs of a map, O = its outputs.
"""

# Long because what a layer sees, how it is changed and how it comes back after a kill must agree to the byte.
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimline import activations, decoder, hf, packed
from slimline.decoder import Family
from slimline.errors import ModelError
from slimline.shards import Weights, Writer
from slimline.technique import track

if TYPE_CHECKING:
    import torch

    Measure = Callable[..., torch.Tensor]
    """(inputs [tokens, I] of one batch, float32) -> a new tensor of a fixed shape that can be summed over batches."""
    Change = Callable[[str, torch.Tensor], torch.Tensor | dict[str, torch.Tensor]]
    """(name, tensor) -> the tensor to store in its place, or several by name, for what lies around the layers."""

TOKENS_AT_ONCE = 2048
"""Calibration tokens that go through a layer together."""


@dataclass
class Layer:
    """One layer in float32 with its weights in place, and what goes into it."""

    index: int
    name: str
    """Such as model.layers.3."""
    module: Any
    kind: Family
    hidden_NTW: torch.Tensor
    """What enters the layer, once all before it were changed; empty without calibration text."""
    call: Call
    devices: Sequence[str]
    target_NTW: torch.Tensor | None = None
    """With `original`, or in `look`: what the source's own layer makes of what entered it in the source."""
    source_NTW: torch.Tensor | None = None
    """With `original`: what entered the layer in the source."""
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    """What is to be summed over all layers, such as a squared error."""

    def map(self, name: str) -> Any:
        """A linear map by its name within the layer."""
        return self.module.get_submodule(name)

    def weight(self, name: str) -> torch.Tensor:
        """A map's matrix [O, I]: a view that may be written to."""
        weight: torch.Tensor = self.map(name).weight.data
        return weight.T if self.kind.transposed else weight

    def forward(self, hidden_BTW: torch.Tensor, module: Any = None) -> torch.Tensor:
        """What the layer (or a copy of it) makes of some windows, on the device of its weights. Keeps gradients."""
        module = self.module if module is None else module
        device = next(module.parameters()).device
        answer: torch.Tensor = module(
            hidden_BTW.to(device), *_moved(self.call.args, device), **_moved(self.call.kwargs, device)
        )
        return answer

    def batches(self) -> list[slice]:
        """The windows in pieces that go through the layer together."""
        windows, tokens = self.hidden_NTW.shape[:2]
        size = max(1, TOKENS_AT_ONCE // max(1, tokens))
        return [slice(at, at + size) for at in range(0, windows, size)]

    def measure(
        self,
        names: Sequence[str],
        measure: Measure,
        combine: Callable[[Any, Any], Any] | None = None,
        beside: Any = None,
    ) -> dict[str, torch.Tensor]:
        """What `measure` says of each map's inputs, summed (or combined) over all calibration text.

        With `beside`, a copy of the source's layer, it is also told what enters the map there, row for row, when the
        source's own inputs (`source_NTW`) go through it.
        """
        combine = combine or (lambda total, value: total.add_(value))  # in place: a Hessian can be gigabytes
        found: dict[str, torch.Tensor] = {}

        def part(module: Any, batches: Sequence[slice]) -> dict[str, torch.Tensor]:
            own: dict[str, torch.Tensor] = {}
            other = None if beside is None else self._on_device_of(module, beside)
            for rows in batches:
                heard = self.hear(names, self.hidden_NTW[rows], module)
                there = {}
                if other is not None and self.source_NTW is not None:
                    there = self.hear(names, self.source_NTW[rows], other)
                for name, inputs in heard.items():
                    value = measure(inputs, there[name]) if there else measure(inputs)
                    own[name] = value if name not in own else combine(own[name], value)
            return own

        for own in self._spread(part):
            for name, value in own.items():
                here = value.to(self.devices[0])
                found[name] = here if name not in found else combine(found[name], here)
        return found

    def hear(self, names: Sequence[str], hidden_BTW: torch.Tensor, module: Any = None) -> dict[str, torch.Tensor]:
        """[tokens, I] float32: what enters each of these maps. The layer runs no further than the last of them."""
        import torch

        module = self.module if module is None else module
        heard: dict[str, torch.Tensor] = {}

        def listener(name: str) -> Callable[[Any, Any], None]:
            def hear(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                heard[name] = inputs[0].detach().flatten(0, -2).float()
                if len(heard) == len(names):
                    raise _HeardAll

            return hear

        with torch.no_grad(), ExitStack() as stack:
            for name in names:
                stack.callback(module.get_submodule(name).register_forward_pre_hook(listener(name)).remove)
            stack.enter_context(suppress(_HeardAll))
            self.forward(hidden_BTW, module)
        return heard

    def _on_device_of(self, module: Any, other: Any) -> Any:
        device = next(module.parameters()).device
        return other if next(other.parameters()).device == device else copy.deepcopy(other).to(device)

    def outputs(self, inputs_NTW: torch.Tensor | None = None, into: torch.Tensor | None = None) -> torch.Tensor:
        """[N, T, W]: what the layer, as it is now, makes of its inputs (or others). `into` may be those inputs."""
        import torch

        given = self.hidden_NTW if inputs_NTW is None else inputs_NTW
        outputs_NTW = torch.empty_like(given) if into is None else into

        def part(module: Any, batches: Sequence[slice]) -> None:
            with torch.no_grad():
                for rows in batches:
                    outputs_NTW[rows] = self.forward(given[rows], module).to(outputs_NTW)

        self._spread(part)
        return outputs_NTW

    def _spread(self, part: Callable[[Any, Sequence[slice]], Any]) -> list[Any]:
        """Run `part` on every device, each with its share of the batches and a copy of the layer."""
        batches = self.batches()
        if len(self.devices) == 1:
            return [part(self.module, batches)]
        shares = [batches[i :: len(self.devices)] for i in range(len(self.devices))]
        copies = [self.module, *(copy.deepcopy(self.module).to(device) for device in self.devices[1:])]
        with ThreadPoolExecutor(len(copies)) as pool:
            return list(pool.map(part, copies, shares))

    def store(self, packing: dict[str, dict[str, torch.Tensor]] | None = None) -> None:
        """Write the layer as its module is now, but for the maps in `packing`, which are written in these parts.

        Parts are by what follows the map's name, as `packed.pack` gives them; the module's own weight is set to
        what a reader will make of them, so that the layers after it are calibrated on that.
        """
        state = {k: v for k, v in self.module.state_dict().items() if v.device.type != "meta"}
        for name, parts in (packing or {}).items():
            del state[f"{name}.weight"]
            state |= {name + part: tensor for part, tensor in parts.items()}
            whole = packed.Packing.anything(self.name).read(f"{name}.weight", state.__getitem__, state)
            self.weight(name).copy_(whole)
        self.stored = {k: v.detach() for k, v in state.items()}


class _HeardAll(Exception):
    """Every map that was listened to has been entered."""


@dataclass
class Call:
    """What a layer is called with beside its inputs: masks and positions, as its family makes them."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def walk(
    source: Path,
    out: Path,
    tokens_NT: Any = None,
    what: str = "going through the layers",
    original: bool = False,
    change_rest: Change | None = None,
    dtype: str = "",
    devices: Sequence[str] = (),
    totals: dict[str, float] | None = None,
) -> Iterator[Layer]:
    """Every layer in turn, filled. After each, what it stored is written; at the end the rest of the model is, too.

    `tokens_NT`, int64 [N, T], is calibration text; without it layers have no inputs and are not run. `original` runs
    the source's own layers beside the changed ones (see Layer.target_NTW), for three times the memory of inputs. What
    is stored as floats goes back to the type it came in, or to `dtype`, and the next layers see it rounded to that.
    `totals` gets the sums of all layers' `numbers`. config.json is left to the caller.
    """
    values = hf.read_config(source)
    kind, weights = decoder.family(values, source), Weights(source)
    devices = list(devices) or available_devices()
    layers, hidden_NTW, calls = _enter(source, kind, weights, tokens_NT)
    writer = Writer(out, len(layers) + 1)
    original_NTW = hidden_NTW.clone() if original else None
    sums: dict[str, float] = {} if totals is None else totals
    done = next(i for i in range(len(layers) + 2) if not writer.finished(i))
    note = f"resumed at layer {done + 1} of {len(layers)}" if 0 < done < len(layers) else ""
    for i in track(range(len(layers)), what, lambda: note):
        layer = Layer(i, f"{kind.layers}.{i}", layers[i], kind, hidden_NTW, calls[i], devices)
        if original_NTW is not None or i >= done:
            types = _fill(layer, weights)
        if original_NTW is not None:
            layer.source_NTW, layer.target_NTW = original_NTW, layer.outputs(original_NTW)
            original_NTW = layer.target_NTW
        if i < done:
            layer.numbers = writer.numbers(i)
            if tokens_NT is not None:
                _restore(layer, writer)
        else:
            yield layer
            _write(layer, writer, types, dtype)
        for name, number in layer.numbers.items():
            sums[name] = sums.get(name, 0.0) + number
        if tokens_NT is not None and i + 1 < len(layers):
            hidden_NTW = layer.outputs(into=hidden_NTW)
        layers[i] = layer.module = None  # whoever asked for the layer may hold it still when the next one is filled
        layer.stored = {}
        weights.close()
    _rest(kind, weights, writer, len(layers), change_rest, dtype)


def look(
    source: Path, tokens_NT: Any, what: str = "looking at the layers", devices: Sequence[str] = ()
) -> Iterator[Layer]:
    """Every layer in turn, as it is in the source, with `target_NTW` what it makes of its inputs. Writes nothing."""
    values = hf.read_config(source)
    kind, weights = decoder.family(values, source), Weights(source)
    layers, hidden_NTW, calls = _enter(source, kind, weights, tokens_NT)
    for i in track(range(len(layers)), what):
        layer = Layer(i, f"{kind.layers}.{i}", layers[i], kind, hidden_NTW, calls[i], devices or available_devices())
        _fill(layer, weights)
        activations.install(layer.module, weights, values.get("quantization_config") or {}, f"{layer.name}.")
        layer.target_NTW = hidden_NTW = layer.outputs()
        yield layer
        layers[i] = None
        weights.close()


def depth(source: Path) -> int:
    """How many layers a model has."""
    values = hf.read_config(source)
    return int(values.get("num_hidden_layers") or values.get("n_layer") or 0)


def available_devices() -> list[str]:
    """Every GPU, or the processor."""
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def _enter(source: Path, kind: Family, weights: Weights, tokens_NT: Any) -> tuple[list[Any], torch.Tensor, list[Call]]:
    """The empty layers, what enters the first as float32 [N, T, W], and what each is called with beside its inputs.

    The model runs with every layer replaced by one that notes its call and hands its inputs on, so that masks and
    positions are whatever the family makes of them.
    """
    import torch

    model = decoder.frame(source)
    layers = model.get_submodule(kind.layers)
    real = list(layers)
    if tokens_NT is None:
        return real, torch.empty(0, 0, 0), [Call() for _ in real]

    class Noting(torch.nn.Module):
        def forward(self, hidden_BTW: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.hidden_BTW, self.call = hidden_BTW, Call(args, {k: v for k, v in kwargs.items() if k != "use_cache"})
            return hidden_BTW

    tokens_NT = torch.as_tensor(tokens_NT)
    notes = [Noting() for _ in layers]
    for i, note in enumerate(notes):
        layers[i] = note
    table = f"{kind.embedding}.weight"
    around = [n for n in weights.floats() if not n.startswith((f"{kind.layers}.", f"{kind.head}.")) and n != table]
    model.load_state_dict({n: weights.read(n, kind.transposed).float() for n in around}, strict=False, assign=True)
    _embed_only(model.get_submodule(kind.embedding), weights.read(table), tokens_NT.unique())
    hidden_NTW = torch.empty(0)
    with torch.no_grad():
        for at in range(len(tokens_NT)):
            model.base_model(input_ids=tokens_NT[at : at + 1], use_cache=False)
            row_1TW = notes[0].hidden_BTW
            hidden_NTW = hidden_NTW if at else row_1TW.new_empty(len(tokens_NT), *row_1TW.shape[1:])
            hidden_NTW[at] = row_1TW[0]
    weights.close()
    return real, hidden_NTW, [note.call for note in notes]


def _embed_only(embedding: Any, table_VW: torch.Tensor, used_U: torch.Tensor) -> None:
    """Give an embedding the rows of these tokens alone, in float32: a whole one may be larger than a layer."""
    import torch

    embedding.padding_idx = None
    embedding.weight = torch.nn.Parameter(table_VW[used_U].float(), requires_grad=False)
    embedding.register_forward_pre_hook(lambda _, ids: (torch.searchsorted(used_U, ids[0]),))


def _fill(layer: Layer, weights: Weights) -> dict[str, torch.dtype]:
    """Give the layer the source's weights, in float32. Returns the types that they are stored in."""
    names = weights.below(layer.name)
    state = {name.removeprefix(f"{layer.name}."): weights.read(name, layer.kind.transposed) for name in names}
    types = {name: tensor.dtype for name, tensor in state.items()}
    _give(layer, state, str(weights.folder))
    return types


def _restore(layer: Layer, writer: Writer) -> None:
    """Give the layer the weights that an earlier try has written."""
    state = {name.removeprefix(f"{layer.name}."): tensor for name, tensor in writer.read(layer.index)}
    packing = packed.Packing.anything(layer.name)
    names = dict.fromkeys(packing.plain_name(name) for name in state)
    whole = {n: packing.read(n, state.__getitem__, state) if packing.packs(n, state) else state[n] for n in names}
    if layer.kind.transposed:
        whole |= {n: v.T.contiguous() for n, v in whole.items() if packing.packs(n, state)}
    _give(layer, whole, str(writer.out))


def _give(layer: Layer, state: dict[str, torch.Tensor], where: str) -> None:
    import torch

    state = {name: tensor.to(layer.devices[0], torch.float32) for name, tensor in state.items()}
    layer.module.load_state_dict(state, strict=False, assign=True)
    empty = [name for name, p in layer.module.named_parameters() if p.device.type == "meta"]
    if empty:
        raise ModelError(f"{where} lacks {layer.name}.{empty[0]}. Is the checkpoint whole?")
    layer.module.to(layer.devices[0]).requires_grad_(False)


def _write(layer: Layer, writer: Writer, types: dict[str, torch.dtype], dtype: str) -> None:
    """Write what the layer stored, and leave in the layer what a reader will find: floats rounded to their type."""
    if not layer.stored:
        raise AssertionError(f"{layer.name} was not stored")
    kinds = {name: _kept(name, tensor, types, dtype) for name, tensor in layer.stored.items()}
    for name, tensor in layer.stored.items():
        if kinds[name] != tensor.dtype:
            tensor.copy_(tensor.to(kinds[name]))
    tensors = {f"{layer.name}.{name}": tensor for name, tensor in layer.stored.items()}
    writer.write(layer.index, tensors, {f"{layer.name}.{name}": kind for name, kind in kinds.items()}, layer.numbers)


def _kept(name: str, tensor: torch.Tensor, types: dict[str, torch.dtype], dtype: str) -> torch.dtype:
    """The type that a tensor is stored in: parts of packed matrices are what they are."""
    import torch

    if name not in types or not tensor.is_floating_point() or tensor.dtype == torch.float8_e4m3fn:
        return tensor.dtype
    return getattr(torch, dtype) if dtype else types[name]


def _rest(kind: Family, weights: Weights, writer: Writer, number: int, change: Change | None, dtype: str) -> None:
    """Write what lies around the layers and name the shards. What is not changed passes through as it is mapped."""
    if not writer.finished(number):
        tensors, kinds = {}, {}
        for name in (name for name in weights.stored() if not name.startswith(f"{kind.layers}.")):
            tensor = weights.raw(name)
            changed = change(name, tensor.float()) if change else tensor
            for key, value in (changed if isinstance(changed, dict) else {name: changed}).items():
                kinds[key] = _kept(key, value, {key: tensor.dtype}, dtype)
                tensors[key] = value.to(kinds[key]) if change else value
        writer.write(number, tensors, kinds)
    writer.finish()


def _moved(value: Any, device: Any) -> Any:
    """A call's arguments on a device, at any depth."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(v, device) for v in value)
    return value
