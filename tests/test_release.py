import json
import multiprocessing
import os

import pytest

from slimline import artifact, gate, release, store
from slimline.errors import ConfigError, GateError
from tests.stores import saved

LIMITS = gate.Limits(margin=0.02)


def judged(folder, ref: str, status: str = "PASS", champion: int | None = None) -> str:
    """The ref of a stored verdict on a stored model, as the gate would leave it."""
    sentence = f"{status}: as a test wants it."
    verdict = gate.Verdict(
        status=status, sentence=sentence, limits=LIMITS, limits_digest=LIMITS.digest(), checks=()
    )  # fmt: skip
    asked = release.Judging(
        name="reviews", champion=champion, limits=LIMITS, quality="q", baseline="b", latency="l"
    ).model_dump(mode="json")
    about = artifact.read(store.fetch(ref))
    out = folder / "verdict"
    out.mkdir(parents=True)
    (out / "verdict.json").write_text(verdict.model_dump_json())
    stage = artifact.Stage(technique="gate", config=asked, metrics={}, parent=about.digest)
    manifest = artifact.seal(
        out, format="evaluation", task=about.task, labels=about.labels, base=about.base, history=(stage,)
    )
    with store.step_run("gate", {}, {}) as run_id:
        return store.save(run_id, out, manifest)


def candidate(folder, weights: bytes, status: str = "PASS", champion: int | None = None) -> tuple[int, str]:
    """A registered version with its verdict."""
    ref = saved(folder, weights=weights)
    verdict = judged(folder, ref, status, champion)
    return release.register("reviews", ref, verdict), verdict


def aliases() -> dict[str, int | None]:
    return {which: store.alias("reviews", which) for which in release.ALIASES}


def test_a_version_that_passed_becomes_the_champion_and_the_old_one_previous(fresh_store, tmp_path):
    one, verdict = candidate(tmp_path / "1", b"one")
    assert aliases() == {"champion": None, "challenger": one, "previous": None}
    assert release.promote_if_passed("reviews", one, verdict) == "Version 1 of reviews is now the champion."
    two, verdict = candidate(tmp_path / "2", b"two", champion=one)
    assert "in place of version 1" in release.promote_if_passed("reviews", two, verdict)
    assert aliases() == {"champion": two, "challenger": None, "previous": one}


@pytest.mark.parametrize("status", ["FAIL", "INCONCLUSIVE", "INVALID"])
def test_any_other_verdict_registers_with_its_reason_and_promotes_nothing(fresh_store, tmp_path, status):
    version, verdict = candidate(tmp_path / "1", b"one", status)
    said = release.promote_if_passed("reviews", version, verdict)
    assert f"registered, not promoted: the verdict is {status}" in said
    assert aliases()["champion"] is None
    assert f"{status}: as a test wants it." in store.version_of(f"models:/reviews/{version}").description
    with pytest.raises(GateError, match=f"its verdict is {status}"):
        release.promote("reviews", version)


def test_only_inconclusive_can_be_forced_and_that_is_recorded(fresh_store, tmp_path):
    failed, _ = candidate(tmp_path / "1", b"one", "FAIL")
    unsure, _ = candidate(tmp_path / "2", b"two", "INCONCLUSIVE")
    with pytest.raises(GateError, match="FAIL"):
        release.promote("reviews", failed, allow_inconclusive=True)
    release.promote("reviews", unsure, allow_inconclusive=True)
    (entry,) = (fresh_store / "promotions" / "reviews").glob("*.json")
    assert json.loads(entry.read_text())["forced"] is True


def test_the_challenger_is_promoted_by_name_alone(fresh_store, tmp_path):
    version, _ = candidate(tmp_path / "1", b"one")
    release.promote("reviews")
    assert aliases()["champion"] == version
    assert "champion already" in release.promote("reviews", version)
    with pytest.raises(ConfigError, match="no challenger"):
        release.promote("reviews")


def test_a_verdict_computed_against_another_champion_promotes_nothing(fresh_store, tmp_path):
    one, first = candidate(tmp_path / "1", b"one")
    two, second = candidate(tmp_path / "2", b"two", champion=None)  # judged while there was no champion yet
    release.promote_if_passed("reviews", one, first)
    said = release.promote_if_passed("reviews", two, second)
    assert "moved from none to version 1 since the verdict" in said
    assert aliases()["champion"] == one


def test_a_verdict_about_other_bytes_promotes_nothing(fresh_store, tmp_path):
    ref, other = saved(tmp_path / "1", weights=b"one"), saved(tmp_path / "2", weights=b"two")
    version = release.register("reviews", ref, judged(tmp_path / "3", other))
    with pytest.raises(GateError, match="about other bytes"):
        release.promote("reviews", version)


def test_rollback_takes_a_champion_back_and_a_second_one_undoes_the_first(fresh_store, tmp_path):
    for number, weights in enumerate((b"one", b"two")):
        version, verdict = candidate(tmp_path / str(number), weights, champion=aliases()["champion"])
        release.promote_if_passed("reviews", version, verdict)
    release.rollback("reviews")
    assert (aliases()["champion"], aliases()["previous"]) == (1, 2)
    release.rollback("reviews")
    assert (aliases()["champion"], aliases()["previous"]) == (2, 1)
    moves = sorted((fresh_store / "promotions" / "reviews").glob("*.json"))
    assert [json.loads(m.read_text())["to"] for m in moves] == [1, 2, 1, 2]
    tags = store.client().get_registered_model("reviews").tags
    assert len([key for key in tags if key.startswith("slimline.move.")]) == 4


def test_there_is_nothing_to_roll_back_to_at_first(fresh_store, tmp_path):
    version, verdict = candidate(tmp_path / "1", b"one")
    release.promote_if_passed("reviews", version, verdict)
    with pytest.raises(GateError, match="no version before the champion"):
        release.rollback("reviews")


def _race(version: int, expected: int, gun) -> None:
    gun.wait()
    try:
        release._move("reviews", version, expected, "race")
    except GateError:
        os._exit(4)
    os._exit(0)


def test_of_six_that_promote_at_once_one_wins_and_the_ledger_is_whole(fresh_store, tmp_path):
    first, verdict = candidate(tmp_path / "0", b"zero")
    release.promote_if_passed("reviews", first, verdict)
    versions = [candidate(tmp_path / str(i), f"{i}".encode(), champion=first)[0] for i in range(1, 7)]
    store._client.cache_clear()  # no connection is carried over a fork
    context = multiprocessing.get_context("fork")
    gun = context.Barrier(len(versions))
    racers = [context.Process(target=_race, args=(version, first, gun)) for version in versions]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    codes = [racer.exitcode for racer in racers]
    assert sorted(codes) == [0] + [4] * 5
    assert aliases()["champion"] == versions[codes.index(0)] and aliases()["previous"] == first
    assert len(list((fresh_store / "promotions" / "reviews").glob("*.json"))) == 2


def test_a_model_that_does_not_run_is_not_blessed(tmp_path, tiny_bert):
    assert release.bless(tiny_bert).ok
    weights = tiny_bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    blessing = release.bless(tiny_bert)
    assert not blessing.ok and "has changed" in blessing.problem
    assert not release.bless(tmp_path / "nowhere").ok
