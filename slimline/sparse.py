"""Zeros among weights: which of a row go, and what a model with such layers counts.

What prune.wanda and prune.sparsegpt share. Where no pattern is asked for, zeros may lie anywhere. `2:4` zeroes two of
every four neighbouring inputs, which NVIDIA's sparse tensor cores skip (Ampere and later); `4:8` leaves more choice.
Zeros are stored like any other weight: a file of floats gets no smaller, and only a runtime that knows them is faster.

Shapes: O = outputs, I = inputs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from slimline import decoder, grid, hf, layerwise, passages
from slimline.errors import ModelError
from slimline.shards import Weights
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

Pattern = Literal["unstructured", "2:4", "4:8"]


class Sparsity(passages.Passages):
    """Options of all that zero the weights of a language model by its inputs."""

    windows: int = Field(32, ge=1, description="pieces of text that are drawn, at the most")
    length: int = Field(256, ge=2, description="tokens of each piece")
    sparsity: float = Field(0.5, ge=0, lt=1, description="fraction of every map's weights that becomes zero")
    pattern: Pattern = Field("unstructured", description="where zeros may lie: 2:4 is two of every four neighbours")

    @field_validator("pattern")
    @classmethod
    def _half(cls, pattern: str, info: ValidationInfo) -> str:
        if pattern != "unstructured" and info.data.get("sparsity", 0.5) != 0.5:
            raise ValueError(f"{pattern} zeroes half of the weights; leave sparsity at 0.5")
        return pattern


def neighbours(pattern: Pattern) -> tuple[int, int] | None:
    """(zeros, of how many neighbouring inputs), or None where zeros may lie anywhere."""
    if pattern == "unstructured":
        return None
    zeros, among = pattern.split(":")
    return int(zeros), int(among)


def check(source: Path, pattern: Pattern) -> decoder.Family:
    """The family of a language model of floats whose maps the pattern fits. Raises ModelError for any other."""
    kind, every = grid.check(source, 0), neighbours(pattern)
    weights = Weights(source)
    for name in maps(source, kind):
        shape = weights.shape(name) or (0, 0)
        inputs = shape[0] if kind.transposed else shape[1]
        if every and inputs % every[1]:
            raise ModelError(
                f"{name} has {inputs} inputs, which do not divide into the {every[1]} neighbours of pattern "
                f"{pattern}. Ask for the pattern unstructured."
            )
    return kind


def lowest(worth_OI: torch.Tensor, sparsity: float, pattern: Pattern = "unstructured") -> torch.Tensor:
    """True where a weight goes: of every row, or of every few neighbours in it, those that are worth least.

    Every row loses the same number of weights; ties fall to the lower input.
    """
    import torch

    every = neighbours(pattern)
    if every:
        goes_X: torch.Tensor = lowest(worth_OI.reshape(-1, every[1]), every[0] / every[1])
        return goes_X.reshape(worth_OI.shape)
    number = round(worth_OI.shape[1] * sparsity)
    order_OI = worth_OI.argsort(dim=1, stable=True)
    return torch.zeros_like(worth_OI, dtype=torch.bool).scatter_(1, order_OI[:, :number], True)


def maps(folder: Path, kind: decoder.Family) -> list[str]:
    """Names of the matrices of all layers."""
    return [f"{kind.layers}.{i}.{name}.weight" for i in range(layerwise.depth(folder)) for name in kind.maps]


def count(folder: Path) -> Metrics:
    """Parameters, those without the zeros of the layers' maps, and `sparsity`: the share of zeros in these maps."""
    weights, kind = Weights(folder), decoder.family(hf.read_config(folder), folder)
    zeros = whole = 0
    for name in maps(folder, kind):
        matrix = weights.raw(name)
        zeros, whole = zeros + int((matrix == 0).sum()), whole + matrix.numel()
        weights.close()
    parameters = number(folder)
    return {
        "sparsity": zeros / whole if whole else 0.0,
        "parameters": float(parameters),
        "parameters_nonzero": float(parameters - zeros),
    }


def number(folder: Path) -> int:
    """Parameters of a model of floats, by the headers of its files; a tied head counts once."""
    return sum(math.prod(tensor.shape) for tensor in Weights(folder).found.values())
