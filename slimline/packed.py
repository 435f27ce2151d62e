"""Weights as llm-compressor and vLLM keep them: compressed-tensors' `pack-quantized` form, read back as floats.

A matrix of R rows and C columns is three tensors: `weight_packed` int32 [R, C * bits / 32], whose words hold the
lowest column in the lowest bits, each number 2^(bits-1) too high; `weight_scale` [R, groups], one for C / groups
neighbours; and `weight_shape`, which is (R, C). Weight = (number - 2^(bits-1)) * scale; there are no zero points.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimline.errors import ModelError

if TYPE_CHECKING:
    import torch

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


def unpack(weights: dict[str, torch.Tensor], settings: dict[str, Any], where: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with every packed matrix as one of floats, by a config.json's `quantization_config`.

    Raises ModelError for another form: this reads integers of 4 or 8 bits, in groups of columns, without zero points.
    """
    groups = settings.get("config_groups") or {}
    kinds: set[Any] = {(g.get("weights") or {}).get("num_bits") for g in groups.values()}
    symmetric = all((g.get("weights") or {}).get("symmetric") for g in groups.values())
    if settings.get("format") != "pack-quantized" or len(kinds) != 1 or not kinds <= {4, 8} or not symmetric:
        form = f"{settings.get('quant_method', 'unknown')} {settings.get('format', '')}".strip()
        raise ModelError(
            f"{where} is quantized already ({form}), in a form that is not read here: only symmetric 4 or 8-bit "
            "pack-quantized weights are. Bring in the model that it was made from."
        )
    (bits,) = kinds
    names = [name.removesuffix(PACKED) for name in weights if name.endswith(PACKED)]
    found = {k: v for k, v in weights.items() if not k.endswith((PACKED, SCALE, SHAPE))}
    return found | {f"{name}.weight": _floats(weights, name, bits) for name in names}


def _floats(weights: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    import torch

    words_RW, scale_RG = weights[name + PACKED], weights[name + SCALE].float()
    rows, columns = (int(n) for n in weights[name + SHAPE])
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers_RWN = (words_RW.unsqueeze(-1) >> shifts) & (2**bits - 1)  # & takes off the sign that a shift brings in
    numbers_RC = numbers_RWN.reshape(rows, -1)[:, :columns].float() - 2 ** (bits - 1)
    weight_RC: torch.Tensor = numbers_RC * scale_RG.repeat_interleave(columns // scale_RG.shape[1], dim=1)
    return weight_RC
