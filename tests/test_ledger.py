"""Who is champion, decided by many processes at once against a real server, and by processes that die in the middle."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slimline import ledger, store
from slimline.errors import ConfigError, DeniedError, GateError
from tests.stores import saved

ROOT = Path(__file__).parent.parent
MOVE = """
import json, sys
from slimline import ledger
from slimline.errors import SlimlineError
name, version, expected = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None
store_is_open = ledger.read(name)
print("ready", flush=True)
sys.stdin.readline()
try:
    print(ledger.move(name, version, expected, "promote", {"why": "a race"}))
except SlimlineError as error:
    print(error)
    sys.exit(error.exit_code)
"""
DYING = """
import os, signal, sys
from slimline import ledger, store
from mlflow import MlflowClient
CALLS = ("create_registered_model", "create_model_version", "set_registered_model_alias",
         "delete_registered_model_alias", "set_model_version_tag")
left = int(sys.argv[4])

def dying(plain):
    def call(*given, **named):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        answer = plain(*given, **named)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return answer
    return call

for name in CALLS:
    setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
ledger.move(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, "promote", {"why": "one that dies"})
"""


def versions(folder: Path, name: str, count: int) -> list[int]:
    """Registered versions of a model, enough for a registry, all of the same bytes."""
    ref = saved(folder / "saved", weights=name.encode())
    return [store.register(name, ref, key=f"{ref}-{i}", version_tags={}, description="") for i in range(count)]


def aliases(name: str) -> tuple[int | None, int | None]:
    return store.alias(name, "champion"), store.alias(name, "previous")


def moved(name: str, version: int, expected: int | None, kind: str = "promote") -> str:
    return ledger.move(name, version, expected, kind, {"why": "a test"})


def moves(name: str) -> list[tuple[str, int | None, int | None, bool]]:
    return [(e.kind, e.start, e.to, e.lost) for e in ledger.read(name).entries]


def start(code: str, *arguments: object, **pipes) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, text=True, env=environment, stderr=subprocess.DEVNULL, **pipes)


@pytest.mark.slow
def test_of_ten_processes_that_promote_at_once_one_wins_and_nine_say_why_they_did_not(remote_store, tmp_path):
    first, *others = versions(tmp_path, "race", 11)
    moved("race", first, None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    racers = [start(MOVE, "race", version, first, **pipes) for version in others]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=300)[0].strip() for racer in racers]
    codes = [racer.returncode for racer in racers]
    assert sorted(codes) == [0] + [4] * 9, said
    winner = others[codes.index(0)]
    assert said[codes.index(0)] == f"Version {winner} of race is now the champion in place of version {first}."
    assert all(f"version {winner}" in text and "Run the pipeline again" in text.replace("run", "Run") for text in said
               if "is now" not in text)  # fmt: skip
    assert aliases("race") == (winner, first)
    whole = ledger.read("race").entries
    assert [e.number for e in whole] == list(range(1, len(whole) + 1))
    assert [(e.start, e.to) for e in whole if not e.lost] == [(None, first), (first, winner)]
    assert all(e.applied for e in whole if not e.lost)


def _race(version: int, expected: int, gun) -> None:
    gun.wait()
    try:
        moved("race", version, expected)
    except GateError:
        os._exit(4)
    os._exit(0)


def test_of_ten_that_share_a_sqlite_file_one_wins_as_well(fresh_store, tmp_path):
    first, *others = versions(tmp_path, "race", 11)
    moved("race", first, None)
    store._client.cache_clear()  # no connection is carried over a fork
    context = multiprocessing.get_context("fork")
    gun = context.Barrier(len(others))
    racers = [context.Process(target=_race, args=(version, first, gun)) for version in others]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    codes = [racer.exitcode for racer in racers]
    assert sorted(codes) == [0] + [4] * 9
    winner = others[codes.index(0)]
    assert aliases("race") == (winner, first)
    assert [(e.start, e.to) for e in ledger.read("race").entries if not e.lost] == [(None, first), (first, winner)]


@pytest.mark.slow
def test_a_process_killed_at_any_call_leaves_the_champion_on_the_old_or_the_new_and_the_next_goes_on(
    fresh_store, tmp_path
):
    first, second, third = versions(tmp_path, "dies", 3)
    moved("dies", first, None)
    store.set_alias("dies", "challenger", second)
    at, outcomes, champion = 0, [], first
    while True:
        process = start(DYING, "dies", second if champion != second else third, champion, at)
        process.wait(120)
        assert process.returncode in (0, -signal.SIGKILL)
        standing = store.alias("dies", "champion")
        assert standing in (champion, second, third)
        state = ledger.settle("dies")
        assert aliases("dies") == (state.champion, state.previous)
        outcomes.append(state.champion != champion)
        champion = state.champion
        if process.returncode == 0:
            break
        back = first if champion != first else second
        assert "is now the champion" in moved("dies", back, champion)  # the next one is not hindered
        assert aliases("dies") == (back, champion)
        champion, at = back, at + 1
    assert outcomes[0] is False and all(outcomes[1:])  # nothing before the entry is written, everything after it
    assert len(outcomes) >= 8
    assert not any(entry.lost for entry in ledger.read("dies").entries)


def test_an_entry_counts_only_from_where_the_champion_stands(fresh_store, tmp_path):
    one, two, three = versions(tmp_path, "reviews", 3)
    assert moved("reviews", one, None) == "Version 1 of reviews is now the champion."
    with pytest.raises(GateError, match="moved from none to version 1 since the verdict"):
        moved("reviews", two, None)
    assert "in place of version 1" in moved("reviews", two, one)
    assert aliases("reviews") == (two, one)
    moved("reviews", one, two, "rollback")
    assert aliases("reviews") == (one, two)
    assert moves("reviews") == [
        ("promote", None, one, False), ("promote", one, two, False), ("rollback", two, one, False)
    ]  # fmt: skip
    assert three not in ledger.read("reviews").reigned


def test_an_entry_that_came_too_late_is_kept_as_lost_and_moves_nothing(fresh_store, tmp_path):
    one, two, three = versions(tmp_path, "reviews", 3)
    moved("reviews", one, None)
    ledger._write("reviews", "promote", one, two, "n1", {})
    ledger._write("reviews", "promote", one, three, "n2", {})  # its writer had read the ledger before n1 was in it
    assert ledger.settle("reviews").champion == two
    assert aliases("reviews") == (two, one)
    assert moves("reviews")[1:] == [("promote", one, two, False), ("promote", one, three, True)]


def test_a_repeated_post_counts_once(fresh_store, tmp_path):
    one, two = versions(tmp_path, "reviews", 2)
    for version, expected in ((one, None), (two, one), (one, two)):
        moved("reviews", version, expected)
    nonce = ledger.read("reviews").entries[1].about["nonce"]
    ledger._write("reviews", "promote", one, two, nonce, {})  # starts where the champion stands, but was sent before
    assert ledger.settle("reviews").champion == one
    assert store.alias("reviews", "champion") == one


def test_an_alias_that_was_moved_or_removed_by_hand_is_written_down_and_not_put_back(fresh_store, tmp_path):
    one, two, three = versions(tmp_path, "reviews", 3)
    moved("reviews", one, None)
    store.client().set_registered_model_alias("reviews", "champion", str(two))
    with pytest.raises(GateError, match="moved from version 1 to version 2 since the verdict"):
        moved("reviews", three, one)
    store.client().delete_registered_model_alias("reviews", "champion")
    with pytest.raises(GateError, match="moved from version 2 to none"):
        moved("reviews", three, two)
    assert ledger.settle("reviews").previous == two  # which rollback would go to
    moved("reviews", three, None)
    assert [(kind, to) for kind, _, to, _ in moves("reviews")] == [
        ("promote", one), ("found", two), ("found", None), ("promote", three)
    ]  # fmt: skip
    assert aliases("reviews") == (three, two)


def test_a_champion_from_before_the_ledger_is_found(fresh_store, tmp_path):
    one, two = versions(tmp_path, "reviews", 2)
    store.set_alias("reviews", "champion", one)
    moved("reviews", two, one)
    assert moves("reviews") == [("found", None, one, False), ("promote", one, two, False)]


def test_a_version_that_was_deleted_before_its_entry_was_carried_out_blocks_nothing(fresh_store, tmp_path):
    one, two, three = versions(tmp_path, "reviews", 3)
    moved("reviews", one, None)
    ledger._write("reviews", "promote", one, two, "died", {})
    store.client().delete_model_version("reviews", str(two))
    assert ledger.settle("reviews").champion == one  # found where it still stood
    moved("reviews", three, one)
    assert aliases("reviews") == (three, one)


def test_a_slow_process_that_overwrites_a_newer_move_repairs_it(fresh_store, tmp_path, monkeypatch):
    one, two, three = versions(tmp_path, "reviews", 3)
    moved("reviews", one, None)
    ledger._write("reviews", "promote", one, two, "slow", {})
    plain, done = store.set_alias, []

    def interrupted(name, which, version):
        if not done:  # another process carries this entry out and promotes once more, before this one's call arrives
            done.append(True)
            moved(name, three, two)
        plain(name, which, version)

    monkeypatch.setattr(store, "set_alias", interrupted)
    assert ledger.settle("reviews").champion == three
    assert aliases("reviews") == (three, two)
    assert [kind for kind, *_ in moves("reviews")] == ["promote"] * 3


def test_no_clock_decides(fresh_store, tmp_path, monkeypatch):
    one, two = versions(tmp_path, "reviews", 2)
    clock = "mlflow.store.model_registry.sqlalchemy_store.get_current_time_millis"
    monkeypatch.setattr(clock, lambda: 4_000_000_000_000)
    moved("reviews", one, None)
    monkeypatch.setattr(clock, lambda: 1_000)
    moved("reviews", two, one)
    entries = ledger.read("reviews").entries
    assert entries[0].at > entries[1].at and aliases("reviews") == (two, one)
    assert entries[1].plain()["at"] == "1970-01-01T00:00:01+00:00"


def test_the_ledger_says_who_when_and_why_on_the_command_line(fresh_store, tmp_path, monkeypatch):
    one, two = versions(tmp_path, "reviews", 2)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    moved("reviews", one, None)
    moved("reviews", two, one)
    command = [sys.executable, "-m", "slimline.cli", "ledger", "reviews"]
    environment = {**os.environ, "COLUMNS": "200"}
    told = json.loads(subprocess.check_output([*command, "--json"], env=environment, text=True))
    assert [(move["from"], move["to"], move["lost"]) for move in told] == [(None, one, False), (one, two, False)]
    assert told[0]["who"].startswith("ada on ") and told[0]["why"] == "a test" and told[0]["at"].endswith("+00:00")
    page = subprocess.check_output(command, env=environment, text=True)
    assert "promote" in page and "a test" in page and "ada on" in page
    nothing = subprocess.check_output([*command[:-1], "unknown"], env=environment, text=True)
    assert nothing == "The champion of unknown has never been moved.\n"


@pytest.mark.slow
def test_with_sign_in_only_who_may_edit_model_and_ledger_moves_the_champion(remote_store, tmp_path, monkeypatch):
    from mlflow.server.auth.client import AuthServiceClient

    one, two = versions(tmp_path, "guarded", 2)
    moved("guarded", one, None)
    admin = AuthServiceClient(remote_store.uri)
    for user in ("runner", "promoter"):
        admin.create_user(user, "a-password-for-tests")
    for model in ("guarded", "guarded" + store.LEDGER):
        admin.grant_user_permission("promoter", "registered_model", model, "EDIT")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-password-for-tests")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "runner")
    with pytest.raises(DeniedError, match=r"runner may not change the registered model guarded.ledger .* Ask for EDIT"):
        moved("guarded", two, one)
    with pytest.raises(DeniedError, match="runner may not change the registered model guarded at"):
        store.set_alias("guarded", "champion", two)
    with pytest.raises(DeniedError):
        store.tag_version("guarded", two, {"slimline.approval": "approved"})
    assert aliases("guarded") == (one, None) and len(ledger.read("guarded").entries) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "promoter")
    store.set_alias("guarded", "challenger", two)
    assert "is now the champion" in moved("guarded", two, one)
    assert aliases("guarded") == (two, one)
    assert store.alias("guarded", "challenger") == two  # removing an alias takes MANAGE, and nothing waits for it
    assert "is now the champion" in moved("guarded", one, two, "rollback")
    assert ledger.read("guarded").entries[-1].about["who"].startswith("promoter on ")


def test_the_name_of_a_ledger_cannot_be_that_of_a_model():
    with pytest.raises(ConfigError, match="cannot name a registered model"):
        store.check_name("reviews" + store.LEDGER)
