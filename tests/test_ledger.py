"""Who is champion, decided by many processes at once against a real server, and by processes that die in the middle."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console
from typer.testing import CliRunner

from slimline import cli, ledger, store
from slimline.errors import ConfigError, DeniedError, GateError
from tests.stores import saved

CALLS = (
    "create_registered_model", "create_model_version", "set_registered_model_alias", "delete_registered_model_alias",
    "set_model_version_tag",
)  # fmt: skip
"""What a move asks of the registry that changes it."""


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


def forked(work, *arguments):
    """A process begun in `work`, with a connection of its own."""
    store._client.cache_clear()  # none is carried over a fork
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def race(version: int, expected: int, gun, told) -> None:
    ledger.read("race")
    gun.wait()
    try:
        told.put((version, 0, moved("race", version, expected)))
    except GateError as error:
        told.put((version, error.exit_code, str(error)))


def start_ten(folder: Path) -> None:
    first, *others = versions(folder, "race", 11)
    moved("race", first, None)
    context = multiprocessing.get_context("fork")
    gun, told = context.Barrier(len(others)), context.Queue()
    racers = [forked(race, version, first, gun, told) for version in others]
    said = {version: (code, text) for version, code, text in (told.get(timeout=300) for _ in racers)}
    for racer in racers:
        racer.join()
    assert sorted(code for code, _ in said.values()) == [0] + [4] * 9, said
    winner = next(version for version in others if said[version][0] == 0)
    assert said[winner][1] == f"Version {winner} of race is now the champion in place of version {first}."
    for version in set(others) - {winner}:
        assert f"version {winner}" in said[version][1] and "run the pipeline again" in said[version][1].lower()
    assert aliases("race") == (winner, first)
    whole = ledger.read("race").entries
    assert [e.number for e in whole] == list(range(1, len(whole) + 1))
    assert [(e.start, e.to) for e in whole if not e.lost] == [(None, first), (first, winner)]
    assert all(e.applied for e in whole if not e.lost)


@pytest.mark.slow
def test_of_ten_processes_that_promote_at_once_one_wins_and_nine_say_why_they_did_not(remote_store, tmp_path):
    start_ten(tmp_path)


def test_of_ten_that_share_a_sqlite_file_one_wins_as_well(fresh_store, tmp_path):
    start_ten(tmp_path)


def die(name: str, version: int, expected: int, calls: int) -> None:
    """Move the champion, and be killed right before (0, 2, ...) or after (1, 3, ...) a call that changes it."""
    left = calls

    def dying(plain):
        def call(*given, **named):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            answer = plain(*given, **named)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return answer

        return call

    for call in CALLS:
        setattr(MlflowClient, call, dying(getattr(MlflowClient, call)))
    moved(name, version, expected)
    os._exit(0)


@pytest.mark.slow
def test_a_process_killed_at_any_call_leaves_the_champion_on_the_old_or_the_new_and_the_next_goes_on(
    fresh_store, tmp_path
):
    first, second, third = versions(tmp_path, "dies", 3)
    moved("dies", first, None)
    store.set_alias("dies", "challenger", second)
    at, outcomes, champion = 0, [], first
    while True:
        process = forked(die, "dies", second if champion != second else third, champion, at)
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        standing = store.alias("dies", "champion")
        assert standing in (champion, second, third)
        state = ledger.settle("dies")
        assert aliases("dies") == (state.champion, state.previous)
        outcomes.append(state.champion != champion)
        champion = state.champion
        if process.exitcode == 0:
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
    monkeypatch.setattr(cli, "out", Console(highlight=False, width=200))

    def said(*words):
        return CliRunner().invoke(cli.app, ["ledger", *words]).output

    told = json.loads(said("reviews", "--json"))
    assert [(move["from"], move["to"], move["lost"]) for move in told] == [(None, one, False), (one, two, False)]
    assert told[0]["who"].startswith("ada on ") and told[0]["why"] == "a test" and told[0]["at"].endswith("+00:00")
    page = said("reviews")
    assert "promote" in page and "a test" in page and "ada on" in page
    assert said("unknown") == "The champion of unknown has never been moved.\n"


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
