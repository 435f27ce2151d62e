import pytest

from slimline import artifact, gate, judging, ledger, recheck, release, store
from slimline.errors import ConfigError, GateError
from tests.stores import saved

LIMITS = gate.Limits(margin=0.02)
REQUIRE = recheck.require


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    """Which versions were looked at. To load them is tested in test_recheck.py: these have bytes, not weights."""
    looked: list[tuple[str, int]] = []
    monkeypatch.setattr(recheck, "require", lambda name, version, verdict: looked.append((name, version)))
    return looked


def judged(folder, ref: str, status: str = "PASS", champion: int | None = None, limits: gate.Limits = LIMITS) -> str:
    """The ref of a stored verdict on a stored model, as the gate would leave it."""
    sentence = f"{status}: as a test wants it."
    verdict = gate.Verdict(
        status=status, sentence=sentence, limits=limits, limits_digest=limits.digest(), checks=()
    )  # fmt: skip
    asked = judging.Judging(
        name="reviews", champion=champion, limits=limits, quality="q", baseline="b", latency="l"
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


def candidate(
    folder, weights: bytes, status: str = "PASS", champion: int | None = None, limits: gate.Limits = LIMITS
) -> tuple[int, str]:  # fmt: skip
    """A registered version with its verdict."""
    ref = saved(folder, weights=weights)
    verdict = judged(folder, ref, status, champion, limits)
    return release.register("reviews", ref, verdict), verdict


def aliases() -> dict[str, int | None]:
    return {which: store.alias("reviews", which) for which in ledger.ALIASES}


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
    (move,) = release.history("reviews")
    assert move["forced"] == "yes" and move["verdict"] == "INCONCLUSIVE"


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
    with pytest.raises(GateError, match="moved from none to version 1 since the verdict"):
        release.promote("reviews", two)  # nor does asking for it by hand: nobody has compared the two
    assert aliases()["champion"] == one


def test_a_version_is_looked_at_before_the_champion_moves_and_only_then(fresh_store, tmp_path, unloaded):
    one, first = candidate(tmp_path / "1", b"one")
    assert unloaded == []
    release.promote_if_passed("reviews", one, first)
    assert unloaded == [("reviews", one)]
    late, verdict = candidate(tmp_path / "2", b"two", champion=None)
    release.promote_if_passed("reviews", late, verdict)  # the champion has moved: there is nothing to look at
    two, verdict = candidate(tmp_path / "3", b"three", champion=one)
    release.promote_if_passed("reviews", two, verdict)
    release.rollback("reviews")
    assert unloaded == [("reviews", one), ("reviews", two), ("reviews", one)]


def test_a_version_that_does_not_hold_is_not_promoted_and_the_sentence_says_why(fresh_store, tmp_path, monkeypatch):
    def changed(name, version, verdict):
        raise GateError(f"version {version} of {name} is not what was judged")

    one, verdict = candidate(tmp_path / "1", b"one")
    monkeypatch.setattr(recheck, "require", changed)
    assert "not promoted: version 1 of reviews is not what was judged" in release.promote_if_passed(
        "reviews", one, verdict
    )
    assert aliases() == {"champion": None, "challenger": one, "previous": None} and release.history("reviews") == []


def test_an_alias_that_was_deleted_meanwhile_is_a_champion_that_moved(fresh_store, tmp_path):
    one, first = candidate(tmp_path / "1", b"one")
    release.promote_if_passed("reviews", one, first)
    two, second = candidate(tmp_path / "2", b"two", champion=one)
    store.client().delete_registered_model_alias("reviews", "champion")
    assert "moved from version 1 to none" in release.promote_if_passed("reviews", two, second)
    assert release.standing("reviews") == ("", "")
    assert "now the champion" in release.rollback("reviews")
    assert aliases()["champion"] == one


def test_a_pipeline_is_told_the_champion_and_whether_to_measure_it(fresh_store, tmp_path):
    assert release.standing("reviews") == ("", "")
    one, verdict = candidate(tmp_path / "1", b"one")
    release.promote_if_passed("reviews", one, verdict)
    assert release.standing("reviews") == ("models:/reviews/1", "models:/reviews/1")
    assert release.standing("reviews", compare=False) == ("models:/reviews/1", "")
    assert judging._standing("reviews", "models:/reviews/1") == 1 and judging._standing("reviews", "") is None
    assert judging._standing("reviews", None) == 1
    with pytest.raises(ConfigError, match="no version of reviews"):
        judging._standing("reviews", "models:/other/1")


def test_a_verdict_about_other_bytes_promotes_nothing(fresh_store, tmp_path, monkeypatch):
    ref, other = saved(tmp_path / "1", weights=b"one"), saved(tmp_path / "2", weights=b"two")
    monkeypatch.setattr(recheck, "require", REQUIRE)
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
    assert [(move["kind"], move["to"]) for move in release.history("reviews")] == [
        ("promote", 1), ("promote", 2), ("rollback", 1), ("rollback", 2)
    ]  # fmt: skip


def test_rollback_goes_to_any_version_that_was_champion_and_to_no_other(fresh_store, tmp_path):
    for number in range(3):
        version, verdict = candidate(tmp_path / str(number), f"{number}".encode(), champion=aliases()["champion"])
        release.promote_if_passed("reviews", version, verdict)
    candidate(tmp_path / "never", b"never")
    assert "now the champion in place of version 3" in release.rollback("reviews", 1, "complaints since Monday")
    assert release.history("reviews")[-1]["why"] == "complaints since Monday"
    assert "champion already" in release.rollback("reviews", 1)
    with pytest.raises(GateError, match="version 4 of reviews was never champion"):
        release.rollback("reviews", 4)
    with pytest.raises(ConfigError, match="no version -1"):
        release.rollback("reviews", -1)


def test_there_is_nothing_to_roll_back_to_at_first(fresh_store, tmp_path):
    version, verdict = candidate(tmp_path / "1", b"one")
    release.promote_if_passed("reviews", version, verdict)
    with pytest.raises(GateError, match="no version before the champion"):
        release.rollback("reviews")


def test_a_model_that_does_not_run_is_not_blessed(tmp_path, tiny_bert):
    assert judging.bless(tiny_bert).ok
    weights = tiny_bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    blessing = judging.bless(tiny_bert)
    assert not blessing.ok and "has changed" in blessing.problem
    assert not judging.bless(tmp_path / "nowhere").ok
