"""Weights on disk, read and written piece by piece, so that a model larger than memory can pass through.

`Weights` is a folder's tensors by name, memory mapped: nothing is read before it is asked for, and nothing is kept.
`Writer` writes shards of which each is whole or not there, and at the end the index that names them; what an earlier,
killed try has finished is found again. Matrices of packed integers (packed.py) can be read as floats.
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

    def read(self, name: str, transposed: bool = False) -> torch.Tensor:
        """One tensor as a model has it, in the type it is stored in; a packed matrix as floats.

        Packed matrices are [outputs, inputs]; `transposed` gives them as [inputs, outputs], as Conv1D has them.
        """
        if self.packing.packs(name, self.found):
            matrix_OI = self.packing.read(name, self.raw, self.found)
            return matrix_OI.T.contiguous() if transposed else matrix_OI
        if name not in self.found:
            raise ModelError(f"{self.folder} has no {name}. Is the checkpoint whole?")
        return self.raw(name)

    def integers(self, name: str) -> tuple[packed.Integers, int] | None:
        """A packed matrix in whole numbers, with their bits; None for one that is stored as floats."""
        if not self.packing.packs(name, self.found):
            return None
        return self.packing.integers(name, self.raw, self.found)

    def close(self) -> None:
        """Forget the mapped files, so that their pages count for nobody."""
        self.opened.clear()


PART = "part-{:05}.safetensors"


class Writer:
    """Shards of one folder, one `write` each, in order; `finish` gives them their names and the index.

    A shard is written under another name and moved into place, so it is whole if it is there. `finished` says which
    parts an earlier try has left.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def finished(self, number: int) -> bool:
        """Whether this part is there, from now or from an earlier try."""
        return (self.out / PART.format(number)).is_file()

    def write(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write one part. Tensors go to disk as they are."""
        from safetensors.torch import save_file

        file = self.out / PART.format(number)
        unfinished = self.out / f".{file.name}"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, unfinished, {"format": "pt"})
        with unfinished.open("rb") as handle:
            os.fsync(handle.fileno())
        unfinished.replace(file)

    def read(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a finished part as stored."""
        from safetensors import safe_open

        with safe_open(str(self.out / PART.format(number)), framework="pt") as part:
            for name in part.keys():  # noqa: SIM118  safe_open is no mapping
                yield name, part.get_tensor(name)

    def finish(self) -> None:
        """Name the parts as transformers does and write the index; a single part is model.safetensors."""
        parts = sorted(self.out.glob("part-*.safetensors"))
        if len(parts) == 1:
            parts[0].rename(self.out / allowlist.WEIGHTS)
            return
        placed, size = {}, 0
        for number, part in enumerate(parts, 1):
            name = f"model-{number:05}-of-{len(parts):05}.safetensors"
            for tensor, entry in allowlist.header(part).items():
                placed[tensor] = name
                size += entry.end - entry.start
            part.rename(self.out / name)
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (self.out / allowlist.INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
