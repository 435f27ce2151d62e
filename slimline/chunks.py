"""What is dear to make and cheap to keep: numbered files under a key, each whole or not there.

A teacher's answers are made once and read by every student that learns from them. They lie in a folder named by the
digest of all that goes into them, so that nothing is ever read that was made of something else, and a killed step goes
on after the last file that it has finished. Files are Parquet, compressed with zstd.

Shapes: R = rows, K = values of a row.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from slimline import artifact

Columns = dict[str, Any]
"""By name, of one length: arrays [R] or [R, K], or lists of text."""


def identity(model: Path) -> str:
    """The digest of a model's folder, sealed or not."""
    return artifact.read(model).digest if (model / artifact.MANIFEST).is_file() else artifact.digest(model)


def key(**parts: Any) -> str:
    """The digest of what something is made of: arrays by their bytes, anything else as JSON."""
    whole = hashlib.sha256()
    for name, value in sorted(parts.items()):
        whole.update(name.encode() + b"\0")
        if isinstance(value, np.ndarray):
            whole.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            whole.update(json.dumps(value, sort_keys=True).encode())
    return whole.hexdigest()[:32]


class Chunks:
    """Numbered files in `folder` under a key."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, number: int) -> Path:
        """Where a chunk is, or will be."""
        return self.folder / f"{number:06}.parquet"

    def __contains__(self, number: int) -> bool:
        return self.file(number).is_file()

    def write(self, number: int, columns: Columns, group: int | None = None) -> None:
        """Write one chunk; so many rows form a group that can be read alone. Others may write the same at once."""
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({name: _column(values) for name, values in columns.items()})
        unfinished = self.folder / f".{number:06}.{os.getpid()}"
        parquet.write_table(table, unfinished, compression="zstd", row_group_size=group or max(1, table.num_rows))
        with unfinished.open("rb") as handle:
            os.fsync(handle.fileno())
        unfinished.replace(self.file(number))

    def read(self, number: int, names: list[str] | None = None, group: int | None = None) -> Columns:
        """The columns of a chunk, or of one group of its rows."""
        from pyarrow import parquet

        with parquet.ParquetFile(self.file(number)) as file:
            table = file.read(columns=names) if group is None else file.read_row_group(group, columns=names)
        return {name: _values(table.column(name)) for name in table.column_names}


def _column(values: Any) -> Any:
    import pyarrow

    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pyarrow.array(values)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values.shape[1])


def _values(column: Any) -> Any:
    import pyarrow

    whole = column.combine_chunks()
    if pyarrow.types.is_string(whole.type):
        return whole.to_pylist()
    if pyarrow.types.is_fixed_size_list(whole.type):
        return whole.flatten().to_numpy(zero_copy_only=False).reshape(len(whole), whole.type.list_size)
    return whole.to_numpy(zero_copy_only=False)
