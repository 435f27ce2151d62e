import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimline import data
from slimline.errors import DataError

ROWS = [{"id": f"r{i}", "text": f"text number {i}", "label": ("bad", "good")[i % 2]} for i in range(400)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join(mark.join(map(str, row)) for row in [list(rows[0]), *(r.values() for r in rows)]))
    return path


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_every_file_type_gives_the_same_rows_in_the_same_order(tmp_path):
    read = [data.read(write(tmp_path / f"a{suffix}", ROWS), "test") for suffix in data.SUFFIXES]
    assert read[0].ids and all(other == read[0] for other in read)
    assert read[0].ids == sorted(read[0].ids, key=lambda i: int(i[1:]))


def test_the_splits_share_no_row_and_leave_none_out(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    ids = [i for split in data.SPLITS for i in data.read(path, split).ids]
    assert sorted(ids) == sorted(row["id"] for row in ROWS)


def test_targets_count_in_the_order_of_the_given_labels():
    examples = data.Examples(["1", "2"], ["a", "b"], ["good", "bad"])
    assert examples.label_names == ("bad", "good")
    assert examples.targets(("good", "bad")).tolist() == [0, 1]
    with pytest.raises(DataError, match="label is 'good', but the model knows: bad"):
        examples.targets(("bad",))


@pytest.mark.parametrize("other", ["A  Fine Film", "a fine\tfilm ", "a \ufb01ne film"])
def test_case_space_and_compatible_characters_do_not_move_a_text(other):
    assert data.assign_split(other) == data.assign_split("a fine film")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalizing_twice_is_normalizing_once(text):
    assert data.normalize(data.normalize(text)) == data.normalize(text)


def test_a_quotation_mark_in_a_tsv_swallows_nothing(tmp_path):
    path = lines(tmp_path / "a.tsv", "text\tlabel\tsplit", '"Bravo\tgood\ttest', "dull\tbad\ttest")
    assert data.read(path, "test").texts == ['"Bravo', "dull"]


def test_a_million_characters_are_a_text(tmp_path):
    path = lines(tmp_path / "a.csv", "text,label,split", "x" * 1_000_000 + ",good,test", "y,bad,test")
    assert len(data.read(path, "test").texts[0]) == 1_000_000


def test_whole_numbers_are_labels_however_they_are_stored(tmp_path):
    rows = [{"text": f"t{i}", "label": float(i % 2), "split": "test"} for i in range(4)]
    assert data.read(write(tmp_path / "a.parquet", rows), "test").label_names == ("0", "1")


HEAD = {"text": "a", "label": "bad", "split": "train"}
BAD_ROWS = {
    "the label is None": {"text": "b", "label": None, "split": "train"},
    "the label is nan": {"text": "b", "label": float("nan"), "split": "train"},
    "the label is ''": {"text": "b", "label": "", "split": "train"},
    "the text is None": {"text": None, "label": "good", "split": "train"},
    "the text is ' '": {"text": " ", "label": "good", "split": "train"},
    "NUL byte": {"text": "b\0c", "label": "good", "split": "train"},
    "surrogate": {"text": "\ud800", "label": "good", "split": "train"},
    "the split is 'dev'": {"text": "b", "label": "good", "split": "dev"},
    "every row has the label 'bad'": {"text": "b", "label": "bad", "split": "train"},
    "hold the same text": {"text": " A", "label": "good", "split": "test"},
    "has no row in split 'validation'": {"text": "b", "label": "good", "split": "train"},
    "label not found": {"text": "b", "split": "train"},
    "not an object": [1],
    "not JSON": "{",
}


@pytest.mark.parametrize("sentence", BAD_ROWS)
def test_a_bad_row_is_refused_with_one_sentence(sentence, tmp_path):
    path = lines(tmp_path / "a.jsonl", HEAD, BAD_ROWS[sentence])
    with pytest.raises(DataError, match=sentence):
        data.read(path, "validation")


def test_wrong_columns_are_named_beside_the_needed_ones(tmp_path):
    with pytest.raises(DataError, match="has the columns review, label but needs text and label: text not found"):
        data.read(lines(tmp_path / "a.csv", "review,label", "a,b"), "test")


def test_an_id_twice_is_refused(tmp_path):
    path = lines(tmp_path / "a.csv", "id,text,label", "1,a,good", "1,b,bad")
    with pytest.raises(DataError, match="the id '1' is there twice"):
        data.read(path, "test")


def test_a_label_the_model_does_not_know_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the label is 'bad', but the model knows: good, worse"):
        data.read(write(tmp_path / "a.csv", ROWS), "test", ["good", "worse"])


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nfine,good\ncaf\xe9,bad\n")
    with pytest.raises(DataError, match="line 3: the byte 0xe9 is not UTF-8"):
        data.read(path, "test")


def test_a_separator_too_many_is_named_by_line(tmp_path):
    with pytest.raises(DataError, match="line 2: 3 fields, but the header has 2"):
        data.read(lines(tmp_path / "a.csv", "text,label", "one, two,good"), "test")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="is empty"):
        data.read(tmp_path / name, "test")


def test_a_header_alone_has_no_rows(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        data.read(lines(tmp_path / "a.csv", "text,label"), "test")


def test_what_is_no_data_file_is_refused(tmp_path):
    for path, sentence in ((tmp_path, "is a folder"), (tmp_path / "a.csv", "not exist"), (Path(__file__), "ends in")):
        with pytest.raises(DataError, match=sentence):
            data.read(path, "test")
    with pytest.raises(DataError, match="no split 'dev'"):
        data.read(tmp_path, "dev")


@given(raw=st.binary(min_size=1, max_size=200), suffix=st.sampled_from(data.SUFFIXES))
def test_random_bytes_raise_a_data_error_and_nothing_else(raw, suffix, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / f"a{suffix}"
    path.write_bytes(raw)
    with pytest.raises(DataError):
        data.read(path, "test")
