"""Schedules as a file: what the file says is what exists.

Kubeflow cannot change a recurring run, so a changed one is replaced. One step at a time: look at what there is, do
the one thing that comes next, look again. The new one is created disabled, the old one disabled, the new one enabled,
the old one deleted; so at no moment are two of a name active, and none is only between the two requests in the
middle. Whatever is cut off is taken up where it was by running the same command again, since nothing is remembered
but what the cluster shows. Which schedules are whose stands in their descriptions: others are never touched.
"""

# Long because a schedule has many settings, each with its meaning and its sentence for what cannot be.
from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimline import cron, recipe, submit
from slimline.cluster import Absent, Away, Cluster, Thing
from slimline.errors import ConfigError, StoreError

MARK = re.compile(r"\[slimline schedule owner=(?P<owner>\S+) name=(?P<name>\S+) sha256:(?P<digest>[0-9a-f]{64})\]")
NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Entry(BaseModel):
    """One schedule: what runs, with what, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=NAME, description="what it is called, unique in its namespace")
    pipeline: str = Field(description="a pipeline's name, or a compiled .yaml file")
    recipe: str = Field("", description="a file of parameters, relative to this file")
    parameters: dict[str, Any] = Field({}, description="parameters; they win over the recipe's")
    cron: str = Field("", description="five fields, as in '0 3 * * mon'")
    time_zone: str = Field("UTC", description="whose hours the cron line means")
    every: str = Field("", description="instead of cron: an interval, as in 6h (s, m, h, d, w)")
    catchup: bool = Field(False, description="whether times that were missed are made up for, one by one")
    max_concurrency: int = Field(1, ge=1, le=10, description="how many of its runs may be at work at once")
    enabled: bool = Field(True, description="whether it starts runs")
    start: datetime | None = Field(None, description="nothing runs before")
    end: datetime | None = Field(None, description="nothing runs after")
    experiment: str = Field("", description="where its runs are filed; the pipeline's name if not said")
    service_account: str = Field("", description="what its runs may do; the installation's default if not said")


class Plan(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    owner: str = Field(pattern=NAME, description="whose schedules these are; those of others are left alone")
    controller_time_zone: str = Field("UTC", description="CRON_SCHEDULE_TIMEZONE of the installation")
    schedules: list[Entry] = Field(description="what exists")


class Timing(NamedTuple):
    """When a schedule runs, as the controller is told, with the next moments."""

    trigger: dict[str, Any]
    line: str
    next: list[datetime]


class Standing(NamedTuple):
    """A recurring run of ours on the cluster."""

    id: str
    digest: str
    active: bool
    created_at: str


class Action(NamedTuple):
    """The one thing to do next."""

    verb: Literal["create", "disable", "enable", "delete"]
    id: str = ""


class Change(NamedTuple):
    """What was done to a schedule."""

    name: str
    actions: list[str]


def next_action(standing: list[Standing], digest: str, active: bool) -> Action | None:
    """What comes next on the way from what stands to one schedule of this digest; None when it is all that stands.

    An empty digest means that none shall stand. Two that do this at once, in any order of their steps, end at the same.
    """
    right = sorted((s for s in standing if s.digest == digest), key=lambda s: (not s.active, s.created_at, s.id))
    if digest and not right:
        return Action("create")
    keep = right[0] if digest else None
    others = [s for s in standing if s != keep]
    for other in others:
        if other.active:
            return Action("disable", other.id)
    if keep and keep.active != active:
        return Action("enable" if active else "disable", keep.id)
    return Action("delete", others[0].id) if others else None


def read(file: Path) -> Plan:
    """The plan in a file. Raises ConfigError for what it cannot mean, naming the schedule."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist. Give the schedules with -f.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is not a file of schedules: {str(error).splitlines()[0]}.") from None
    try:
        plan = Plan.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        if place[:1] == ["schedules"] and len(place) > 1:
            entry = values["schedules"][int(place[1])]
            place[:2] = [
                f"schedule {entry.get('name', place[1])}" if isinstance(entry, dict) else f"schedule {place[1]}"
            ]
        said = first["msg"].replace("Value error, ", "").lower()
        raise ConfigError(f"{file}: {': '.join(place) or 'the file'}: {said}. See docs/operating.md.") from None
    names = [entry.name for entry in plan.schedules]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"{file} has two schedules named {twice!r}. Rename one.")
    return plan


def timing(plan: Plan, entry: Entry, now: datetime) -> Timing:
    """When an entry runs. Raises ConfigError, naming the schedule, for a time that cannot be."""
    try:
        return _timing(plan, entry, now)
    except ConfigError as error:
        raise ConfigError(f"schedule {entry.name}: {error}") from None


def _timing(plan: Plan, entry: Entry, now: datetime) -> Timing:
    local, controller = cron.zone(entry.time_zone), cron.zone(plan.controller_time_zone)
    start, end = (_moment(moment, local) for moment in (entry.start, entry.end))
    if bool(entry.cron) == bool(entry.every):
        raise ConfigError("it needs either cron or every, and has both or none. Give one.")
    if start and end and end <= start:
        raise ConfigError(f"it ends ({entry.end}) before it starts ({entry.start}). Move one.")
    bounds = {k: v.isoformat() for k, v in (("start_time", start), ("end_time", end)) if v}
    begin = max(start, now) if start else now
    if entry.every:
        seconds = _seconds(entry.every)
        times = [begin + timedelta(seconds=seconds * n) for n in range(1, 6)]
        trigger = {"periodic_schedule": {"interval_second": str(seconds), **bounds}}
        return Timing(trigger, f"every {seconds} s", [t for t in times if not end or t <= end])
    line = cron.controller_line(entry.cron, local, controller, begin, end)
    upcoming = cron.next_times(line, controller, begin)
    return Timing({"cron_schedule": {"cron": line, **bounds}}, line, [t for t in upcoming if not end or t <= end])


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)([smhdw])", text.strip())
    if not match or int(match[1]) == 0:
        raise ConfigError(f"every {text!r} is not an interval. Write a number and s, m, h, d or w, as in 6h.")
    return int(match[1]) * UNITS[match[2]]


def _moment(moment: datetime | None, local: ZoneInfo) -> datetime | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=local)).astimezone(UTC)


class Wanted(NamedTuple):
    """An entry that was checked: what it will run, with what and when."""

    entry: Entry
    order: submit.Order
    values: dict[str, Any]
    timing: Timing


def check(
    plan: Plan, folder: Path, images: Path | None, now: datetime, team: str, mounted: tuple[str, ...] = ()
) -> list[Wanted]:
    """Every entry with what it will run. Raises before anything is asked of a cluster if one entry cannot be."""
    wanted = []
    for entry in plan.schedules:
        when = timing(plan, entry, now)
        pipeline = str(folder / entry.pipeline) if entry.pipeline.endswith((".yaml", ".yml")) else entry.pipeline
        values = {**(recipe.read(folder / entry.recipe) if entry.recipe else {}), **entry.parameters}
        try:
            order = submit.order(pipeline, images, team=team, values=values)
            whole = submit.check(order, values, mounted=mounted)
        except ConfigError as error:
            raise ConfigError(f"schedule {entry.name}: {error}") from None
        wanted.append(Wanted(entry, order, whole, when))
    return wanted


def standing(cluster: Cluster, owner: str) -> dict[str, list[Standing]]:
    """Our schedules on the cluster, by name."""
    found: dict[str, list[Standing]] = {}
    for thing in cluster.schedules():
        mark = MARK.search(str(thing.get("description", "")))
        if mark and mark["owner"] == owner:
            one = Standing(
                str(thing["recurring_run_id"]), mark["digest"], thing.get("status") != "DISABLED",
                str(thing.get("created_at", "")),
            )  # fmt: skip
            found.setdefault(mark["name"], []).append(one)
    return found


def require_free(cluster: Cluster, plan: Plan) -> None:
    """Raise ConfigError if a name of ours is that of a schedule which is not ours."""
    names = {entry.name for entry in plan.schedules}
    for thing in cluster.schedules():
        mark = MARK.search(str(thing.get("description", "")))
        if thing.get("display_name") in names and (mark is None or mark["owner"] != plan.owner):
            whose = f"belongs to {mark['owner']}" if mark else "was not made from a file"
            raise ConfigError(
                f"a schedule named {thing['display_name']!r} is there already and {whose} "
                f"({thing['recurring_run_id']}). Rename yours, or delete that one in the Kubeflow page."
            )


def apply(
    cluster: Cluster,
    plan: Plan,
    wanted: list[Wanted],
    prune: bool = False,
    tell: Callable[[str], None] = lambda said: None,
) -> list[Change]:
    """Make what exists be what the file says; with `prune`, what the file no longer has goes."""
    require_free(cluster, plan)
    changes = [_settle(cluster, plan.owner, one, tell) for one in wanted]
    if prune:
        gone = standing(cluster, plan.owner).keys() - {entry.name for entry in plan.schedules}
        changes += [Change(name, _reconcile(cluster, plan.owner, name, "", False, dict, tell)) for name in sorted(gone)]
    return changes


def _settle(cluster: Cluster, owner: str, one: Wanted, tell: Callable[[str], None]) -> Change:
    version = submit.upload(cluster, one.order)
    entry = one.entry
    start = submit.Start(experiment=entry.experiment, service_account=entry.service_account)
    common = submit.body(cluster, version, one.values, start)
    fixed = {
        "trigger": one.timing.trigger, "no_catchup": not entry.catchup, "max_concurrency": str(entry.max_concurrency)
    }  # fmt: skip
    said = cluster.client.sanitize_for_serialization({**common, **fixed})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def made() -> Thing:
        trigger = {key: cluster.thing(TRIGGERS[key], **value) for key, value in one.timing.trigger.items()}
        mark = f"[slimline schedule owner={owner} name={entry.name} sha256:{digest}]"
        return {
            **common, **fixed, "trigger": cluster.thing("V2beta1Trigger", **trigger), "display_name": entry.name,
            "description": f"{version.name}; kept by a file, change it there. {mark}", "mode": "DISABLE",
        }  # fmt: skip

    return Change(entry.name, _reconcile(cluster, owner, entry.name, digest, entry.enabled, made, tell))


TRIGGERS = {"cron_schedule": "V2beta1CronSchedule", "periodic_schedule": "V2beta1PeriodicSchedule"}


def _reconcile(
    cluster: Cluster, owner: str, name: str, digest: str, active: bool, made: Callable[[], Thing],
    tell: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """Look and do the next thing until nothing is left to do. An answer that was lost is found by looking."""
    done: list[str] = []
    deadline, pause = time.monotonic() + cluster.patience_s, cluster.pause_s
    for _ in _turns(name):
        action = next_action(standing(cluster, owner).get(name, []), digest, active)
        if action is None:
            return done
        try:
            if action.verb == "create":
                cluster.create_schedule(made())
            else:
                DOES[action.verb](cluster, action.id)
        except Absent:
            if action.verb == "create":
                raise
            continue  # somebody else was faster
        except Away:
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 8.0)
            continue
        done.append(action.verb)
        tell(f"{name}: {action.verb} {action.id}".rstrip())
    return done


DOES: dict[str, Callable[[Cluster, str], None]] = {
    "enable": Cluster.enable_schedule, "disable": Cluster.disable_schedule, "delete": Cluster.delete_schedule,
}  # fmt: skip


def _turns(name: str, most: int = 200) -> Iterator[int]:
    yield from range(most)
    raise StoreError(
        f"schedule {name} does not come to rest: somebody else is changing it. Run the same command again."
    )
