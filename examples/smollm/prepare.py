"""Make a Parquet file of documents, split, out of VADER's newspaper sentences.

    python examples/smollm/prepare.py nyt_editorials.tsv examples/smollm/newspaper.parquet

The input has the columns id (DOCUMENT_SENTENCE), rating and text, separated by tabs; sentences are joined to documents.
The split comes from the hash of a document's text, so it depends on nothing else in the file.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

from slimline import data

SHARES = (0.25, 0.35, 0.10, 0.30)  # of train, calibration, validation, test


def prepare(source: Path) -> list[dict[str, str]]:
    """The documents in the source's order, each with its sentences in order."""
    sentences: dict[str, list[str]] = {}
    with source.open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE):
            sentences.setdefault(row["id"].partition("_")[0], []).append(row["text"].strip())
    texts = {number: " ".join(lines) for number, lines in sentences.items()}
    return [{"id": number, "text": text, "split": data.assign_split(text, SHARES)} for number, text in texts.items()]


def main(source: str, out: str) -> None:
    table = pyarrow.Table.from_pylist(prepare(Path(source)))
    pyarrow.parquet.write_table(table, out, compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
