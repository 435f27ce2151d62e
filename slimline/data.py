"""One file of labelled text, split so that no text is on both sides of a measurement.

A data set is a .parquet, .csv, .tsv or .jsonl file with the columns text and label, and optionally id and split (train,
calibration, validation, test). Without a split column a row's split comes from the hash of its normalized text, so that
a duplicate never crosses. With one, a text found in two splits is refused. Other columns are not read. Rows keep the
order of the file. A .tsv has no quoting (a quotation mark is a quotation mark); a .csv has the usual one.

A language model is measured on documents: the same files and splits, of which only the column text is needed.
"""

# Long because every form of file and everything that can be wrong in one has its own sentence.
from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from slimline.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SplitName = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SHARES = (0.60, 0.05, 0.10, 0.25)
NEEDED = ("text", "label")
OPTIONAL = ("id", "split")
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")

Row = dict[str, Any]


@dataclass(frozen=True)
class Examples:
    """The rows of one split, in the file's order: three lists of one length."""

    ids: list[str]
    texts: list[str]
    labels: list[str]
    known: tuple[str, ...] = ()
    """Every label of the whole file, so that all splits count the same ones."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels, sorted."""
        return tuple(sorted(self.known or set(self.labels)))

    def targets(self, label_names: Sequence[str]) -> NDArray[np.int64]:
        """The index of every row's label in `label_names`. Raises DataError for a label that is not there."""
        import numpy as np

        index = {name: i for i, name in enumerate(label_names)}
        for row, label in zip(self.ids, self.labels):
            if label not in index:
                raise _unknown_label(f"row {row}", label, label_names)
        return np.array([index[label] for label in self.labels], dtype=np.int64)


class Labelled(NamedTuple):
    """One row, and the split that it belongs to."""

    id: str
    text: str
    label: str
    split: str


def rows(path: Path, labels: Sequence[str] | None = None) -> list[Labelled]:
    """Every row of a checked file. With `labels`, a label outside them is a DataError."""
    rows = _rows(path)
    found = [_example(path, number, row, labels) for number, row in enumerate(rows, 1)]
    names = {label for _, _, label in found}
    if len(names) < 2:
        raise DataError(f"{path}: every row has the label {names.pop()!r}. A classifier needs at least two labels.")
    _refuse_repeated_ids(path, [row_id for row_id, _, _ in found])
    given = "split" in rows[0]
    where = _given_splits(path, rows, found) if given else [assign_split(text) for _, text, _ in found]
    return [Labelled(*example, split) for example, split in zip(found, where)]


def read(path: Path, split: str, labels: Sequence[str] | None = None) -> Examples:
    """The rows of one split, after the whole file was checked. With `labels`, a label outside them is a DataError."""
    if split not in SPLITS:
        raise DataError(f"no split {split!r}. The splits are: {', '.join(SPLITS)}.")
    found = rows(path, labels)
    chosen = [row for row in found if row.split == split]
    if not chosen:
        raise DataError(f"{path} has no row in split {split!r} ({len(found)} rows in all). Add rows to that split.")
    known = tuple(sorted(labels)) if labels is not None else tuple(sorted({row.label for row in found}))
    return Examples([row.id for row in chosen], [row.text for row in chosen], [row.label for row in chosen], known)


@dataclass(frozen=True)
class Documents:
    """The texts of one split, in the file's order."""

    ids: list[str]
    texts: list[str]


def documents(path: Path, split: str) -> Documents:
    """The texts of one split, whatever their labels, after the whole file was checked."""
    if split not in SPLITS:
        raise DataError(f"no split {split!r}. The splits are: {', '.join(SPLITS)}.")
    rows = _rows(path, NEEDED[:1])
    found = [_example(path, number, {"label": "-", **row}, None) for number, row in enumerate(rows, 1)]
    _refuse_repeated_ids(path, [row_id for row_id, _, _ in found])
    where = _given_splits(path, rows, found) if "split" in rows[0] else [assign_split(text) for _, text, _ in found]
    chosen = [(row_id, text) for (row_id, text, _), place in zip(found, where) if place == split]
    if not chosen:
        raise DataError(f"{path} has no row in split {split!r} ({len(rows)} rows in all). Add rows to that split.")
    return Documents([row_id for row_id, _ in chosen], [text for _, text in chosen])


def normalize(text: str) -> str:
    """The text as duplicates are found by: compatible characters (NFKC), case and white space made one."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def assign_split(text: str, shares: Sequence[float] = SHARES) -> str:
    """The split of a text, from its normalized form alone; `shares` are the parts of SPLITS and sum to 1."""
    place = int.from_bytes(hashlib.sha256(normalize(text).encode()).digest()[:8], "big") / 2**64
    for split, share in zip(SPLITS, shares):
        if place < share:
            return split
        place -= share
    return SPLITS[-1]


def _rows(path: Path, needed: Sequence[str] = NEEDED) -> list[Row]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}. Give one file that ends in {', '.join(SUFFIXES)}.")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}. A data set ends in {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. It needs the columns {' and '.join(needed)} and at least one row.")
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl}
    rows = readers[path.suffix](path, needed)
    if not rows:
        raise DataError(f"{path} has no rows. Add at least one row for every label and split.")
    return rows


def _need_columns(path: Path, columns: Iterable[str], needed: Sequence[str]) -> list[str]:
    there = list(columns)
    if missing := [name for name in needed if name not in there]:
        raise DataError(
            f"{path} has the columns {', '.join(map(str, there)) or '(none)'} but needs {' and '.join(needed)}: "
            f"{' and '.join(missing)} not found. Rename or add them."
        )
    repeated = {name for name in (*NEEDED, *OPTIONAL) if there.count(name) > 1}
    if repeated:
        raise DataError(f"{path} has more than one column {' and '.join(sorted(repeated))}. Keep one of each.")
    return [name for name in (*needed, *OPTIONAL) if name in there]


def _parquet(path: Path, needed: Sequence[str]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _need_columns(path, file.schema_arrow.names, needed)
            rows: list[Row] = file.read(columns=columns).to_pylist()
            return rows
    except UnicodeDecodeError as error:
        raise DataError(f"{path} holds text that is not UTF-8 ({error.reason}). Write it again as UTF-8.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a Parquet file that can be read ({str(error)[:120]}). Write it again."
        ) from None


def _csv(path: Path, needed: Sequence[str]) -> list[Row]:
    style: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
    )
    before = csv.field_size_limit(sys.maxsize)  # a long text is a text, not an error
    try:
        lines = csv.reader(io.StringIO(_text(path), newline=""), **style)
        header = next(lines, [])
        keep = [(header.index(name), name) for name in _need_columns(path, header, needed)]
        rows = []
        for cells in lines:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{path}, line {lines.line_num}: {len(cells)} fields, but the header has {len(header)}. "
                    f"Quote a separator inside a text, or write the file as .parquet or .jsonl."
                )
            if cells:
                rows.append({name: cells[i] for i, name in keep})
        return rows
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}. Mend the quoting, or write .jsonl.") from None
    finally:
        csv.field_size_limit(before)


def _jsonl(path: Path, needed: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}, line {number}: not JSON. Write one object a line.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__}, not an object. Write one object a line.")
        columns = _need_columns(path, row, needed)
        if rows and columns != list(rows[0]):
            there = ", ".join(rows[0])
            raise DataError(f"{path}, line {number}: has {', '.join(columns)}, but line 1 {there}. Use the same keys.")
        rows.append({name: row[name] for name in columns})
    return rows


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, f"{raw[error.start]:#04x}"
        raise DataError(f"{path}, line {line}: the byte {byte} is not UTF-8. Convert it, as `iconv` does.") from None


def _example(path: Path, number: int, row: Row, labels: Sequence[str] | None) -> tuple[str, str, str]:
    where, text = f"{path}, row {number}", row["text"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the text is {text!r}. Remove the row, or give it a text.")
    if "\0" in text:
        raise DataError(f"{where}: the text holds a NUL byte. Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: the text holds half a surrogate pair. Write the character as UTF-8.") from None
    label = _plain(row["label"])
    if not label:
        raise DataError(f"{where}: the label is {row['label']!r}. Remove the row, or label it.")
    if labels is not None and label not in labels:
        raise _unknown_label(where, label, labels)
    row_id = _plain(row["id"]) if "id" in row else str(number)
    if not row_id:
        raise DataError(f"{where}: the id is {row['id']!r}. Give every row an id, or leave the column out.")
    return row_id, text, label


def _plain(value: object) -> str:
    """A label or an id as text: 1 and 1.0 are '1'; '' for what says nothing (null, NaN, blank, a list)."""
    if isinstance(value, float):
        return "" if not math.isfinite(value) else str(int(value)) if value.is_integer() else str(value)
    text = str(value).strip() if isinstance(value, str | int) else ""
    return "" if text.casefold() == "nan" else text


def _given_splits(path: Path, rows: list[Row], found: list[tuple[str, str, str]]) -> list[str]:
    first: dict[str, tuple[str, str]] = {}
    for number, (row, (row_id, text, _)) in enumerate(zip(rows, found), 1):
        split = row["split"]
        if split not in SPLITS:
            raise DataError(f"{path}, row {number}: the split is {split!r}. The splits are: {', '.join(SPLITS)}.")
        other, its_split = first.setdefault(normalize(text), (row_id, split))
        if its_split != split:
            raise DataError(
                f"{path}: rows {other} ({its_split}) and {row_id} ({split}) hold the same text {text[:60]!r}. "
                f"Put duplicates into one split, or remove the split column and let the text's hash decide."
            )
    return [row["split"] for row in rows]


def _refuse_repeated_ids(path: Path, ids: list[str]) -> None:
    seen: set[str] = set()
    for row_id in ids:
        if row_id in seen:
            raise DataError(f"{path}: the id {row_id!r} is there twice. Make ids unique, or leave the column out.")
        seen.add(row_id)


def _unknown_label(where: str, label: str, labels: Sequence[str]) -> DataError:
    return DataError(f"{where}: the label is {label!r}, but the model knows: {', '.join(labels)}. Rename or remove it.")
