"""Commands on a cluster: submit, upload, schedule, runs, wait, logs. The other commands are in cli.py."""

# Long because it is one short function a command, as cli.py is.
from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slimline import recipe
from slimline.cluster import Cluster, Place
from slimline.errors import SlimlineError

if TYPE_CHECKING:
    from slimline.schedule import Plan, Wanted

app = typer.Typer()
out, err = Console(highlight=False), Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout.")]
Host = Annotated[
    str, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="Kubeflow's API server, such as http://localhost:8888.")
]
Namespace = Annotated[
    str, typer.Option(envvar="KF_PIPELINES_NAMESPACE", help="The team's namespace; none in a single-team installation.")
]
Token = Annotated[
    str, typer.Option(envvar="KF_PIPELINES_SA_TOKEN_PATH", help="A file with a token; read anew for each request.")
]
CaCert = Annotated[str, typer.Option(envvar="SSL_CERT_FILE", help="Who vouches for the server's certificate.")]
Patience = Annotated[float, typer.Option(min=0, help="Seconds to go on trying while the server does not answer.")]
Images = Annotated[Path | None, typer.Option(help="build/images.json: the images that were pushed.")]
Team = Annotated[str, typer.Option(envvar="SLIMLINE_TEAM", help="Whose pipeline this is; the namespace if not said.")]
As = Annotated[str, typer.Option("--as", help="What the pipeline is called on the cluster, if not by its own name.")]
Mounted = Annotated[list[str] | None, typer.Option(help="A folder that the steps have as a volume; may be repeated.")]
Root = Annotated[str, typer.Option(help="Where Kubeflow keeps artifacts, as in s3://bucket/path.")]


def at(
    host: Host = "",
    namespace: Namespace = "",
    token_file: Token = "",
    ca_cert: CaCert = "",
    patience: Patience = 60.0,
) -> Place:
    """Where the server is, and who asks: options of every command here."""
    return Place(host, namespace, token_file, ca_cert, patience)


def command(patience: float = 60.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the options of `at` before --json, which hands over as `place` what they come to."""

    def made(function: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(function, eval_str=True).parameters)
        more = dict(inspect.signature(at, eval_str=True).parameters)
        more["patience"] = more["patience"].replace(default=patience)
        del own["place"]
        last = own.pop("json_")

        @functools.wraps(function)
        def around(**given: Any) -> None:
            place = at(**{name: given.pop(name) for name in more})
            function(**given, place=place)

        parameters = [*own.values(), *more.values(), last]
        around.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        around.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command()(around)

    return made


@command()
def submit(
    pipeline: Annotated[str, typer.Argument(help="A pipeline's name (optimize) or a compiled .yaml file.")],
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Recipe: a YAML file of parameters.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A parameter, as name=value; wins over -f.")] = None,
    name: Annotated[str, typer.Option(help="What the run is called.")] = "",
    experiment: Annotated[str, typer.Option(help="Where the run is filed; the pipeline's name if not said.")] = "",
    key: Annotated[str, typer.Option(help="A second submit with the same key finds the run of the first.")] = "",
    service_account: Annotated[str, typer.Option(help="What the run's steps may do in the cluster.")] = "",
    images: Images = None,
    as_: As = "",
    team: Team = "",
    mounted: Mounted = None,
    pipeline_root: Root = "",
    wait: Annotated[bool, typer.Option("--wait", help="Stay until it has ended, and exit as it did.")] = False,
    require_pass: Annotated[bool, typer.Option(help="With --wait: exit with 4 unless the verdict is PASS.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything here, ask no cluster.")] = False,
    json_: AsJson = False,
    *,
    place: Place,
) -> None:
    """Run a pipeline on a cluster; what can be checked is checked here first."""
    from slimline import runs
    from slimline import submit as submits

    given = recipe.merge(recipe.read(file) if file else {}, recipe.assign(set_ or []))
    order = submits.order(pipeline, images, as_, team, place.namespace, given, pipeline_root)
    values = submits.check(order, given, pipeline_root, tuple(mounted or ()))
    if dry_run:
        said: dict[str, Any] = {
            "pipeline": order.name,
            "team": order.team,
            "spec": submits.digest(order.compiled),
            "parameters": values,
        }
        _show(said, json_, f"{pipeline} can run on a cluster, as {order.name}, with {len(values)} parameters.")
        return
    cluster = Cluster(place)
    version = submits.upload(cluster, order)
    start = submits.Start(name, experiment, key, service_account, pipeline_root)
    run, new = submits.submit(cluster, version, values, start)
    told = {**runs.row(run, cluster.host), "version": version.name, "new": new}
    if wait:
        _finish(cluster, run["run_id"], 0, require_pass, json_, told)
        return
    already = "" if new else " (it was there already)"
    _show(
        told,
        json_,
        f"Run      {run['run_id']}{already}\nVersion  {version.pipeline} {version.name}\nSee      {told['url']}",
    )


@command()
def upload(
    pipelines: Annotated[list[str], typer.Argument(help="Pipelines' names, or compiled .yaml files.")],
    images: Images = None,
    as_: As = "",
    team: Team = "",
    pipeline_root: Root = "",
    json_: AsJson = False,
    *,
    place: Place,
) -> None:
    """Put pipelines on a cluster's page, as versions: one a commit, and none twice."""
    from slimline import submit as submits
    from slimline.errors import ConfigError

    if as_ and len(pipelines) > 1:
        raise ConfigError("--as names one pipeline, and several are given. Upload them one by one.")
    orders = [submits.order(p, images, as_, team, place.namespace, root=pipeline_root) for p in pipelines]
    cluster = Cluster(place)
    told = [submits.upload(cluster, order)._asdict() for order in orders]
    lines = [f"{v['pipeline']} {v['name']}{'' if v['new'] else '  (the same is there already)'}" for v in told]
    _show(told, json_, "\n".join(lines))


@command()
def schedule(
    file: Annotated[Path, typer.Option("-f", "--file", help="The schedules: what this file says is what exists.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say when each would run next; ask no cluster.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Delete schedules of this owner that the file lacks.")] = False,
    images: Images = None,
    team: Team = "",
    mounted: Mounted = None,
    json_: AsJson = False,
    *,
    place: Place,
) -> None:
    """Make the schedules on a cluster be what a file says; run it again after any failure."""
    from slimline import schedule as schedules

    plan = schedules.read(file)
    wanted = schedules.check(
        plan, file.parent, images, datetime.now(UTC), team or place.namespace, tuple(mounted or ())
    )
    if dry_run:
        _show_times(plan, wanted, json_)
        return
    cluster = Cluster(place)
    changes = schedules.apply(cluster, plan, wanted, prune, lambda said: err.print(said, style="dim", markup=False))
    lines = [f"{change.name}  {', '.join(change.actions) or 'as it was'}" for change in changes]
    _show([change._asdict() for change in changes], json_, "\n".join(lines) or "There are no schedules in the file.")


@command()
def runs(
    state: Annotated[str, typer.Option(help="Only those in this state, such as FAILED.")] = "",
    experiment: Annotated[str, typer.Option(help="Only those of this experiment.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = 20,
    json_: AsJson = False,
    *,
    place: Place,
) -> None:
    """Runs on a cluster, the latest first."""
    from slimline import runs as found

    cluster = Cluster(place)
    rows = [found.row(run, cluster.host) for run in found.find(cluster, state, experiment, limit)]
    if json_:
        out.print_json(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "began", "name"):
        table.add_column(column, no_wrap=column != "name", style="bold" if column == "run" else "")
    for row in rows:
        table.add_row(row["run_id"], row["state"], str(row["created_at"])[:16], escape(str(row["display_name"])))
    out.print(table if rows else "There are no such runs.")


@command(patience=600.0)
def wait(
    run: Annotated[str, typer.Argument(help="The id of a run.")],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds, after which this ends with 5; 0 for none.")] = 0.0,
    require_pass: Annotated[bool, typer.Option(help="Exit with 4 unless the verdict is PASS.")] = False,
    json_: AsJson = False,
    *,
    place: Place,
) -> None:
    """Stay until a run has ended, and exit as its failing step did."""
    _finish(Cluster(place), run, timeout, require_pass, json_, {})


@command()
def logs(
    run: Annotated[str, typer.Argument(help="The id of a run.")],
    step: Annotated[
        str | None, typer.Argument(help="A step's name in the graph; all that have begun if not said.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the step has ended.")] = False,
    json_: AsJson = False,
    *,
    place: Place,
) -> None:
    """What the steps of a run have written."""
    from slimline import runs as found
    from slimline.errors import ConfigError

    cluster = Cluster(place)
    if follow:
        if not step or json_:
            raise ConfigError("--follow needs the name of one step, and cannot be --json. See `slimline logs RUN`.")
        for piece in found.follow(cluster, run, step):
            out.print(piece, end="", markup=False, soft_wrap=True)
        return
    written = found.logs(cluster, run, step or "")
    if json_:
        out.print_json(json.dumps([{"step": name, "log": text} for name, text in written]))
        return
    for name, text in written:
        if not step:
            out.print(f"[bold]{escape(name)}[/bold]")
        out.print(text.rstrip("\n"), markup=False, soft_wrap=True)


def _finish(
    cluster: Cluster, run_id: str, timeout_s: float, require_pass: bool, json_: bool, told: dict[str, Any]
) -> None:
    """Wait, say how it ended, and raise what its step ended with."""
    from slimline import runs as found

    seen = ""

    def tell(run: dict[str, Any]) -> None:
        nonlocal seen
        done = sum(step.state == "SUCCEEDED" for step in found.steps(run))
        said = f"{run.get('state')}, {done} steps done"
        if said != seen:
            err.print(said, style="dim", markup=False)
        seen = said

    run = found.wait(cluster, run_id, timeout_s, tell)
    reason: SlimlineError | None = found.failure(cluster, run)
    if reason is None and require_pass:
        reason = found.verdict(cluster, run)
    state = {**told, **found.row(run, cluster.host), "error": str(reason) if reason else None}
    if json_ or reason is None:
        _show(state, json_, f"Run      {run_id} {run['state']}\nSee      {state['url']}")
    if reason:
        raise reason


def _show_times(plan: Plan, wanted: list[Wanted], json_: bool) -> None:
    """The next moments of each schedule: in UTC, and on the clock that its author meant."""
    from zoneinfo import ZoneInfo

    told = [
        {
            "name": one.entry.name,
            "pipeline": one.order.name,
            "enabled": one.entry.enabled,
            "trigger": one.timing.trigger,
            "controller_time_zone": plan.controller_time_zone,
            "time_zone": one.entry.time_zone,
            "next": [moment.isoformat() for moment in one.timing.next],
        }
        for one in wanted
    ]
    lines = []
    for one in wanted:
        off = "" if one.entry.enabled else "  (disabled)"
        lines.append(f"{one.entry.name}  {one.order.name}  {one.timing.line}{off}")
        local = ZoneInfo(one.entry.time_zone)
        for moment in one.timing.next:
            here = f"  {moment.astimezone(local):%a %H:%M} {one.entry.time_zone}" if local.key != "UTC" else ""
            lines.append(f"  {moment:%a %Y-%m-%d %H:%M} UTC{here}")
    _show(told, json_, "\n".join(lines) or "There are no schedules in the file.")


def _show(told: Any, json_: bool, text: str) -> None:
    if json_:
        out.print_json(json.dumps(told))
    else:
        out.print(text, markup=False, soft_wrap=True)
