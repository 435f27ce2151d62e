"""Weights on disk, read and written piece by piece, so that a model larger than memory can pass through.

`Weights` is a folder's tensors by name, memory mapped: nothing is read before it is asked for, and nothing is kept.
`Writer` writes shards of which each is whole or not there, and at the end the index that names them; what an earlier,
killed try has finished is found again, with the numbers that were to be remembered of it. Matrices of packed integers
(packed.py) can be read as floats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimline import allowlist, packed
from slimline.errors import ModelError

if TYPE_CHECKING:
    import torch


class Weights:
    """The tensors of a folder of format hf, by name. Raises ModelError if a shard is missing or tells another story."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found = allowlist.tensors(folder)
        self.packing = packed.Packing.of(folder)
        self.opened: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.found or self.packing.packs(name, self.found)

    def stored(self) -> list[str]:
        """Names of the tensors as they are on disk, packed ones in their parts."""
        return list(self.found)

    def floats(self) -> list[str]:
        """Names of the tensors as a model has them: a packed matrix is one `.weight`."""
        return list(dict.fromkeys(self.packing.plain_name(name) for name in self.found))

    def below(self, prefix: str) -> list[str]:
        """Those of `floats` that begin with a module's name and a dot."""
        return [name for name in self.floats() if name.startswith(f"{prefix}.")]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that `read` gives, without reading more than a packed matrix's own shape; None if not there."""
        if self.packing.packs(name, self.found):
            return self.packing.shape(name, self.raw, self.found)
        return self.found[name].shape if name in self.found else None

    def raw(self, name: str) -> torch.Tensor:
        """One tensor as stored."""
        from safetensors import safe_open

        file = self.found[name].file
        if file not in self.opened:
            self.opened[file] = safe_open(str(file), framework="pt")
        tensor: torch.Tensor = self.opened[file].get_tensor(name)
        return tensor

    def read(self, name: str, transposed: bool = False, device: str = "cpu") -> torch.Tensor:
        """One tensor as a model has it, in the type it is stored in; a packed matrix as floats, unpacked on the device.

        Packed matrices are [outputs, inputs]; `transposed` gives them as [inputs, outputs], as Conv1D has them.
        """

        def raw(stored: str) -> torch.Tensor:
            return self.raw(stored).to(device)

        if self.packing.packs(name, self.found):
            matrix_OI = self.packing.read(name, raw, self.found)
            return matrix_OI.T.contiguous() if transposed else matrix_OI
        if name not in self.found:
            raise ModelError(f"{self.folder} has no {name}. Is the checkpoint whole?")
        return raw(name)

    def integers(self, name: str) -> tuple[packed.Integers, int] | None:
        """A packed matrix in whole numbers, with their bits; None for one that is stored as floats."""
        if not self.packing.packs(name, self.found):
            return None
        return self.packing.integers(name, self.raw, self.found)

    def close(self) -> None:
        """Forget the mapped files, so that their pages count for nobody."""
        self.opened.clear()


NUMBERS = "slimline_numbers"
"""Where a shard's own metadata keeps what is to be remembered of it."""
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.int64": "I64", "torch.int32": "I32", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
"""The names of types in safetensors."""


class Writer:
    """Shards of one folder, one `write` each and in any order; `finish` writes the index that names them.

    A shard is written under another name and moved into place, so it is whole if it is there. `finished` says which
    parts an earlier, killed try has left. Tensors go to disk one by one: memory is one of them.
    """

    def __init__(self, out: Path, parts: int) -> None:
        self.out, self.parts = out, parts

    def file(self, number: int) -> Path:
        """Where a part lies, named as transformers names shards; a single one is model.safetensors."""
        if self.parts == 1:
            return self.out / allowlist.WEIGHTS
        return self.out / f"model-{number + 1:05}-of-{self.parts:05}.safetensors"

    def finished(self, number: int) -> bool:
        """Whether this part is there and whole, from now or from an earlier try."""
        try:
            return bool(allowlist.header(self.file(number)))
        except (OSError, ModelError):  # not there, or what a machine that lost its power has left
            return False

    def write(
        self,
        number: int,
        tensors: dict[str, torch.Tensor],
        types: dict[str, torch.dtype] | None = None,
        numbers: dict[str, float] | None = None,
    ) -> None:
        """Write one part, tensors in the type that `types` says or else in their own, and numbers to remember."""
        kinds = {name: (types or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
        order = sorted(
            tensors, key=lambda name: (-kinds[name].itemsize, name)
        )  # each starts at a multiple of its width
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        if numbers:
            entries["__metadata__"][NUMBERS] = json.dumps(numbers, sort_keys=True)
        at = 0
        for name in order:
            end = at + tensors[name].numel() * kinds[name].itemsize
            entries[name] = {
                "dtype": DTYPES[str(kinds[name])], "shape": list(tensors[name].shape), "data_offsets": [at, end],
            }  # fmt: skip
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self.file(number)
        unfinished = file.with_name(f".{file.name}")
        with unfinished.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                handle.write(_bytes(tensors[name], kinds[name]))
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.replace(file)

    def read(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a finished part as stored."""
        from safetensors import safe_open

        with safe_open(str(self.file(number)), framework="pt") as part:
            for name in part.keys():  # noqa: SIM118  safe_open is no mapping
                yield name, part.get_tensor(name)

    def numbers(self, number: int) -> dict[str, float]:
        """What was to be remembered of a finished part."""
        from safetensors import safe_open

        with safe_open(str(self.file(number)), framework="pt") as part:
            found: dict[str, float] = json.loads((part.metadata() or {}).get(NUMBERS, "{}"))
        return found

    def finish(self) -> None:
        """Write the index, which a single part does without."""
        if self.parts == 1:
            return
        placed, size = {}, 0
        for number in range(self.parts):
            for tensor, entry in allowlist.header(self.file(number)).items():
                placed[tensor] = self.file(number).name
                size += entry.end - entry.start
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (self.out / allowlist.INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> Any:
    """A tensor's bytes in a type, without a copy where it has that type already."""
    import torch

    return tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
