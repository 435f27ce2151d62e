"""From a verdict to the registry: register, promote, approve, roll back.

    register   one version per candidate and limits, however often it is asked
    promote    what has passed, and was approved if that was asked for, becomes champion if the champion still stands
               where it stood when the verdict was given
    approve    a person's word on a version that waits for it
    rollback   the champion and one that was champion before change places

Before the champion moves, a fresh process loads what is registered and asks it again (recheck.py). That the champion
moves once, whoever asks at the same moment, is the ledger's doing (ledger.py).
"""

# Long because registering, approving and moving the champion are one story, told once.
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimline import artifact, card, judging, ledger, progress, recheck, step, store
from slimline.errors import ConfigError, DeniedError, GateError, StoreError
from slimline.ledger import ALIASES, CHALLENGER, CHAMPION
from slimline.technique import Metrics

APPROVAL, OUTCOME = store.PREFIX + "approval", store.PREFIX + "approval_outcome"
PENDING, APPROVED, REJECTED = "pending", "approved", "rejected"


def register(name: str, source: str, verdict_ref: str) -> int:
    """The version of `name` for this candidate under these limits: made now, or found. Becomes the challenger."""
    with step.timed("register"):
        verdict, asked, _ = judging.verdict_at(verdict_ref)
        candidate = step.resolve(source)
        manifest = candidate.manifest or artifact.read(candidate.path)
        tags = {
            "verdict": verdict.status, "verdict_ref": verdict_ref, "digest": candidate.digest,
            "limits": asked.limits.digest(), "format": manifest.format, "base": manifest.base,
            "pipeline_run": store.pipeline_run(),
        }  # fmt: skip
        tags = {store.PREFIX + k: v for k, v in tags.items() if v}
        key = f"{candidate.digest}-{asked.limits.digest()}"
        version = store.register(name, source, key=key, version_tags=tags, description=verdict.sentence)
        before = store.version_of(f"models:/{name}/{version}").tags
        waits = verdict.allows_promotion and asked.limits.require_approval
        if waits and (APPROVAL not in before or before.get(store.PREFIX + "verdict_ref") != verdict_ref):
            tags |= {APPROVAL: PENDING, OUTCOME: ""}  # a person's word holds for the verdict that they saw
        store.tag_version(name, version, tags)
        store.describe_version(name, version, card.description(name, version, verdict, asked, manifest))
        if store.alias(name, CHAMPION) != version:
            store.set_alias(name, CHALLENGER, version)
        return version


def standing(name: str, compare: bool = True) -> tuple[str, str]:
    """What a pipeline asks first: the ref of the champion, and of what is to be measured beside the candidate.

    Both are empty where there is no champion, the second also if it is not to be compared with. What people have
    approved meanwhile is carried out before, so that this pipeline is judged against it.
    """
    with step.timed("champion"):
        try:
            for sentence in promote_approved(name):
                progress.emit("progress", "champion", what=sentence, done=0, total=0, note="")
            champion = ledger.settle(name).champion
        except DeniedError:  # this role may look, and another one moves
            champion = store.alias(name, CHAMPION)
        ref = f"models:/{name}/{champion}" if champion else ""
        return ref, ref if compare else ""


def promote_if_passed(name: str, version: int, verdict_ref: str) -> str:
    """What the pipeline does: promote on PASS, else leave the champion where it is. One sentence says which."""
    with step.timed("promote"):
        verdict, _, _ = judging.verdict_at(verdict_ref)
        try:
            if not verdict.allows_promotion:
                raise GateError(f"the verdict is {verdict.status}.")
            sentence = _promote(name, version, verdict_ref)
        except GateError as error:
            sentence = f"Version {version} of {name} is registered, not promoted: {error}"
        return sentence


def promote(name: str, version: int | None = None, allow_inconclusive: bool = False) -> str:
    """Make a version (without one: the challenger) the champion. Raises GateError if its verdict does not allow it."""
    store.check_name(name)
    version = version if version is not None else store.alias(name, CHALLENGER)
    if version is None:
        raise ConfigError(f"{name} has no challenger. Give a version: see `slimline ui`.")
    ref = store.version_of(f"models:/{name}/{version}").tags.get(store.PREFIX + "verdict_ref", "")
    if not ref:
        raise GateError(f"version {version} of {name} has no verdict. Run the pipeline that measures it.")
    return _promote(name, version, ref, allow_inconclusive)


def _promote(name: str, version: int, verdict_ref: str, allow_inconclusive: bool = False) -> str:
    """Move the champion to a version that has passed, was approved and is what was judged. Else raise GateError."""
    verdict, asked, _ = judging.verdict_at(verdict_ref)
    if verdict.status not in (("PASS", "INCONCLUSIVE") if allow_inconclusive else ("PASS",)):
        hint = " --allow-inconclusive would." if verdict.status == "INCONCLUSIVE" else ""
        raise GateError(f"version {version} of {name} is not promoted: its verdict is {verdict.status}.{hint}")
    state = ledger.settle(name)
    if state.champion == version:
        return f"Version {version} of {name} is the champion already."
    approved = _approval(name, version) if asked.limits.require_approval else ""
    if state.champion == asked.champion:  # else the ledger says so, and there is nothing to load
        recheck.require(name, version, verdict_ref)
    about = {
        "why": verdict.sentence, "verdict": verdict.status, "verdict_ref": verdict_ref, "approved": approved,
        "forced": "yes" if verdict.status != "PASS" else "",
    }  # fmt: skip
    return ledger.move(name, version, asked.champion, "promote", about)


def _approval(name: str, version: int) -> str:
    """Who approved a version, as far as is known. Raises GateError if nobody has, or somebody has rejected it."""
    tags = store.version_of(f"models:/{name}/{version}").tags
    said, who, note = (tags.get(key, "").strip() for key in (APPROVAL, APPROVAL + ".who", APPROVAL + ".note"))
    if said.lower() == APPROVED:
        return who or "somebody, by the tag on MLflow's page: it does not say who"
    if said.lower() == REJECTED:
        raise GateError(f"version {version} of {name} was rejected by {who or 'somebody'}{': ' if note else ''}{note}.")
    raise GateError(
        f"version {version} of {name} has passed and waits for approval: `slimline approve {name} {version}`, or set "
        f"its tag {APPROVAL} to {APPROVED} on MLflow's page. Then `slimline promote {name} --pending`, or the next run."
    )


def approve(name: str, version: int, reject: bool = False, note: str = "") -> str:
    """Give, or refuse, a person's word on a version that has passed and waits for it."""
    store.check_name(name)
    tags = store.version_of(f"models:/{name}/{version}").tags
    if APPROVAL not in tags:
        raise GateError(
            f"version {version} of {name} waits for no approval: its verdict is "
            f"{tags.get(store.PREFIX + 'verdict', 'missing')}, and only PASS under require_approval does."
        )
    word, who = REJECTED if reject else APPROVED, ledger.who()
    store.tag_version(name, version, {f"{APPROVAL}.who": who, f"{APPROVAL}.note": note, OUTCOME: "", APPROVAL: word})
    then = "" if reject else f" `slimline promote {name} --pending` carries it out, or the next run does."
    return f"Version {version} of {name} is {word} by {who}.{then}"


def promote_approved(name: str) -> list[str]:
    """Carry out everything that was approved, oldest version first, each against the champion that it was judged by.

    One sentence a version says what became of it, and stays on it as a tag, so that nothing is tried for ever. What the
    store cannot do now (StoreError) stays approved.
    """
    store.check_name(name)
    sentences = []
    for version in store.versions(name):
        said, done = (version.tags.get(key, "").strip() for key in (APPROVAL, OUTCOME))
        if said.lower() == APPROVED and not done:
            try:
                sentence = promote(name, int(version.version))
            except GateError as error:
                sentence = f"Version {version.version} of {name} was approved, not promoted: {error}"
            store.tag_version(name, int(version.version), {OUTCOME: sentence})
            sentences.append(sentence)
    return sentences


def rollback(name: str, to_version: int = 0, reason: str = "") -> str:
    """Give the champion's place back to one that had it: the one before, or a number. A second one undoes the first."""
    store.check_name(name)
    if to_version < 0:
        raise ConfigError(f"there is no version {to_version}. Give a number, or 0 for the one before.")
    state = ledger.settle(name)
    target = to_version or state.previous
    if target is None:
        raise GateError(f"{name} has no version before the champion to go back to. See `slimline ledger {name}`.")
    if target == state.champion:
        return f"Version {target} of {name} is the champion already."
    if target not in state.reigned:
        raise GateError(f"version {target} of {name} was never champion. `slimline promote {name} {target}` judges it.")
    ref = store.version_of(f"models:/{name}/{target}").tags.get(store.PREFIX + "verdict_ref", "")
    recheck.require(name, target, ref)
    about = {"why": reason or "rollback", "verdict_ref": ref}
    return ledger.move(name, target, state.champion, "rollback", about)


def roll_back(name: str, to_version: int, reason: str) -> str:
    """What the pipeline of that name does: roll back, and tell whoever watches."""
    with step.timed("rollback"):
        sentence = rollback(name, to_version, reason)
        progress.emit("summary", "rollback", name=name, outcome=sentence)
        return sentence


def history(name: str) -> list[dict[str, Any]]:
    """Every move of a model's champion, oldest first, as plain data."""
    return [entry.plain() for entry in ledger.read(name).entries]


def model_card(ref: str) -> str:
    """The card of a registered version, as a README.md for the Hub."""
    version = store.version_of(ref)
    verdict_ref = version.tags.get(store.PREFIX + "verdict_ref", "")
    if not verdict_ref:
        raise GateError(f"{ref} has no verdict, and so no card. Run the pipeline that measures it.")
    verdict, asked, _ = judging.verdict_at(verdict_ref)
    return card.whole(version.name, int(version.version), verdict, asked, artifact.read(store.fetch(ref)))


def show(ref: str, numbers: Metrics, model: Any, metrics: Any) -> str:
    """Fill the Kubeflow page's artifacts for a stored model: small, for display only. Returns the ref."""
    metrics.metadata.update(numbers)
    manifest = artifact.read(store.fetch(ref))
    card = {
        "ref": ref, "format": manifest.format, "digest": manifest.digest,
        "size_mb": round(manifest.size_bytes / 1e6, 3), "history": " > ".join(s.technique for s in manifest.history),
    }  # fmt: skip
    if ref.startswith("runs:/") and (page := store.page_of(store.run_id_of(ref))):
        card["mlflow"] = page
    model.metadata.update(card)
    Path(model.path).write_text(json.dumps(card, indent=2), encoding="utf-8")
    return ref


def about(ref: str) -> dict[str, Any]:
    """What `slimline show` says of a model, as plain data."""
    found = step.resolve(ref)
    if found.manifest is None:
        raise StoreError(f"{ref} is not a model that slimline made: it has no manifest. Bring it in with fetch.local.")
    about: dict[str, Any] = {
        **found.manifest.model_dump(mode="json", exclude={"version"}),  # the manifest's own; below is the model's
        "size_bytes": found.manifest.size_bytes,
    }
    if ref.startswith("models:/") and not ref.startswith("models:/m-"):
        version = store.version_of(ref)
        about |= {
            "version": int(version.version),
            "aliases": [a for a in ALIASES if store.alias(version.name, a) == int(version.version)],
            "verdict": version.tags.get(store.PREFIX + "verdict", ""),
        }  # fmt: skip
    return about


def examine_store() -> str:
    """Where the store is, once it has answered. Raises StoreError otherwise."""
    store.client()
    return store.uri()
