"""Inputs of maps rounded to 8 bits, as a model whose config.json asks for that is run by what serves it.

Weights of such a model are 8 bits wide and so are the inputs they multiply: whole numbers or E4M3 floats, with a scale
for each token that is found while running (dynamic) or one for a map that was calibrated (static, `input_scale`). What
a server does in integers is done here in floats, number by number the same (compressed-tensors 0.20), so that
evaluation sees what rounding the inputs costs. decoder.load puts this in place.

Shapes: B = texts, T = tokens, I = inputs of a map, O = outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slimline.errors import ModelError
from slimline.packed import INPUT_SCALE, SCALE

if TYPE_CHECKING:
    import torch

    from slimline.shards import Weights

LARGEST = {"int": 127.5, "float": 448.0}
"""What the largest input becomes in units of the scale, by kind: half of the 255 steps, or the largest E4M3 number."""


def scale(largest: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale with which values up to `largest` fill the 8 bits; 1 where all are 0."""
    import torch

    return torch.where(largest > 0, largest / LARGEST[kind], 1.0)


def rounded(values: torch.Tensor, scales: torch.Tensor, kind: str) -> torch.Tensor:
    """The values that 8 bits hold in their place: what lies beyond the largest becomes the largest."""
    import torch

    steps = values.float() / scales
    float8 = torch.float8_e4m3fn
    kept = steps.clamp(-448, 448).to(float8).float() if kind == "float" else steps.round().clamp(-128, 127)
    near: torch.Tensor = (kept * scales).to(values.dtype)
    return near


def by_token(values_BTI: torch.Tensor, kind: str) -> torch.Tensor:
    """Every token's values with a scale of its own."""
    return rounded(values_BTI, scale(values_BTI.float().abs().amax(-1, keepdim=True), kind), kind)


def asked(settings: dict[str, Any], name: str, where: str) -> tuple[str, bool] | None:
    """(kind, whether dynamic) of the inputs of a map of this whole name, by a `quantization_config`; None for floats.

    Raises ModelError for inputs that are rounded in another way than is done here.
    """
    for group in (settings.get("config_groups") or {}).values():
        inputs = group.get("input_activations")
        if not inputs or not any(_targets(target, name) for target in group.get("targets", ())):
            continue
        dynamic, kind, strategy = bool(inputs.get("dynamic")), str(inputs.get("type")), inputs.get("strategy")
        form = (inputs.get("num_bits"), inputs.get("symmetric"), kind in LARGEST, strategy)
        if form != (8, True, True, "token" if dynamic else "tensor"):
            raise ModelError(
                f"{where} rounds its inputs in a way that is not known here ({inputs}). Of 8 bits, symmetric, a token "
                "at a time while running or a tensor at a time beforehand, int and float are."
            )
        return kind, dynamic
    return None


def kinds(settings: dict[str, Any]) -> set[str]:
    """What a `quantization_config` asks inputs to be rounded to, anywhere: int, float, both or nothing."""
    groups = (settings.get("config_groups") or {}).values()
    return {str(group["input_activations"].get("type")) for group in groups if group.get("input_activations")}


def _targets(target: str, name: str) -> bool:
    return target in ("Linear", name) or (target.startswith("re:") and re.match(target[3:], name) is not None)


def install(model: Any, weights: Weights, settings: dict[str, Any], within: str = "") -> None:
    """Let every map with 8-bit weights round its inputs from now on, where the settings ask for it.

    `within` is what whole names begin with where `model` is a part of one, such as 'model.layers.3.'.
    Raises ModelError if they are rounded in a way that is not known here, or a scale is missing.
    """
    stored = [name for name in weights.stored() if name.startswith(within) and name.endswith(SCALE)]
    for name in [name.removesuffix(SCALE) for name in stored]:
        if not (how := asked(settings, name, str(weights.folder))):
            continue
        kind, dynamic = how
        if not dynamic and name + INPUT_SCALE not in weights.found:
            raise ModelError(f"{weights.folder} has no {name + INPUT_SCALE}. Is the checkpoint whole?")
        fixed = None if dynamic else weights.raw(name + INPUT_SCALE).float()
        model.get_submodule(name.removeprefix(within)).register_forward_pre_hook(_hook(kind, fixed))


def _hook(kind: str, fixed: torch.Tensor | None) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def round_inputs(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values = inputs[0]
        near = by_token(values, kind) if fixed is None else rounded(values, fixed.to(values.device), kind)
        return (near, *inputs[1:])

    return round_inputs
