"""Rounding weights a column at a time so that what follows makes up for each error: the core of GPTQ.

Of all ways to round W [O, I], the one sought loses least of the map's output on calibration inputs X [tokens, I]:

    |X Q' - Y|^2 = trace((Q - W*) H (Q - W*)') + what no Q can change,      H = X' X

Y is what the map should give. If that is what W gives on X, then W* = W. If it is what W gave in the source on the
inputs Z that it had there, W* = W + W (Z - X)' X H^-1, which makes up for what the layers before have lost (the aim of
GPTAQ: Li et al., 2025, arXiv 2504.02692; there the correction is made column by column, here at once).

`spread` rounds one column after the other and spreads the error of each over those still to come as H says best
(Frantar et al., 2022, arXiv 2210.17323). `sweep` then goes through all columns again: each scale moves to the best for
its numbers, each number to the best given all others, and the loss can only fall.

Shapes: O = outputs, I = inputs, G = groups of inputs that share a scale, C = inputs of one, B = columns of a block.
"""

# Long because each step makes up for what the one before it leaves: they are read together.
from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from slimline import grid
from slimline.errors import ModelError
from slimline.grid import GridConfig
from slimline.packed import Integers, Scheme
from slimline.passages import Passages

if TYPE_CHECKING:
    import torch

    from slimline.layerwise import Layer

TRIES = 8
"""How many dampings are tried, each tenfold the one before."""


class Rounding(GridConfig, Passages):
    """Options of all that round by second moments of the inputs."""

    windows: int = Field(32, ge=1, description="pieces of text that are drawn, at the most")
    damp: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a fraction of its mean")
    act_order: bool = Field(True, description="round the loudest inputs first, on scales that are fixed before")
    block: int = Field(128, ge=1, description="columns that are rounded before those beyond them are told")
    true_sequential: bool = Field(True, description="calibrate maps on the rounded ones before them in their layer")
    correction: float = Field(0.5, ge=0, le=1, description="share of what earlier layers have lost that is made up for")
    sweeps: int = Field(2, ge=0, description="times that scales and numbers move to the best given all others")


class Moments(NamedTuple):
    """What enters a map, on all calibration text."""

    hessian_II: torch.Tensor
    """X' X."""
    cross_II: torch.Tensor | None = None
    """(Z - X)' X, where Z entered it in the source; None where nothing is made up for."""


class Factor(NamedTuple):
    """A damped Hessian and the root of its inverse."""

    hessian_II: torch.Tensor
    root_II: torch.Tensor
    """Upper triangular U with U' U = H^-1, rows and columns in the order that columns are visited."""
    damp: float
    """What it took, as a fraction of the diagonal's mean."""


class Rounded(NamedTuple):
    """A matrix in whole numbers, and how that went."""

    whole: Integers
    loss: float
    """|X Q' - X W*'|^2, damped."""
    output: float
    """|X W*'|^2, damped."""
    damp: float


def round_layer(layer: Layer, schemes: Mapping[str, Scheme], config: Rounding) -> dict[str, Rounded]:
    """Every map of a layer, rounded to its scheme on what the changed layers before it give.

    The layer is of `walk(original=True)` if `config.correction` is not 0. With `true_sequential` its maps are left
    rounded.
    """
    source = copy.deepcopy(layer.module) if config.correction else None
    groups, found = layer.kind.readers, {}
    known = {} if config.true_sequential else moments(layer, [group[0] for group in groups], source)
    for group in groups:
        seen = known.get(group[0]) or moments(layer, [group[0]], source)[group[0]]
        for name in group:
            found[name] = quantize(layer.weight(name), seen, schemes[name], config, f"{layer.name}.{name}")
        if config.true_sequential:
            for name in group:
                layer.weight(name).copy_(found[name].whole.floats())
    return found


def moments(layer: Layer, names: list[str], source: Any = None) -> dict[str, Moments]:
    """What enters each of these maps; with `source`, a copy of the layer before it was changed, also what did there."""
    import torch

    if source is None:
        return {name: Moments(both) for name, both in layer.measure(names, lambda x_TI: x_TI.T @ x_TI).items()}
    found = layer.measure(names, lambda x_TI, z_TI: torch.stack((x_TI.T @ x_TI, (z_TI - x_TI).T @ x_TI)), beside=source)
    return {name: Moments(both[0], both[1]) for name, both in found.items()}


def quantize(weight_OI: torch.Tensor, seen: Moments, scheme: Scheme, config: Rounding, name: str = "a map") -> Rounded:
    """A matrix rounded to its scheme with the least loss that spreading and sweeping find. Raises as `factor` does."""
    import torch

    loud_I = seen.hessian_II.diagonal()
    order_I = torch.arange(len(loud_I), device=loud_I.device)
    if config.act_order:
        order_I = torch.argsort(loud_I, descending=True, stable=True)  # stable: equal inputs keep their order
    made = factor(seen.hessian_II, config.damp, order_I, name)
    hessian_II = made.hessian_II.to(weight_OI)
    target_OI = weight_OI.contiguous()
    if seen.cross_II is not None:
        target_OI = target_OI + config.correction * correction(weight_OI, seen.cross_II, made.root_II, order_I)
    size = scheme.group_size or len(loud_I)
    scale_OG, zero_OG = grid.fit(target_OI, scheme, hessian_II.diagonal(), config.search)
    start = Integers(torch.empty(target_OI.shape, dtype=torch.int8, device=target_OI.device), scale_OG, zero_OG)

    def refit(columns_OC: torch.Tensor, group: int) -> None:
        """In the order of the columns a group's scale is of what the errors before it have made of its weights."""
        inside = slice(group * size, (group + 1) * size)
        scale_O1, zero_O1 = grid.fit(columns_OC, scheme, hessian_II.diagonal()[inside], config.search)
        scale_OG[:, group] = scale_O1[:, 0]
        if zero_OG is not None and zero_O1 is not None:
            zero_OG[:, group] = zero_O1[:, 0]

    block = config.block if config.act_order else -(-config.block // size) * size  # groups do not cross blocks
    whole = spread(
        target_OI, made.root_II.to(weight_OI), start, scheme.bits, order_I, block, None if config.act_order else refit
    )
    for _ in range(config.sweeps):
        whole = sweep(target_OI, hessian_II, whole, scheme.bits, config.block)
    output = float(((target_OI @ hessian_II) * target_OI).sum())
    return Rounded(whole, loss(target_OI, hessian_II, whole), output, made.damp)


def factor(hessian_II: torch.Tensor, damp: float, order_I: torch.Tensor, name: str = "a map") -> Factor:
    """Damp until the inverse has a root, in float64; the damping grows tenfold until that succeeds.

    An input that was always silent is left alone with the damping, so that its weights are rounded to the nearest.
    Raises ModelError if the Hessian is not finite, or if no damping helps.
    """
    import torch

    whole_II = hessian_II.to(torch.float64, copy=True)
    if not torch.isfinite(whole_II).all():
        raise ModelError(f"what enters {name} is not finite on the calibration text. Is the checkpoint whole?")
    loud_I = whole_II.diagonal().clone()
    mean = float(loud_I.mean())
    for tried in range(TRIES):
        taken = damp * 10**tried
        # in place, and each step's matrix let go before the next one's: one of 28672 inputs is 6.6 GB
        whole_II.diagonal().copy_(loud_I + (taken * mean if mean > 0 else 1.0))
        lower_II, failed = torch.linalg.cholesky_ex(whole_II[order_I[:, None], order_I])
        if not failed:
            inverse_II = torch.cholesky_inverse(lower_II)
            del lower_II
            root_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
            del inverse_II
            if not failed and torch.isfinite(root_II).all():
                return Factor(whole_II, root_II, taken)
    raise ModelError(
        f"the second moments of what enters {name} cannot be inverted, even damped by {taken:g} of their mean. "
        "Calibrate on more text, or ask for a higher damp."
    )


def correction(
    weight_OI: torch.Tensor, cross_II: torch.Tensor, root_II: torch.Tensor, order_I: torch.Tensor
) -> torch.Tensor:
    """W (Z - X)' X H^-1: what has to be added to W so that it gives on X what it gave on Z, as nearly as can be."""
    import torch

    moved_OI = (weight_OI.double() @ cross_II.double())[:, order_I]
    added_OI: torch.Tensor = (moved_OI @ root_II.T @ root_II)[:, torch.argsort(order_I)].to(weight_OI)
    return added_OI


def spread(
    weight_OI: torch.Tensor, root_II: torch.Tensor, start: Integers, bits: int, order_I: torch.Tensor, block: int,
    refit: Callable[[torch.Tensor, int], None] | None = None,
) -> Integers:  # fmt: skip
    """Columns rounded to the nearest in `order_I`, the error of each spread over those that come after it.

    Scales and zero points are those of `start`; with `refit` they are written anew, in place, when the first column of
    a group is reached. Columns beyond a block are told of its errors all at once, which only saves time.
    """
    import torch

    left_OI, numbers_OI = weight_OI[:, order_I], torch.empty_like(start.numbers_OI)
    size = weight_OI.shape[1] // start.scale_OG.shape[1]
    if on_gpu := has_kernels(weight_OI):
        block = narrow(block, size if refit else 0)
    for first in range(0, left_OI.shape[1], block):
        here = slice(first, min(first + block, left_OI.shape[1]))
        if on_gpu:
            if refit is not None and first % size == 0:
                refit(left_OI[:, first : first + size], int(order_I[first]) // size)
            numbers_OI[:, order_I[here]], errors_OB = _spread_at_once(left_OI, root_II, start, bits, order_I, here)
            left_OI[:, here.stop :] -= errors_OB @ root_II[here, here.stop :]
            continue
        errors_OB = torch.empty_like(left_OI[:, here])
        for i, column in enumerate(order_I[here].tolist(), first):
            group = column // size
            if refit is not None and i % size == 0:
                refit(left_OI[:, i : i + size], group)
            scale_O = start.scale_OG[:, group].to(left_OI)
            zero_O = 0 if start.zero_OG is None else start.zero_OG[:, group].to(left_OI)
            number_O = (left_OI[:, i] / scale_O + zero_O).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            numbers_OI[:, column] = number_O
            errors_OB[:, i - first] = (left_OI[:, i] - (number_O - zero_O) * scale_O) / root_II[i, i]
            left_OI[:, i : here.stop] -= errors_OB[:, i - first, None] * root_II[i, i : here.stop]
        left_OI[:, here.stop :] -= errors_OB @ root_II[here, here.stop :]
    return Integers(numbers_OI, start.scale_OG, start.zero_OG)


def _spread_at_once(
    left_OI: torch.Tensor, root_II: torch.Tensor, start: Integers, bits: int, order_I: torch.Tensor, here: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """(numbers, errors) of a block on a GPU, in one kernel."""
    import torch

    from slimline import columns

    group_B = order_I[here] // (left_OI.shape[1] // start.scale_OG.shape[1])
    scale_OB = start.scale_OG[:, group_B].to(left_OI)
    zero_OB = torch.zeros_like(scale_OB) if start.zero_OG is None else start.zero_OG[:, group_B].to(left_OI)
    return columns.spread(left_OI[:, here], root_II[here, here], scale_OB, zero_OB, bits)


def has_kernels(weight_OI: torch.Tensor) -> bool:
    """Whether this matrix's columns can be rounded by columns.py."""
    import torch

    kind = weight_OI.dtype == torch.float32
    return kind and weight_OI.is_cuda and importlib.util.find_spec("triton") is not None


def narrow(block: int, size: int) -> int:
    """Columns of a kernel's block: at most 128, and a divisor of `size` if that is not 0.

    What lies beyond a block is told of its errors at once, so how wide it is changes only rounding's last bit.
    """
    most = min(block, 128)
    return max(n for n in range(1, most + 1) if size % n == 0) if size else most


def sweep(weight_OI: torch.Tensor, hessian_II: torch.Tensor, whole: Integers, bits: int, block: int) -> Integers:
    """Each group's scale moved to the best for its numbers, then each number to the best given all others, in order.

    `loss` does not rise. Zero points stay.
    """
    import torch

    numbers_OI, scale_OG = whole.numbers_OI.to(weight_OI), whole.scale_OG.clone()
    size = numbers_OI.shape[1] // scale_OG.shape[1]
    slope_OI = (whole.floats().to(weight_OI) - weight_OI) @ hessian_II  # half the derivative of the loss
    if on_gpu := has_kernels(weight_OI):
        from slimline import columns

        block = narrow(block, 0)
    for group in range(scale_OG.shape[1]):
        inside = slice(group * size, (group + 1) * size)
        level_OC = numbers_OI[:, inside] - (0 if whole.zero_OG is None else whole.zero_OG[:, group, None])
        scale_O = _best_scale(level_OC, slope_OI[:, inside], hessian_II[inside, inside], scale_OG[:, group])
        moved_O = scale_O.to(weight_OI) - scale_OG[:, group].to(weight_OI)
        slope_OI += (moved_O[:, None] * level_OC) @ hessian_II[inside]
        scale_OG[:, group] = scale_O
        for first in range(inside.start, inside.stop, block):
            here = slice(first, min(first + block, inside.stop))
            if on_gpu:
                numbers_OI[:, here], moved_OB = columns.sweep(
                    slope_OI[:, here], hessian_II[here, here], scale_O.to(weight_OI), numbers_OI[:, here], bits
                )
                slope_OI += moved_OB @ hessian_II[here]
                continue
            slope_OB, within_BB = slope_OI[:, here].clone(), hessian_II[here, here]
            moved_OB = torch.empty_like(slope_OB)
            for i in range(slope_OB.shape[1]):
                number_O = numbers_OI[:, first + i].clone()
                best_O = number_O - slope_OB[:, i] / (within_BB[i, i] * scale_O.to(weight_OI))
                numbers_OI[:, first + i] = best_O.round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                moved_OB[:, i] = (best_O - number_O) * scale_O.to(weight_OI)
                slope_OB += moved_OB[:, i, None] * within_BB[i]
            slope_OI += moved_OB @ hessian_II[here]
    return Integers(numbers_OI.to(torch.int8), scale_OG, whole.zero_OG)


def _best_scale(
    level_OC: torch.Tensor, slope_OC: torch.Tensor, hessian_CC: torch.Tensor, scale_O: torch.Tensor
) -> torch.Tensor:
    """float16 [O]: the scale with the least loss for numbers less zero points `level_OC`, or the one there is."""
    import torch

    falls_O, bends_O = (level_OC * slope_OC).sum(1), ((level_OC @ hessian_CC) * level_OC).sum(1)
    old_O, limits = scale_O.to(slope_OC), torch.finfo(torch.float16)
    best_O = (old_O - falls_O / bends_O).nan_to_num(0).clamp(limits.tiny, limits.max).half()
    step_O = best_O.to(slope_OC) - old_O
    return torch.where(2 * step_O * falls_O + step_O.square() * bends_O < 0, best_O, scale_O)


def loss(weight_OI: torch.Tensor, hessian_II: torch.Tensor, whole: Integers) -> float:
    """trace((Q - W) H (Q - W)')."""
    gone_OI = whole.floats().to(weight_OI) - weight_OI
    return float(((gone_OI @ hessian_II) * gone_OI).sum())


def numbers(found: Mapping[str, Rounded]) -> dict[str, float]:
    """What a layer's maps add to the `totals` that `metrics` reads."""
    sums = {"loss": sum(one.loss for one in found.values()), "output": sum(one.output for one in found.values())}
    for one in found.values():
        sums[f"damp {one.damp!r}"] = sums.get(f"damp {one.damp!r}", 0.0) + 1
    return sums


def metrics(totals: Mapping[str, float], damp: float) -> dict[str, float]:
    """How rounding went: the part of all outputs that is lost, and how many maps needed more damping than `damp`."""
    maps = {float(name.removeprefix("damp ")): n for name, n in totals.items() if name.startswith("damp ")}
    return {
        "relative_error": (totals["loss"] / (totals["output"] or 1.0)) ** 0.5,
        "damped_maps": sum(n for taken, n in maps.items() if taken > damp),
        "most_damping": max(maps),
    }
