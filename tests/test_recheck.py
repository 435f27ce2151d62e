"""What is registered is loaded and asked again before the champion moves: real weights, in a fresh process."""

import json

import pytest

from slimline import artifact, judging, probe, recheck, release, step, store
from slimline.errors import GateError
from slimline.recheck import Wanted
from tests.decoders import make_decoder, seal_decoder
from tests.stores import saved
from tests.test_release import LIMITS
from tests.tiny import make_data, make_tiny


@pytest.fixture
def registered(fresh_store, tmp_path):
    """A classifier that was brought in, measured, judged and registered; and what the look at it asks for."""
    ref, _ = step.run("fetch.local", str(make_tiny("bert", tmp_path / "source")), {})
    quality, _ = step.run("evaluate.classification", ref, {"data": str(make_data(tmp_path / "data.parquet"))})
    verdict = passed(tmp_path, ref, quality)
    version = release.register("reviews", ref, verdict)
    digest = artifact.read(store.fetch(ref)).digest
    return Wanted(f"models:/reviews/{version}", digest, quality, verdict)


def passed(folder, ref, quality, answers=None):
    """The ref of a verdict that passed, as the gate stores it."""
    from slimline import gate

    about = artifact.read(store.fetch(ref))
    out = folder / "verdict"
    out.mkdir()
    verdict = gate.Verdict(
        status="PASS", sentence="PASS: it did.", limits=LIMITS, limits_digest=LIMITS.digest(), checks=()
    )  # fmt: skip
    (out / "verdict.json").write_text(verdict.model_dump_json())
    (out / judging.ANSWERS).write_text(json.dumps(answers or {}))
    asked = judging.Judging(
        name="reviews", champion=None, limits=LIMITS, quality=quality, baseline=quality, latency="l"
    ).model_dump(mode="json")
    stage = artifact.Stage(technique="gate", config=asked, metrics={}, parent=about.digest)
    manifest = artifact.seal(
        out, format="evaluation", task=about.task, labels=about.labels, base=about.base, history=(stage,)
    )
    with store.step_run("gate", {}, {}) as run_id:
        return store.save(run_id, out, manifest)


def weights(ref):
    return store.fetch(ref) / "model.safetensors"


@pytest.mark.slow
def test_what_was_judged_is_promoted_and_changed_bytes_are_not(registered):
    assert release.promote("reviews", 1) == "Version 1 of reviews is now the champion."
    file = weights(registered.ref)
    store.client().delete_registered_model_alias("reviews", "champion")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GateError, match=r"not what was judged: .*model.safetensors has changed"):
        release.promote("reviews", 1)
    with pytest.raises(GateError, match="has changed since it was sealed"):
        release.rollback("reviews")
    assert store.alias("reviews", "champion") is None


def test_bytes_that_were_exchanged_with_their_manifest_are_known_by_their_digest(registered):
    assert recheck.problem(registered) == ""
    folder = weights(registered.ref).parent
    before = artifact.read(folder)
    other = make_tiny("bert", folder.parent / "other", seed=1)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    artifact.seal(
        folder, format=before.format, task=before.task, labels=before.labels, base=before.base, history=before.history
    )
    assert f"not {registered.digest[:12]}" in recheck.problem(registered)


def test_a_label_that_is_answered_otherwise_than_recorded_is_told(registered):
    from slimline import evidence

    recorded = evidence.table(store.fetch(registered.quality))
    path = store.fetch(registered.ref)
    assert recheck.changed_labels(path, recorded) == ""
    surest = max(range(100), key=lambda i: recorded["score"][i])
    recorded["score"][surest] = 0.99
    recorded["predicted"][surest] = "neither"
    assert f"example {recorded['id'][surest]} was answered neither (0.990)" in recheck.changed_labels(path, recorded)


def test_a_language_model_is_known_again_by_its_losses(tmp_path):
    one, other = (language_of(tmp_path / side, seed) for side, seed in (("a", 0), ("b", 1)))
    assert one == language_of(tmp_path / "again", 0) and set(one) == set(probe.PLAIN)
    assert recheck.changed_losses(one, one) == ""
    assert "nats when it was judged" in recheck.changed_losses(other, one)
    assert "nats when it was judged" in recheck.changed_losses({}, one)


def language_of(folder, seed):
    from slimline import language

    return probe.losses(language.load(seal_decoder(make_decoder("llama", folder, seed=seed))))


def test_a_version_that_slimline_did_not_register_is_not_vouched_for(fresh_store, tmp_path):
    ref = saved(tmp_path / "1")
    store.register("reviews", ref, key="k", version_tags={}, description="")
    with pytest.raises(GateError, match="version 1 of reviews has no digest"):
        recheck.require("reviews", 1, "")
