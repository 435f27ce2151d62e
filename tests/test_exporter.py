"""The numbers for Prometheus, read as Prometheus reads them: over HTTP, from a real store."""

import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slimline import exporter, ledger, store
from slimline.errors import ConfigError, StoreError
from tests.stores import saved


def free_port():
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def scrape(port):
    """{(metric, labels): value} of what is served now."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def until(port, key, value):
    """What is served, as soon as one number is what it must become."""
    for _ in range(600):
        if (numbers := scrape(port)).get(key) == value:
            return numbers
        time.sleep(0.05)
    raise AssertionError(f"{key} is {numbers.get(key)}, not {value}")


@contextmanager
def served(function, *args):
    """A server on a free port, in a thread, that has stopped afterwards."""
    stop, port = threading.Event(), free_port()
    thread = threading.Thread(target=function, args=(port, *args), kwargs={"stop": stop})
    thread.start()
    try:
        for _ in range(600):
            try:
                scrape(port)
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def candidate(folder, name, verdict, number):
    """A version with a verdict, as release.register makes it."""
    ref = saved(folder / f"{name}-{number}", weights=f"weights {number}".encode())
    return store.register(name, ref, f"{name}-{number}", {"slimline.verdict": verdict}, "")


def test_a_champion_is_shown_with_the_time_of_its_last_move(fresh_store, tmp_path):
    start = time.time()
    for number, before in ((1, None), (2, 1)):
        version = candidate(tmp_path, "reviews", "PASS", number)
        ledger.move("reviews", version, before, "promote", {})
    (one,) = exporter.standings()
    assert one._replace(moved_at_s=None) == ("reviews", 2, None, 2, ("PASS", "PASS"))
    assert start - 1 < one.moved_at_s < time.time() + 1


@pytest.mark.parametrize(
    "verdicts, refused",
    [(["PASS"], 0), (["FAIL"], 1), (["PASS", "FAIL", "INCONCLUSIVE"], 2), (["FAIL", "PASS"], 0), (["INVALID"], 1)],
)  # fmt: skip
def test_refusals_are_counted_back_to_the_last_candidate_that_passed(verdicts, refused):
    standing = exporter.Standing("reviews", None, None, 0, tuple(reversed(verdicts)))
    assert standing.not_passed_in_a_row == refused


def test_newest_versions_come_first_also_after_the_ninth(fresh_store, tmp_path):
    ref = saved(tmp_path / "model")
    for number in range(1, 12):
        store.register("reviews", ref, str(number), {"slimline.verdict": "FAIL" if number > 9 else "PASS"}, "")
    (one,) = exporter.standings()
    assert one.not_passed_in_a_row == 2 and len(one.verdicts) == 11


def test_a_model_that_slimline_never_judged_is_not_shown(fresh_store):
    store.client().create_registered_model("somebody-elses")
    assert exporter.standings() == []


def test_prometheus_reads_champions_and_every_step_that_ends_once(fresh_store, tmp_path):
    version = candidate(tmp_path, "reviews", "FAIL", 1)
    with store.step_run("train.classifier", {}, {}) as run_id:  # before: it is not counted
        store.log_metrics(run_id, {"step_seconds": 5.0})
    with served(exporter.serve, 0.2) as port:
        numbers = until(port, ("slimline_gate_not_passed_in_a_row", "reviews"), 1.0)
        assert numbers[("slimline_gate_last_verdict", "FAIL", "reviews")] == 1.0
        assert ("slimline_champion_version", "reviews") not in numbers
        with store.step_run("prune.heads", {}, {}) as run_id:
            store.log_metrics(run_id, {"step_seconds": 42.0, "step_peak_memory_bytes": 3e9})
        with pytest.raises(ValueError), store.step_run("prune.heads", {}, {}):
            raise ValueError("on purpose")
        ledger.move("reviews", version, None, "promote", {})
        until(port, ("slimline_steps_total", "FAILED", "prune.heads"), 1.0)
        numbers = until(port, ("slimline_champion_version", "reviews"), 1.0)
        time.sleep(0.5)  # two more looks
        assert scrape(port)[("slimline_steps_total", "FINISHED", "prune.heads")] == 1.0
        assert numbers[("slimline_step_seconds_sum", "prune.heads")] == 42.0
        assert numbers[("slimline_step_peak_memory_bytes", "prune.heads")] == 3e9
        assert not [key for key in numbers if "train.classifier" in key]


def test_while_the_store_is_away_no_old_number_is_shown(fresh_store, tmp_path, monkeypatch):
    candidate(tmp_path, "reviews", "FAIL", 1)
    with served(exporter.serve, 0.1) as port:
        until(port, ("slimline_store_up",), 1.0)
        with monkeypatch.context() as away:
            away.setattr(store, "registered", lambda: (_ for _ in ()).throw(StoreError("the store is away")))
            numbers = until(port, ("slimline_store_up",), 0.0)
            assert not [key for key in numbers if "reviews" in key]
        until(port, ("slimline_gate_not_passed_in_a_row", "reviews"), 1.0)


def test_numbers_of_two_processes_in_a_folder_are_summed(tmp_path):
    count = "from prometheus_client import Counter; Counter('asked', 'Requests').inc(2)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}, check=True)
    with served(exporter.serve_folder, tmp_path) as port:
        assert scrape(port)[("asked_total",)] == 4.0


def test_a_folder_that_is_not_there_and_a_port_in_use_are_said(fresh_store, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is no folder\. Name the one"):
        exporter.serve_folder(free_port(), tmp_path / "nowhere")
    with served(exporter.serve_folder, tmp_path) as port, pytest.raises(ConfigError, match=rf"port {port} cannot be"):
        exporter.serve(port, 1.0)
