"""Learned rounding: up or down by what the layer's output needs, found by the signs of gradients (SignRound).

Nearest is not best: what one weight loses another can make good. For every layer, an offset of up to half a step for
each weight and a factor for each end of a group's range are learned by sign descent with a falling rate, against what
the source's own layer gives (Cheng et al., 2023, arXiv 2309.05516, known as AutoRound). What is learned starts at the
nearest numbers of the searched grid, the offsets and factors with the least error over all calibration text are kept,
and the stored model is of the same form, size and speed as one that was rounded to the nearest. Needs calibration text,
gradients through one layer at a time, and memory for one layer, four times over, and its inputs, twice.

Shapes: N = windows, T = tokens of one, W = width, O = outputs, I = inputs, G = groups, C = inputs of one group.
"""

# Long because the descent, and the rounding that it descends through with its gradients by hand, are one method.
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from slimline import grid, layerwise, packed, passages
from slimline.grid import GridConfig
from slimline.layerwise import Layer
from slimline.packed import Integers, Scheme
from slimline.passages import Passages
from slimline.technique import Metrics, Stored

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True

NARROWEST, WIDEST = 0.5, 1.25
"""What a range may become, as a factor of the one it starts with."""
CHECKS = 2
"""How often, at least, the error over all text is measured, to keep the best."""


class Config(GridConfig, Passages):
    """The grid, the text, and how it is learned."""

    data: Stored = Field(description="documents to learn on: their split calibration, of which only the text is read")
    windows: int = Field(64, ge=1, le=65_536, description="of that text, drawn by seed")
    length: int = Field(256, ge=2, le=131_072, description="tokens of one window")
    steps: int = Field(80, ge=1, le=10_000, description="of descent for every layer")
    batch: int = Field(4, ge=1, le=1024, description="windows that one step sees")
    rate: float = Field(
        0.0, ge=0, le=0.5, description="what the first step adds, in steps of the grid; falls to 0; 0 for 1 / steps"
    )
    arithmetic: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the layers while learning; auto is bfloat16 where the processor has units for it"
    )
    seed: int = Field(0, ge=0, description="of the windows, and of the order they are seen in")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with every layer's maps packed. Embedding and head stay floats.

    The errors are of layers' outputs, of those layers that this try has learned.
    """
    grid.check(source, config.group_size)
    scheme = config.scheme
    tokens_NT = passages.draw(source, config)
    before = after = size = 0.0
    for layer in layerwise.walk(source, out, tokens_NT, "learning to round", original=True):
        found, errors = learn(layer, config)
        layer.store({name: packed.pack(whole, scheme.bits) for name, whole in found.items()})
        before, after, size = before + errors[0], after + errors[1], size + errors[2]
    grid.finish(source, out, scheme)
    return {
        "bits": float(config.bits),
        "relative_error": (after / size) ** 0.5 if size else 0.0,
        "relative_error_nearest": (before / size) ** 0.5 if size else 0.0,
    }


def learn(layer: Layer, config: Config) -> tuple[dict[str, Integers], tuple[float, float, float]]:
    """The layer's maps in whole numbers, and the sums of squares of its error at first and at last, and of its target.

    The errors are over all windows, between what the rounded layer makes of its inputs and the source's layer of its
    own. The layer's weights are left as they were.
    """
    import torch

    device, target_NTW = layer.devices[0], layer.target_NTW
    assert target_NTW is not None
    lower = torch.bfloat16 if lower_arithmetic(config.arithmetic, device) else torch.float32
    with arithmetic(device, lower):
        loud = layer.measure(layer.kind.maps, lambda inputs: inputs.square().mean(0))
    rounded = {}
    for name in layer.kind.maps:
        start = grid.fit(layer.weight(name), config.scheme, loud[name], config.search)
        rounded[name] = rounding()(layer.weight(name), *start, config.scheme, layer.kind.transposed)
    order = torch.Generator().manual_seed(config.seed * 100_003 + layer.index)
    learned = [parameter for part in rounded.values() for parameter in part.parameters()]
    first_rate = config.rate or 1 / config.steps

    with installed(layer, rounded), arithmetic(device, lower):
        best = [parameter.detach().clone() for parameter in learned]
        first = least = squared_error(layer, target_NTW)
        rows: list[int] = []
        for step in range(config.steps):
            if len(rows) < config.batch:
                rows += torch.randperm(len(target_NTW), generator=order).tolist()
            seen, rows = rows[: config.batch], rows[config.batch :]
            gone_BTW = layer.forward(layer.hidden_NTW[seen]).float() - target_NTW[seen].to(device)
            loss = gone_BTW.square().sum()
            gradients = torch.autograd.grad(loss, learned)
            with torch.no_grad():
                for parameter, gradient in zip(learned, gradients):
                    parameter.sub_(gradient.sign_(), alpha=first_rate * (1 - step / config.steps))
                for part in rounded.values():
                    part.restrict()
            if (step + 1) % max(1, config.steps // CHECKS) == 0 or step + 1 == config.steps:
                error = squared_error(layer, target_NTW)
                if error < least:
                    least, best = error, [parameter.detach().clone() for parameter in learned]
        for parameter, kept in zip(learned, best):
            parameter.data.copy_(kept)
        found = {name: part.integers() for name, part in rounded.items()}
    return found, (first, least, float(target_NTW.double().square().sum()))


def squared_error(layer: Layer, target_NTW: torch.Tensor) -> float:
    """The sum of squares, over all windows, of what the layer as it is now is off its target."""
    import torch

    error = 0.0
    with torch.no_grad():
        for rows in layer.batches():
            gone_BTW = layer.forward(layer.hidden_NTW[rows]) - target_NTW[rows].to(layer.devices[0])
            error += float(gone_BTW.double().square().sum())
    return error


def rounding() -> type[Any]:
    """The class of a map's rounding: a parametrization that turns its matrix into the one that is read back.

    Made on demand, since torch is imported only where it is needed.
    """
    import torch

    class Rounding(torch.nn.Module):
        """Offsets of every weight and factors of every range, straight through in the gradient."""

        def __init__(
            self, weight_OI: Any, scale_OG: Any, zero_OG: Any, scheme: Scheme, transposed: bool = False
        ) -> None:
            super().__init__()
            self.scheme, self.transposed = scheme, transposed
            self.lowest, self.highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
            self.weight_OGC = weight_OI.float().reshape(*scale_OG.shape, -1).contiguous()
            self.scale_OG = scale_OG.float()
            self.zero_OG = None if zero_OG is None else zero_OG.float()
            self.offset_OGC = torch.nn.Parameter(torch.zeros_like(self.weight_OGC))
            ends = 1 if scheme.symmetric else 2
            self.factor_EOG = torch.nn.Parameter(torch.ones(ends, *scale_OG.shape, device=weight_OI.device))

        def ranges(self) -> tuple[torch.Tensor, torch.Tensor | None]:
            """Scale and zero point as they are stored, in float32."""
            if self.zero_OG is None:
                return _through(self.scale_OG * self.factor_EOG[0], _stored), None
            low_OG = (self.lowest - self.zero_OG) * self.scale_OG * self.factor_EOG[0]
            high_OG = (self.highest - self.zero_OG) * self.scale_OG * self.factor_EOG[1]
            scale_OG = _through((high_OG - low_OG) / (self.highest - self.lowest), _stored)
            zero_OG = _through(self.lowest - low_OG / scale_OG, torch.round)
            return scale_OG, zero_OG.clamp(self.lowest, self.highest)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            scale_OG, zero_OG = self.ranges()
            rounded_OGC: torch.Tensor = Snap.apply(  # type: ignore[no-untyped-call]
                self.weight_OGC, self.offset_OGC, scale_OG, zero_OG, self.lowest, self.highest
            )
            matrix_OI = rounded_OGC.flatten(1)
            return matrix_OI.T if self.transposed else matrix_OI

        def restrict(self) -> None:
            """Put what a step has moved too far back to its limits."""
            self.offset_OGC.data.clamp_(-0.5, 0.5)
            self.factor_EOG.data.clamp_(NARROWEST, WIDEST)

        def integers(self) -> Integers:
            """The matrix in the whole numbers that `forward` makes of it."""
            with torch.no_grad():
                scale_OG, zero_OG = self.ranges()
                whole_OGC = _numbers(self.weight_OGC, self.offset_OGC, scale_OG)
                kept_OGC = _cut(whole_OGC, zero_OG, self.lowest, self.highest)
                numbers_OI = (kept_OGC if zero_OG is None else kept_OGC + zero_OG.unsqueeze(2)).flatten(1)
            return Integers(
                numbers_OI.to(torch.int8), scale_OG.half(), None if zero_OG is None else zero_OG.to(torch.int8)
            )

    class Snap(torch.autograd.Function):
        """(round(w / s + v) + z, cut to the grid, - z) * s, and its gradients as if rounding were not there.

        That of v lacks the factor s: of v only the gradient's sign is used.
        """

        @staticmethod
        def forward(ctx: Any, *args: Any) -> torch.Tensor:
            weight_OGC, offset_OGC, scale_OG, zero_OG, lowest, highest = args
            whole_OGC = _numbers(weight_OGC, offset_OGC, scale_OG)
            kept_OGC = _cut(whole_OGC, zero_OG, lowest, highest)
            ctx.save_for_backward(weight_OGC, scale_OG, kept_OGC, kept_OGC == whole_OGC)
            floats_OGC: torch.Tensor = kept_OGC * scale_OG.unsqueeze(2)
            return floats_OGC

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (grad_OGC,) = grads
            weight_OGC, scale_OG, kept_OGC, inside_OGC = ctx.saved_tensors
            within_OGC = torch.where(inside_OGC, grad_OGC, 0.0)
            along_OG = (grad_OGC * kept_OGC).sum(2) - (within_OGC * weight_OGC).sum(2) / scale_OG
            beyond_OG = (within_OGC.sum(2) - grad_OGC.sum(2)) * scale_OG if ctx.needs_input_grad[3] else None
            return None, within_OGC, along_OG, beyond_OG, None, None

    return Rounding


def _numbers(weight_OGC: torch.Tensor, offset_OGC: torch.Tensor, scale_OG: torch.Tensor) -> torch.Tensor:
    """Whole numbers before they are cut to the grid and moved by the zero point."""
    numbers_OGC: torch.Tensor = (weight_OGC / scale_OG.unsqueeze(2)).add_(offset_OGC).round_()
    return numbers_OGC


def _cut(whole_OGC: torch.Tensor, zero_OG: torch.Tensor | None, lowest: int, highest: int) -> torch.Tensor:
    """Whole numbers, still without their zero point, within what the grid holds."""
    if zero_OG is None:
        return whole_OGC.clamp(lowest, highest)
    low_OG1, high_OG1 = (lowest - zero_OG).unsqueeze(2), (highest - zero_OG).unsqueeze(2)
    kept_OGC: torch.Tensor = whole_OGC.maximum(low_OG1).minimum(high_OG1)
    return kept_OGC


def _stored(scale_OG: torch.Tensor) -> torch.Tensor:
    """A scale as it is read back: float16 is what holds it."""
    import torch

    limits = torch.finfo(torch.float16)
    return scale_OG.clamp(limits.tiny, limits.max).half().float()


def _through(value: torch.Tensor, change: Any) -> torch.Tensor:
    """The changed value, with the gradient of the unchanged one."""
    through: torch.Tensor = value + (change(value) - value).detach()
    return through


@contextmanager
def installed(layer: Layer, rounded: dict[str, Any]) -> Iterator[None]:
    """Inside, the layer's maps have the matrices that their roundings make; outside, their own."""
    from torch.nn.utils import parametrize

    try:
        for name, part in rounded.items():
            parametrize.register_parametrization(layer.map(name), "weight", part)
        yield
    finally:
        for name in rounded:
            if parametrize.is_parametrized(layer.map(name)):
                parametrize.remove_parametrizations(layer.map(name), "weight", leave_parametrized=False)


def lower_arithmetic(asked: str, device: str) -> bool:
    """Whether layers run in bfloat16: a processor without units for it is slower so, and so is told by its flags."""
    import torch

    if asked != "auto":
        return asked == "bfloat16"
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_amx_tile_supported())


def arithmetic(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matrix products inside are of this type."""
    import torch

    return torch.autocast(device.partition(":")[0], dtype=dtype, enabled=dtype != torch.float32)
