"""Bring a compiled pipeline to a cluster, once, and start it, once.

A version of a pipeline is known by the digest of its specification, which stands in its description: the same
specification is never uploaded a second time. A run is known by a key in its description, so that a request whose
answer was lost, or a build that is started again, does not start a second run.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from slimline import __version__, portable, recipe
from slimline.cluster import Cluster, Thing
from slimline.errors import ConfigError
from slimline.portable import Compiled

TEAM = re.compile(r"\[slimline team=(\S+)\]")
EVERYONE = "everyone"


class Order(NamedTuple):
    """A pipeline that a cluster can take, as what and for whom it is uploaded."""

    compiled: Compiled
    where: str
    name: str
    team: str
    source: Path


class Version(NamedTuple):
    """A pipeline version on the cluster, and whether it was there before."""

    pipeline_id: str
    version_id: str
    name: str
    pipeline: str
    new: bool


def order(
    pipeline: str, images: Path | None = None, name: str = "", team: str = "", namespace: str = "",
    values: dict[str, Any] | None = None, root: str = "",
) -> Order:  # fmt: skip
    """Read a pipeline and refuse one that a cluster could not run, or would run otherwise than this machine."""
    file = recipe.pipeline_file(pipeline)
    text = file.read_text(encoding="utf-8")
    if images is not None:
        text = portable.with_images(text, images, pipeline)
    compiled = portable.parse(text, str(file))
    portable.require(compiled, pipeline, values, root)
    portable.require_images(compiled, pipeline, images)
    source = file.parent if pipeline.endswith((".yaml", ".yml")) else Path.cwd()
    return Order(compiled, pipeline, name or compiled.name, team or namespace or EVERYONE, source)


def digest(compiled: Compiled) -> str:
    """Of what a pipeline says, whatever its text looks like."""
    said = json.dumps([compiled.spec, compiled.platform], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def upload(cluster: Cluster, order: Order) -> Version:
    """The version of this specification on the cluster, made if there is none. Raises ConfigError for a taken name."""
    portable.require_cluster(order.compiled, order.where, str(cluster.about().get("tag_name", "")))
    pipeline = _pipeline(cluster, order)
    pipeline_id, mark = str(pipeline["pipeline_id"]), f"sha256:{digest(order.compiled)}"

    def find() -> Thing | None:
        found = cluster.versions(pipeline_id, "description", mark)
        return min(found, key=lambda v: (v.get("created_at", ""), v["pipeline_version_id"]), default=None)

    known = find()
    if known:
        return _version(known, order.name, new=False)
    commit = _commit(order.source)
    name = f"{__version__}-{commit or mark[7:19]}"
    if next(cluster.versions(pipeline_id, "name", name), None):  # compiled otherwise at the same commit
        name = f"{name}-{mark[7:15]}"
    description = f"slimline {__version__}{f' at commit {commit}' if commit else ''}, {mark}"
    with tempfile.TemporaryDirectory(prefix="slimline-") as folder:
        file = Path(folder) / f"{order.compiled.name}.yaml"
        file.write_text(order.compiled.text, encoding="utf-8")
        made = cluster.once(lambda: cluster.upload_version(pipeline_id, file, name, description), find)
    return _version(made, order.name, new=True)


def _pipeline(cluster: Cluster, order: Order) -> Thing:
    found = cluster.pipeline(order.name)
    if found is None:
        about = str(order.compiled.spec["pipelineInfo"].get("description", "")).strip()
        description = f"{about} [slimline team={order.team}]".strip()
        found = cluster.once(
            lambda: cluster.create_pipeline(order.name, description), lambda: cluster.pipeline(order.name)
        )
    mark = TEAM.search(str(found.get("description", "")))
    if mark is None or mark[1] != order.team:
        owner = f"team {mark[1]}" if mark else "somebody who did not use slimline"
        where = f" in namespace {cluster.namespace}" if cluster.namespace else ""
        raise ConfigError(
            f"the pipeline name {order.name!r} is taken{where} by {owner}, and you are team {order.team}. Give yours "
            "another with --as, or the team's name with --team."
        )
    return found


def _version(thing: Thing, pipeline: str, new: bool) -> Version:
    return Version(
        str(thing["pipeline_id"]), str(thing["pipeline_version_id"]), str(thing.get("name") or thing["display_name"]),
        pipeline, new,
    )  # fmt: skip


def _commit(folder: Path) -> str:
    """The commit that a folder is at; empty where there is no git, or something is not committed."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return "?"
        return done.stdout.strip() if done.returncode == 0 else "?"

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit if re.fullmatch(r"[0-9a-f]{12,}", commit) and not git("status", "--porcelain") else ""


class Start(NamedTuple):
    """How a run is started: what it is called, where it is filed, its key, and what it may."""

    name: str = ""
    experiment: str = ""
    key: str = ""
    service_account: str = ""
    root: str = ""


def check(order: Order, values: dict[str, Any], root: str = "", mounted: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameters that a cluster will get, defaults filled in. Raises what `slimline run` raises, before any run."""
    portable.require_reachable(values, mounted)
    whole = recipe.check(order.compiled.spec, values, here=False)
    portable.require(order.compiled, order.where, whole, root)
    return whole


def body(cluster: Cluster, version: Version, values: dict[str, Any], start: Start) -> Thing:
    """What is common to a run and a schedule: which version, with what, as whom."""
    experiment = cluster.experiment(start.experiment or version.pipeline)
    return {
        "experiment_id": (experiment or {}).get("experiment_id"),
        "pipeline_version_reference": cluster.thing(
            "V2beta1PipelineVersionReference",
            pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id,
        ),
        "runtime_config": cluster.thing(
            "V2beta1RuntimeConfig", parameters=values, pipeline_root=start.root or None
        ),
        "service_account": start.service_account or None,
    }  # fmt: skip


def submit(cluster: Cluster, version: Version, values: dict[str, Any], start: Start) -> tuple[Thing, bool]:
    """Start a run and return it, and whether it is new: one with this key that is there already is returned."""
    key = start.key or uuid.uuid4().hex
    name = start.name or f"{version.pipeline} {values.get('name', '')}".strip()
    mark = f"[slimline key={key}]"
    where = [{"operation": "EQUALS", "key": "display_name", "string_value": name}]

    def all_of_it() -> list[Thing]:
        found = [run for run in cluster.runs(where) if mark in str(run.get("description", ""))]
        return sorted(found, key=lambda run: (run.get("created_at", ""), run["run_id"]))

    def find() -> Thing | None:
        return next(iter(all_of_it()), None)

    made = find() if start.key else None
    known = made is not None
    if made is None:
        what = body(cluster, version, values, start)
        described = {"display_name": name, "description": f"{version.name} {mark}", **what}
        made = cluster.once(lambda: cluster.create_run(described), find)
    first, *doubles = all_of_it() or [made]
    for double in doubles:  # a request that was given up as lost, and was done all the same
        if double.get("state") in ("PENDING", "RUNNING", None):
            cluster.terminate(double["run_id"])
    return first, not known and first["run_id"] == made["run_id"]
