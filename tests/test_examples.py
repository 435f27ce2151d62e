from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from slimline import data

REVIEWS = Path(__file__).parent.parent / "examples" / "reviews"
FILES = {"movies.parquet": 10_041, "products.parquet": 2_935}


@pytest.fixture(params=FILES)
def rows(request):
    return pyarrow.parquet.read_table(REVIEWS / request.param).to_pylist()


def test_no_text_is_in_there_twice_so_none_crosses_a_split(rows):
    assert max(Counter(data.normalize(row["text"]) for row in rows).values()) == 1


def test_the_label_is_the_sign_of_the_rating_and_none_is_neutral(rows):
    assert {row["label"] for row in rows if row["rating"] > 0.5} == {"positive"}
    assert {row["label"] for row in rows if row["rating"] < -0.5} == {"negative"}
    assert all(0.5 < abs(row["rating"]) <= 4 for row in rows)


def test_the_split_follows_from_the_text_alone(rows):
    shares = (0.64, 0.04, 0.08, 0.24)
    assert all(row["split"] == data.assign_split(row["text"], shares) for row in rows)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_in_one_split(name):
    splits = {split: data.read(REVIEWS / name, split) for split in data.SPLITS}
    assert sum(len(examples.ids) for examples in splits.values()) == FILES[name]
    assert {examples.label_names for examples in splits.values()} == {("negative", "positive")}


def test_the_movies_are_balanced_and_have_a_test_of_2000_or_more():
    test = data.read(REVIEWS / "movies.parquet", "test")
    assert len(test.ids) == 2_456
    assert 0.45 < test.labels.count("positive") / len(test.labels) < 0.55


def test_the_licence_and_the_citation_are_beside_the_data():
    assert "Hutto" in (REVIEWS / "LICENSE").read_text()
    assert "ICWSM" in (REVIEWS / "README.md").read_text()
