"""Weights in fewer bits as vLLM and transformers keep them: the compressed-tensors format, written and read.

A matrix of O outputs and I inputs, in groups of I / G inputs that share a scale, is one of

    pack-quantized    weight_packed int32 [O, I * bits / 32]: whole numbers of 2 to 8 bits, 32 of them in `bits` words
                      without a gap, the first in the lowest bits, each 2^(bits-1) too high; weight_scale [O, G];
                      weight_zero_point int32 [O * bits / 32, G], packed along the outputs, if there is one;
                      weight_shape (O, I)
    int-quantized     weight int8 [O, I], weight_scale [O, G]
    float-quantized   weight float8_e4m3fn [O, I], weight_scale [O, G] or [1]

Weight = (number - zero point) * scale. config.json's `quantization_config` says which matrices are of which kind.

Shapes: O = outputs, I = inputs, G = groups of inputs.
"""

# Long because the format is written and read in one place, or the two would drift apart.
from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slimline.errors import ModelError

if TYPE_CHECKING:
    import torch

PACKED, SCALE, SHAPE, ZERO = ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"
INPUT_SCALE = ".input_scale"
PARTS = (PACKED, SCALE, SHAPE, ZERO, INPUT_SCALE)
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "mixed-precision")
DENSE = "dense"
"""The format of a model of floats whose settings are about something else, such as its cache."""


class Scheme(NamedTuple):
    """How a matrix is stored, and its inputs while it runs."""

    bits: int
    group_size: int | None
    """Inputs that share a scale; None for one scale an output."""
    symmetric: bool = True
    kind: str = "int"
    """int, or float for E4M3."""
    activations: str = ""
    """How inputs are rounded: '' for not at all, dynamic (a scale a token) or static (one scale for all)."""

    @property
    def format(self) -> str:
        """The compressed-tensors format of such a matrix."""
        if self.kind == "float":
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"


class Integers(NamedTuple):
    """A matrix in whole numbers: (numbers - zero) * scale, group by group."""

    numbers_OI: torch.Tensor
    """int8, from -2^(bits-1) up."""
    scale_OG: torch.Tensor
    zero_OG: torch.Tensor | None
    """int8 in the same range; None for 0."""

    def floats(self) -> torch.Tensor:
        """[O, I] in the scale's type, computed in float32: what every reader makes of it."""
        groups = self.scale_OG.shape[1]
        numbers_OGC = self.numbers_OI.float().reshape(len(self.numbers_OI), groups, -1)
        if self.zero_OG is not None:
            numbers_OGC = numbers_OGC - self.zero_OG.float().unsqueeze(-1)
        weight_OGC = numbers_OGC * self.scale_OG.float().unsqueeze(-1)
        floats_OI: torch.Tensor = weight_OGC.flatten(1)
        return floats_OI


def pack(matrix: Integers, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a pack-quantized matrix by what follows its module's name, such as '.weight_packed'."""
    import torch

    tensors = {
        PACKED: words(matrix.numbers_OI, bits),
        SCALE: matrix.scale_OG.contiguous(),
        SHAPE: torch.tensor(matrix.numbers_OI.shape, dtype=torch.int64),
    }
    if matrix.zero_OG is not None:
        tensors[ZERO] = words(matrix.zero_OG.T, bits).T.contiguous()
    return tensors


def words(numbers_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, ceil(C * bits / 32)]: rows of whole numbers in [-2^(bits-1), 2^(bits-1)), one behind the other."""
    import torch

    return torch.cat([_words(part_RC, bits) for part_RC in _in_pieces(numbers_RC)])


def numbers(words_RW: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int8 [R, columns]: what `words` put together."""
    import torch

    return torch.cat([_numbers(part_RW, bits, columns) for part_RW in _in_pieces(words_RW)])


AT_ONCE = 1 << 23
"""Elements that are int64 at the same time. Pieces of less than 32 MB would stay with the allocator when they are
freed: with 2^20 elements a model of 0.5 x 10^9 parameters took twice the memory.
"""


def _in_pieces(matrix_RC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    pieces: tuple[torch.Tensor, ...] = matrix_RC.split(max(1, AT_ONCE // max(1, matrix_RC.shape[1])))  # type: ignore[no-untyped-call]
    return pieces


def _words(numbers_RC: torch.Tensor, bits: int) -> torch.Tensor:
    import torch

    rows, columns = numbers_RC.shape
    raised_RC = torch.nn.functional.pad(numbers_RC.long() + 2 ** (bits - 1), (0, -columns % 32))
    raised_RN = raised_RC.reshape(rows, -1, 32)
    at = torch.arange(32, device=numbers_RC.device) * bits
    place, shift = at // 32, at % 32
    words_RNb = raised_RN.new_zeros(rows, raised_RN.shape[1], bits + 1)  # one more, for what runs over the last
    shifted_RN = raised_RN << shift
    words_RNb.index_add_(2, place, shifted_RN & 0xFFFFFFFF)
    words_RNb.index_add_(2, place + 1, shifted_RN >> 32)
    words_RW = words_RNb[:, :, :bits].flatten(1)[:, : -(-columns * bits // 32)]
    signed: torch.Tensor = torch.where(words_RW >= 2**31, words_RW - 2**32, words_RW).int()
    return signed.contiguous()


def _numbers(words_RW: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    import torch

    rows, count = words_RW.shape
    plain_RW = torch.nn.functional.pad(words_RW.long() & 0xFFFFFFFF, (0, -count % bits))
    plain_RNb = torch.nn.functional.pad(plain_RW.reshape(rows, -1, bits), (0, 1))
    at = torch.arange(32, device=words_RW.device) * bits
    place, shift = at // 32, at % 32
    whole_RN = plain_RNb[:, :, place] | (plain_RNb[:, :, place + 1] << 32)
    raised_RC = ((whole_RN >> shift) & (2**bits - 1)).flatten(1)[:, :columns]
    found: torch.Tensor = (raised_RC - 2 ** (bits - 1)).to(torch.int8)
    return found


def settings(schemes: dict[str, Scheme], ignored: Collection[str] = ("lm_head",)) -> dict[str, Any]:
    """config.json's `quantization_config` for these modules by name, those of one scheme in one group."""
    together: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        together.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in together}
    groups = {
        f"group_{i}": {
            "targets": targets if len(together) > 1 else ["Linear"],
            "weights": _arguments(scheme),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": scheme.format,
        }
        for i, (scheme, targets) in enumerate(together.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def floats() -> dict[str, Any]:
    """config.json's `quantization_config` for a model whose weights are all floats."""
    return settings({}) | {"format": DENSE, "ignore": []}


def _arguments(scheme: Scheme) -> dict[str, Any]:
    strategy = "group" if scheme.group_size else "channel"
    return {
        "num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric, "strategy": strategy,
        "group_size": scheme.group_size, "dynamic": False, "actorder": None, "observer": "minmax",
    }  # fmt: skip


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if not scheme.activations:
        return None
    dynamic = scheme.activations == "dynamic"
    return {
        "num_bits": 8, "type": scheme.kind, "symmetric": True, "strategy": "token" if dynamic else "tensor",
        "group_size": None, "dynamic": dynamic, "observer": None if dynamic else "minmax",
    }  # fmt: skip


class Packing:
    """Which tensors of a folder are parts of a matrix in fewer bits, and what that matrix is in floats."""

    def __init__(self, settings: dict[str, Any] | None, where: str) -> None:
        if settings and settings.get("format") == DENSE and not settings.get("config_groups"):
            settings = None
        self.there, self.where = bool(settings), where
        self.bits = _refuse_other_forms(settings, where) if settings else None

    @classmethod
    def of(cls, folder: Path) -> Packing:
        """By the folder's config.json. Raises ModelError for a form that is not read here."""
        file = folder / "config.json"
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(values.get("quantization_config"), str(folder))

    @classmethod
    def anything(cls, where: str) -> Packing:
        """For tensors whose settings are not written yet: their parts show what is packed, and their sizes the bits."""
        packing = cls(None, where)
        packing.there = True
        return packing

    def plain_name(self, stored: str) -> str:
        """The name that a stored tensor has in a model of floats."""
        part = next((part for part in PARTS if stored.endswith(part)), "") if self.there else ""
        return stored.removesuffix(part) + ".weight" if part else stored

    def packs(self, name: str, found: Collection[str]) -> bool:
        """Whether a `.weight` is there in parts."""
        return self.there and name.removesuffix(".weight") + SCALE in found

    def shape(self, name: str, raw: Callable[[str], torch.Tensor], found: Collection[str]) -> tuple[int, ...]:
        """(O, I) of a matrix in parts."""
        stem = name.removesuffix(".weight")
        if stem + SHAPE in found:
            return tuple(int(n) for n in raw(stem + SHAPE))
        return tuple(raw(name).shape)

    def integers(self, name: str, raw: Callable[[str], torch.Tensor], found: Collection[str]) -> tuple[Integers, int]:
        """The whole numbers of a matrix, and their bits. Raises ModelError if it is stored as floats of 8 bits."""
        import torch

        stem = name.removesuffix(".weight")
        scale_OG = raw(stem + SCALE)
        if stem + PACKED not in found:
            numbers_OI = raw(name)
            if numbers_OI.dtype != torch.int8:
                raise ModelError(f"{self.where}: {name} is {numbers_OI.dtype}, not whole numbers.")
            return Integers(numbers_OI, scale_OG.reshape(-1, 1) if scale_OG.ndim < 2 else scale_OG, None), 8
        outputs, inputs = (int(n) for n in raw(stem + SHAPE))
        packed_OW = raw(stem + PACKED)
        bits = self.bits or packed_OW.shape[1] * 32 // inputs
        zero_OG = numbers(raw(stem + ZERO).T, bits, outputs).T if stem + ZERO in found else None
        return Integers(numbers(packed_OW, bits, inputs), scale_OG, zero_OG), bits

    def read(self, name: str, raw: Callable[[str], torch.Tensor], found: Collection[str]) -> torch.Tensor:
        """A matrix in parts as floats: float32 [O, I]."""
        import torch

        stem = name.removesuffix(".weight")
        if stem + PACKED not in found and raw(name).dtype == torch.float8_e4m3fn:
            scale = raw(stem + SCALE).float()
            floats_OI: torch.Tensor = raw(name).float() * (scale.reshape(-1, 1) if scale.ndim < 2 else scale)
            return floats_OI
        return self.integers(name, raw, found)[0].floats()


def unpack(weights: dict[str, torch.Tensor], settings: dict[str, Any], where: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with every matrix in fewer bits as one of floats, by its `quantization_config`.

    Raises ModelError for a form that is not read here.
    """
    packing = Packing(settings, where)
    names: Iterable[str] = dict.fromkeys(packing.plain_name(name) for name in weights)
    return {
        name: packing.read(name, weights.__getitem__, weights) if packing.packs(name, weights) else weights[name]
        for name in names
    }


def _refuse_other_forms(settings: dict[str, Any], where: str) -> int | None:
    """The bits of every matrix, or None if they have not all the same."""
    form = f"{settings.get('quant_method', 'unknown')} {settings.get('format', '')}".strip()
    if settings.get("quant_method") != "compressed-tensors" or settings.get("format") not in FORMATS:
        raise ModelError(
            f"{where} is quantized already ({form}), in a form that is not read here: of compressed-tensors "
            f"{', '.join(FORMATS)} are. Bring in the model that it was made from."
        )
    kinds = {int((g.get("weights") or {}).get("num_bits") or 0) for g in (settings.get("config_groups") or {}).values()}
    if not kinds or not kinds <= set(range(2, 9)):
        raise ModelError(f"{where} is quantized already, to {sorted(kinds)} bits. 2 to 8 are read here.")
    return kinds.pop() if len(kinds) == 1 else None
