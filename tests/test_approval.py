"""A person's word between the verdict and the champion, given on the command line or as a tag on MLflow's page."""

import os
import subprocess
import sys

import pytest

from slimline import gate, release, store
from slimline.errors import GateError, StoreError
from tests.test_release import aliases, candidate, unloaded  # noqa: F401

ASKED = gate.Limits(margin=0.02, require_approval=True)


def waiting(folder, weights: bytes, champion: int | None = None, status: str = "PASS") -> tuple[int, str]:
    return candidate(folder, weights, status, champion, ASKED)


def tags(version: int) -> dict[str, str]:
    return store.version_of(f"models:/reviews/{version}").tags


def test_what_has_passed_waits_and_the_champion_stays(fresh_store, tmp_path):
    one, verdict = waiting(tmp_path / "1", b"one")
    assert tags(one)["slimline.approval"] == "pending"
    said = release.promote_if_passed("reviews", one, verdict)
    assert "not promoted: version 1 of reviews has passed and waits for approval: `slimline approve reviews 1`" in said
    with pytest.raises(GateError, match="waits for approval"):
        release.promote("reviews", one)
    assert aliases() == {"champion": None, "challenger": one, "previous": None}
    assert release.promote_approved("reviews") == []


def test_an_approved_version_is_carried_out_and_the_ledger_says_who_approved(fresh_store, tmp_path, monkeypatch):
    one, _ = waiting(tmp_path / "1", b"one")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "grace")
    assert "is approved by grace on" in release.approve("reviews", one, note="read the report")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "robot")
    assert release.promote_approved("reviews") == ["Version 1 of reviews is now the champion."]
    (move,) = release.history("reviews")
    assert move["approved"].startswith("grace on ") and move["who"].startswith("robot on ")
    assert tags(one)["slimline.approval.note"] == "read the report"
    assert release.promote_approved("reviews") == []  # once


def test_a_tag_set_on_mlflows_page_approves_and_nobody_claims_to_know_who(fresh_store, tmp_path):
    one, _ = waiting(tmp_path / "1", b"one")
    store.client().set_model_version_tag("reviews", str(one), "slimline.approval", " Approved ")
    assert release.standing("reviews")[0] == "models:/reviews/1"  # the next run carries it out before it begins
    assert release.history("reviews")[0]["approved"].endswith("it does not say who")


def test_what_was_rejected_stays_out_and_the_reason_is_told(fresh_store, tmp_path):
    one, verdict = waiting(tmp_path / "1", b"one")
    assert "is rejected by" in release.approve("reviews", one, reject=True, note="the labels are odd")
    assert release.promote_approved("reviews") == []
    with pytest.raises(GateError, match=r"was rejected by .*: the labels are odd\."):
        release.promote("reviews", one)
    release.approve("reviews", one)  # minds change
    assert "now the champion" in release.promote_if_passed("reviews", one, verdict)


def test_of_two_approved_against_one_champion_the_first_is_promoted_and_the_second_says_it_is_outdated(
    fresh_store, tmp_path
):
    one, _ = waiting(tmp_path / "1", b"one")
    two, _ = waiting(tmp_path / "2", b"two")
    release.approve("reviews", two)
    release.approve("reviews", one)
    first, second = release.promote_approved("reviews")
    assert first == "Version 1 of reviews is now the champion."
    assert "approved, not promoted: the champion of reviews moved from none to version 1" in second
    assert tags(two)["slimline.approval_outcome"] == second and release.promote_approved("reviews") == []
    assert aliases()["champion"] == one


def test_a_persons_word_holds_for_the_verdict_that_they_saw(fresh_store, tmp_path):
    one, verdict = waiting(tmp_path / "1", b"one")
    release.approve("reviews", one)
    ref = store.version_of(f"models:/reviews/{one}")
    source = f"runs:/{ref.run_id}/model"
    release.register("reviews", source, verdict)  # the same verdict: a pipeline that was started again
    assert tags(one)["slimline.approval"] == "approved"
    from tests.test_release import judged

    release.register("reviews", source, judged(tmp_path / "later", source, limits=ASKED))
    assert tags(one)["slimline.approval"] == "pending"


@pytest.mark.parametrize("status", ["FAIL", "INCONCLUSIVE"])
def test_what_has_not_passed_cannot_be_approved(fresh_store, tmp_path, status):
    one, _ = waiting(tmp_path / "1", b"one", status=status)
    assert "slimline.approval" not in tags(one)
    with pytest.raises(GateError, match=f"waits for no approval: its verdict is {status}"):
        release.approve("reviews", one)
    store.client().set_model_version_tag("reviews", str(one), "slimline.approval", "approved")
    (said,) = release.promote_approved("reviews")
    assert f"its verdict is {status}" in said and aliases()["champion"] is None


def test_a_store_that_is_away_leaves_the_approval_for_later(fresh_store, tmp_path, monkeypatch):
    one, _ = waiting(tmp_path / "1", b"one")
    release.approve("reviews", one)

    def away(name, version, verdict):
        raise StoreError("the bucket does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(release.recheck, "require", away)
        with pytest.raises(StoreError):
            release.promote_approved("reviews")
    assert release.promote_approved("reviews") == ["Version 1 of reviews is now the champion."]


def test_the_command_line_approves_and_says_what_waits(fresh_store, tmp_path):
    one, _ = waiting(tmp_path / "1", b"one")

    def slimline(*words):
        command = [sys.executable, "-m", "slimline.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))

    assert slimline("promote", "reviews", "--pending").stdout == "Nothing that was approved of reviews is waiting.\n"
    refused = slimline("promote", "reviews", str(one))
    assert refused.returncode == 4 and "waits for approval" in refused.stderr
    assert "is approved by" in slimline("approve", "reviews", str(one), "--note", "fine").stdout
    assert slimline("promote", "reviews", "1", "--pending").returncode == 2
