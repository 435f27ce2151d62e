"""Make a labelled, split Parquet file out of one of VADER's rated text files.

    python examples/reviews/prepare.py movie_reviews.tsv examples/reviews/movies.parquet

The input has the columns id, rating (-4 to 4) and text, separated by tabs. The label is the rating's sign; ratings
within 0.5 of zero are left out as neutral. Of texts that are equal once normalized, the first stays; when their labels
differ, none stays. The split comes from the hash of the normalized text, so it depends on nothing else in the file.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from slimline import data

NEUTRAL = 0.5
SHARES = (0.64, 0.04, 0.08, 0.24)  # of train, calibration, validation, test
COLUMNS = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("rating", pyarrow.float64()),
        ("label", pyarrow.string()),
        ("split", pyarrow.string()),
    ]
)


def prepare(source: Path) -> list[dict[str, Any]]:
    """The labelled rows, in the source's order."""
    with source.open(encoding="utf-8", newline="") as handle:
        rated = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [labelled(row) for row in rated if abs(float(row["rating"])) > NEUTRAL]
    same: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        same[data.normalize(row["text"])].append(row)
    return [group[0] for group in same.values() if len({row["label"] for row in group}) == 1]


def labelled(row: dict[str, str]) -> dict[str, Any]:
    rating = float(row["rating"])
    return {
        "id": row["id"],
        "text": row["text"],
        "rating": rating,
        "label": "positive" if rating > 0 else "negative",
        "split": data.assign_split(row["text"], SHARES),
    }


def main(source: str, out: str) -> None:
    rows = prepare(Path(source))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=COLUMNS), out, compression="zstd")
    for (split, label), count in sorted(Counter((row["split"], row["label"]) for row in rows).items()):
        print(f"{split:12} {label:9} {count:6,}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
