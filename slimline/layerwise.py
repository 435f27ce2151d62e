"""A language model one layer at a time: what calibrates and rewrites models that need not fit into memory.

The calibration text goes through the embedding once; then every layer in turn is filled with its weights, changed, run
in its changed form to make the next one's inputs, written as a shard, and let go. So each layer is calibrated on what
the changed layers before it give, as it will be when it serves (Frantar et al., 2022, arXiv 2210.17323), and memory is
one layer, its calibration inputs and whatever the change itself needs. A layer that an earlier, killed try has written
is read back instead of made again.

    for layer in walk(source, out, tokens_NT):
        layer.store(...)        # every layer is stored exactly once

With several GPUs each works on its part of the samples, on a copy of the layer.

Shapes: N = windows of calibration text, T = tokens of one, W = width, I = inputs of a map, O = its outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimline import decoder, hf, packed
from slimline.decoder import Family
from slimline.errors import ModelError
from slimline.shards import Weights, Writer
from slimline.technique import track

if TYPE_CHECKING:
    import torch

    Measure = Callable[[torch.Tensor], torch.Tensor]
    """(inputs [tokens, I] of one batch, float32) -> something of a fixed shape that can be summed over batches."""
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
    """With `original`: what the source's own layer makes of what entered it in the source."""
    stored: dict[str, torch.Tensor] = field(default_factory=dict)

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
        self, names: Sequence[str], measure: Measure, combine: Callable[[Any, Any], Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """What `measure` says of each map's inputs, summed (or combined) over all calibration text."""
        import torch

        combine = combine or torch.add
        found: dict[str, torch.Tensor] = {}

        def part(module: Any, batches: Sequence[slice]) -> dict[str, torch.Tensor]:
            own: dict[str, torch.Tensor] = {}

            def listener(name: str) -> Callable[[Any, Any], None]:
                def hear(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                    value = measure(inputs[0].detach().flatten(0, -2).float())
                    own[name] = value if name not in own else combine(own[name], value)

                return hear

            with torch.no_grad(), ExitStack() as stack:
                for name in names:
                    stack.callback(module.get_submodule(name).register_forward_pre_hook(listener(name)).remove)
                for rows in batches:
                    self.forward(self.hidden_NTW[rows], module)
            return own

        for own in self._spread(part):
            for name, value in own.items():
                here = value.to(self.devices[0])
                found[name] = here if name not in found else combine(found[name], here)
        return found

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
) -> Iterator[Layer]:
    """Every layer in turn, filled. After each, what it stored is written; at the end the rest of the model is, too.

    `tokens_NT`, int64 [N, T], is calibration text; without it layers have no inputs and are not run. `original` runs
    the source's own layers beside the changed ones (see Layer.target_NTW), for twice the memory of inputs. What is
    stored as floats goes back to the type it came in, or to `dtype`. config.json is left to the caller.
    """
    values = hf.read_config(source)
    kind, weights, writer = decoder.family(values, source), Weights(source), Writer(out)
    devices = list(devices) or available_devices()
    layers, hidden_NTW, calls = _enter(source, kind, weights, tokens_NT)
    original_NTW = hidden_NTW.clone() if original else None
    for i in track(range(len(layers)), what):
        layer = Layer(i, f"{kind.layers}.{i}", layers[i], kind, hidden_NTW, calls[i], devices)
        finished = writer.finished(i)
        if original_NTW is not None or not finished:
            types = _fill(layer, weights)
        if original_NTW is not None:
            layer.target_NTW = original_NTW = layer.outputs(original_NTW, into=original_NTW)
        if finished:
            _restore(layer, writer)
        else:
            yield layer
            if not layer.stored:
                raise AssertionError(f"{layer.name} was not stored")
            writer.write(i, {f"{layer.name}.{k}": _typed(k, v, types, dtype) for k, v in layer.stored.items()})
        if tokens_NT is not None and i + 1 < len(layers):
            hidden_NTW = layer.outputs(into=hidden_NTW)
        layers[i] = None
        weights.close()
    _rest(kind, weights, writer, len(layers), change_rest, dtype)


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
    around = [name for name in weights.floats() if not name.startswith((f"{kind.layers}.", f"{kind.head}."))]
    model.load_state_dict({n: weights.read(n, kind.transposed).float() for n in around}, strict=False, assign=True)
    rows = []
    with torch.no_grad():
        for at in range(len(tokens_NT)):
            model.base_model(input_ids=tokens_NT[at : at + 1], use_cache=False)
            rows.append(notes[0].hidden_BTW)
    weights.close()
    return real, torch.cat(rows), [note.call for note in notes]


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
    state = {name: tensor.float().to(layer.devices[0]) for name, tensor in state.items()}
    layer.module.load_state_dict(state, strict=False, assign=True)
    empty = [name for name, p in layer.module.named_parameters() if p.device.type == "meta"]
    if empty:
        raise ModelError(f"{where} lacks {layer.name}.{empty[0]}. Is the checkpoint whole?")
    layer.module.to(layer.devices[0]).requires_grad_(False)


def _typed(name: str, tensor: torch.Tensor, types: dict[str, torch.dtype], dtype: str) -> torch.Tensor:
    """The tensor in the type that it is stored in: parts of packed matrices are what they are."""
    import torch

    if name not in types or not tensor.is_floating_point() or tensor.dtype == torch.float8_e4m3fn:
        return tensor
    return tensor.to(getattr(torch, dtype) if dtype else types[name])


def _rest(kind: Family, weights: Weights, writer: Writer, number: int, change: Change | None, dtype: str) -> None:
    """Write what lies around the layers, a tensor at a time in memory, and name the shards."""
    names = [name for name in weights.stored() if not name.startswith(f"{kind.layers}.")]
    if not writer.finished(number):
        tensors = {}
        for name in names:
            tensor = weights.raw(name)
            changed = change(name, tensor.float()) if change else tensor
            several = changed if isinstance(changed, dict) else {name: changed}
            tensors |= {k: _typed(k, v, {k: tensor.dtype}, dtype) for k, v in several.items()}
        writer.write(number, tensors)
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
