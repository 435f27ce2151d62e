"""The store's benchmark does what it says, at a scale of seconds."""

import json

import pytest

from benchmarks import store as benchmark

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    words = "--runs 1 --at-once 1 --sizes 0 2000 --megabytes 64 --rounds 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "REPEATS", 3)
        benchmark.main([*words.split(), "--scratch", str(folder)], out=folder)
    return folder, json.loads((folder / "store.json").read_text())


def test_a_pipeline_loses_doubles_and_leaves_nothing(measured):
    _, known = measured
    told = known["runs"]
    assert told["pipelines_finished"] == told["versions"] == 1
    for name in (
        "runs_not_finished",
        "steps_doubled",
        "versions_lost",
        "models_not_ready",
        "orphans",
        "unfinished_uploads",
    ):
        assert told[name] == 0, name
    assert told["objects"] > 20


@pytest.mark.parametrize("action", benchmark.ACTIONS)
def test_what_the_database_reads_for_a_step_does_not_grow_with_the_store(measured, action):
    _, known = measured
    first, *_, last = (row["actions"][action]["pages"] for row in known["growth"])
    assert last <= 1.5 * first + 50, [row["actions"][action]["pages"] for row in known["growth"]]


def test_both_ways_move_the_bytes_and_slimline_holds_a_few_parts(measured):
    _, known = measured
    for direction in ("up", "down"):
        assert known["transfer"][f"slimline {direction}"]["mb_per_s"] > 0
        assert known["transfer"][f"boto3 {direction}"]["mb_per_s"] > 0


def test_the_page_has_all_three_parts(measured):
    folder, _ = measured
    page = (folder / "store.md").read_text()
    assert page.count("\n## ") == 3 and "| up |" in page and "| 2,000 | 200 |" in page
