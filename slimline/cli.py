"""The command line. Results go to stdout, progress to stderr; errors are one sentence and an exit code (errors.py)."""

# Long because it is one short function a command, and a list of them is read top to bottom.
from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slimline import __version__, cluster_cli, recipe, technique
from slimline.errors import ConfigError, GateError, SlimlineError
from slimline.view import View, results_table

app = typer.Typer(
    name="slimline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The smallest, fastest version of your transformer that provably stays within your quality limit.",
)
out, err = Console(highlight=False), Console(stderr=True, highlight=False)
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout.")]


@app.command()
def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline's name (optimize) or a compiled .yaml file.")],
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Recipe: a YAML file of parameters.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A parameter, as name=value; wins over -f.")] = None,
    docker: Annotated[bool, typer.Option("--docker", help="Each step in a container of its own image.")] = False,
    network: Annotated[str | None, typer.Option(help="With --docker: the network that reaches the store.")] = None,
    require_approval: Annotated[
        bool, typer.Option("--require-approval", help="What passes waits for `slimline approve`.")
    ] = False,
    require_pass: Annotated[bool, typer.Option(help="Exit with 4 unless the verdict is PASS.")] = False,
    json_: AsJson = False,
) -> None:
    """Run a pipeline on this machine; finished steps are reused."""
    from slimline import launch

    values = recipe.merge(recipe.read(file) if file else {}, recipe.assign(set_ or []))
    if require_approval:
        values["gate_require_approval"] = True
    with View(err) as view:
        outcome = launch.run(pipeline, values, view.on_event, place=launch.Place(docker, network))
    summary = outcome.summary
    overhead = outcome.seconds - outcome.technique_seconds
    if json_:
        told = {"run_id": outcome.run_id, "seconds": outcome.seconds, "ref": outcome.ref}
        out.print_json(json.dumps({**summary, **told}))
    else:
        if "rows" in summary:
            _print_summary(summary, outcome.log)
        elif summary:
            out.print(escape(summary["outcome"]))
        else:
            _print_model(outcome.ref)
        out.print(
            f"{outcome.seconds:.0f} s in all, {overhead:.0f} s of them outside the steps' own work.",
            style="dim",
        )
    if require_pass and summary.get("status") != "PASS":
        raise GateError(f"the verdict is {summary.get('status', 'missing')} and --require-pass was given.")


def _print_summary(summary: dict[str, Any], log: Path) -> None:
    name = summary["name"]
    out.print(results_table(summary["rows"], summary["terms"]))
    out.print(f"\n[bold]{escape(summary['sentence'])}[/bold]")
    out.print(escape(summary["outcome"]))
    out.print(f"\nReport   {summary['report']}", soft_wrap=True)
    out.print(f"Log      {log}", soft_wrap=True)
    ref = f"models:/{name}@champion" if summary["promoted"] else f"models:/{name}/{summary['version']}"
    me, text = _me(), "The capital of France is" if summary["terms"]["one"] == "token" else "a film to remember"
    out.print(
        f"\nNext     {me} show {ref}\n         {me} predict {ref} '{text}'\n         {me} ui\n",
        soft_wrap=True,
    )


def _print_model(ref: str) -> None:
    """What a run that ends with a model has made, and whether its answers were looked at."""
    from slimline import artifact, store

    last = artifact.read(store.fetch(ref)).history[-1]
    out.print(f"Model    {ref}", soft_wrap=True)
    if last.metrics.get("parity_checked") == 0:
        out.print("Answers  not compared with its graph's: this machine cannot run an engine", soft_wrap=True)
    out.print(f"\nNext     {_me()} show {ref}", soft_wrap=True)


def _me() -> str:
    """What to type to get this program again: its path where the shell would not find it, as after `make run`."""
    here = Path(sys.argv[0]).absolute()
    if shutil.which("slimline") or not here.is_relative_to(Path.cwd()) or here.name != "slimline":
        return "slimline"
    return str(here.relative_to(Path.cwd()))


@app.command()
def compile(
    pipeline: Annotated[str, typer.Argument(help="A pipeline's name, or its .py file in pipelines/.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the YAML goes.")],
    images: Annotated[Path | None, typer.Option(help="build/images.json: name the images that were built.")] = None,
    cache: Annotated[str, typer.Option(help="A PersistentVolumeClaim for what steps fetch and leave unfinished.")] = "",
) -> None:
    """Write a compiled pipeline, to upload to Kubeflow."""
    from slimline import launch

    launch.compile(pipeline, output, images, cache)
    out.print(f"{output}")


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="A technique, such as prune.heads.")],
    source: Annotated[Path, typer.Argument(help="The folder of a model.")],
    output: Annotated[Path, typer.Argument(help="A folder that does not exist yet, for the result.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="An option, as name=value.")] = None,
    json_: AsJson = False,
) -> None:
    """Run one technique on a folder, outside any store: to debug, or to replay a failure."""
    from slimline import step as steps

    with View(err) as view:
        numbers = steps.run_on_folder(name, source, output, recipe.assign(set_ or []), view.on_event)
    if json_:
        out.print_json(json.dumps(numbers))
    else:
        for key, value in numbers.items():
            out.print(f"{key:32} {value:.6g}")
        out.print(f"{output}")


@app.command()
def techniques(
    name: Annotated[str | None, typer.Argument(help="A stage (prune) or a technique (prune.heads).")] = None,
    json_: AsJson = False,
) -> None:
    """What there is, and each one's options with bounds, meaning and paper."""
    if name and "." in name:
        module = technique.find(name)
        schema = module.Config.model_json_schema()
        if json_:
            out.print_json(json.dumps({"technique": name, "needs": module.NEEDS, "gives": module.GIVES, **schema}))
            return
        out.print(f"[bold]{name}[/bold]  needs {module.NEEDS}, gives {module.GIVES}\n")
        told = [" ".join(part.split()) for part in (module.__doc__ or "").split("\n\n")]
        out.print("\n\n".join(escape(part) for part in told if not part.startswith("Shapes:")) + "\n")
        out.print(_options_table(schema, own=list(module.Config.__annotations__)))
        return
    found = [f"{name}.{m}" for m in technique.names(name)] if name else technique.all_names()
    lines = {n: (technique.find(n).__doc__ or "").strip().split("\n")[0] for n in found}
    if json_:
        out.print_json(json.dumps(lines))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("technique", style="bold")
    table.add_column("what it does")
    for key, line in lines.items():
        table.add_row(key, escape(line))
    out.print(table)


def _options_table(schema: dict[str, Any], own: list[str]) -> Table:
    """The options, those of this technique alone before those that it shares with others."""
    table = Table(box=None, pad_edge=False)
    for column in ("option", "type", "default", "bounds", "meaning"):
        table.add_column(column, style="bold" if column == "option" else "")
    signs = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    for key, field in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in own):
        bounds = " ".join(f"{sign}{field[bound]:g}" for bound, sign in signs.items() if bound in field)
        if "enum" in field:
            bounds = " | ".join(map(str, field["enum"]))
        default = "required" if key in schema.get("required", []) else json.dumps(field.get("default"))
        kind = field.get("type", "")
        kind = f"list of {field['items'].get('type', 'values')}s" if kind == "array" else kind
        table.add_row(key, kind, escape(default), escape(bounds), escape(field.get("description", "")))
    return table


@app.command()
def show(
    ref: Annotated[str, typer.Argument(help="models:/name@champion, runs:/id/model, or a folder.")],
    json_: AsJson = False,
) -> None:
    """What a model is, and everything that was done to it."""
    from slimline import engine, release

    about = release.about(ref)
    if json_:
        out.print_json(json.dumps(about))
        return
    about["runtime"] = engine.describe(about["runtime"]) if about["runtime"] else ""
    out.print(f"[bold]{escape(ref)}[/bold]")
    for key in ("version", "aliases", "verdict", "format", "runtime", "task", "labels", "base", "digest", "size_bytes"):
        if about.get(key) not in (None, "", []):
            value = about[key]
            text = (
                f"{value / 1e6:.1f} MB"
                if key == "size_bytes"
                else ", ".join(value)
                if isinstance(value, list)
                else str(value)
            )
            out.print(f"  {key:11} {escape(text)}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "seconds", "options", "metrics"):
        table.add_column(column, style="bold" if column == "stage" else "", overflow="fold")
    for stage in about["history"]:
        options = " ".join(f"{k}={v}" for k, v in stage["config"].items() if v not in ("", None))
        numbers = " ".join(f"{k}={v:.4g}" for k, v in stage["metrics"].items())
        table.add_row(stage["technique"], f"{stage['seconds']:.0f}", escape(options), escape(numbers))
    out.print(table)


@app.command()
def report(
    ref: Annotated[str, typer.Argument(help="models:/name@champion, models:/name/3, or the id of a pipeline run.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Copy the page to this file.")] = None,
) -> None:
    """Where the page about a model's making is."""
    from slimline import summary

    page = summary.page_of(ref)
    if output:
        output.write_bytes(page.read_bytes())
    out.print(str(output or page), soft_wrap=True)


@app.command()
def predict(
    ref: Annotated[str, typer.Argument(help="Ref of a model.")],
    texts: Annotated[list[str], typer.Argument(help="Texts to label, or to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="Of a language model's answer, at most; 0 for 256.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest answer.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of a drawn answer.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="A text is what a user says.")] = False,
    json_: AsJson = False,
) -> None:
    """Label texts with a stored model, or let a language model write on."""
    from slimline import artifact, decoder, serve, store

    path = store.fetch(ref)
    if artifact.read(path).task == decoder.TASK:
        _write_on(path, texts, {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}, chat, json_)
        return
    answers = serve.load(path).predict(texts)
    if json_:
        out.print_json(json.dumps(answers))
        return
    for text, answer in zip(texts, answers, strict=True):
        out.print(f"{escape(str(answer['label']))}  {answer['score']:.3f}  {escape(text)}", soft_wrap=True)


def _write_on(path: Path, texts: list[str], settings: dict[str, Any], chat: bool, json_: bool) -> None:
    """Print what a language model writes, while it writes."""
    from slimline import language, sampling, serve

    how, model = sampling.Sampling.of(settings), language.load(path)
    prompts = [serve.prompt_of(text, chat) for text in texts]
    if json_:
        out.print_json(json.dumps([{"generated": text} for text in model.generate(prompts, how)]))
        return
    for prompt in prompts:
        for piece in model.stream(prompt, how):
            out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        out.print()


@app.command()
def package(
    ref: Annotated[str, typer.Argument(help="Ref of a model.")],
    target: Annotated[str, typer.Option("--for", help="What will serve it: triton, kserve or vllm.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A folder that does not exist yet.")] = None,
    name: Annotated[str, typer.Option("-n", "--name", help="What it is served as, if not by its own name.")] = "",
    storage_uri: Annotated[str, typer.Option(help="For kserve: where the cluster will find the model.")] = "",
    runtime_version: Annotated[str, typer.Option(help="For kserve: the tag of the runtime's image.")] = "",
    json_: AsJson = False,
) -> None:
    """Write a model in the form that a serving system loads."""
    from slimline import package as packages

    made = packages.write(ref, target, output, name, storage_uri, runtime_version)
    if json_:
        out.print_json(json.dumps({**made._asdict(), "folder": str(made.folder)}))
        return
    out.print(f"Written  {made.folder} ({made.name}, version {made.version})", soft_wrap=True, markup=False)
    if made.before:
        out.print(f"First    {made.before}", soft_wrap=True, markup=False)
    out.print(f"Start    {made.start}", soft_wrap=True, markup=False)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int | None, typer.Argument(help="Its version; without one, the challenger.")] = None,
    allow_inconclusive: Annotated[bool, typer.Option(help="Promote although nothing is proven; recorded.")] = False,
    pending: Annotated[bool, typer.Option("--pending", help="Carry out everything that was approved.")] = False,
) -> None:
    """Make a version the champion, if its verdict allows, it loads and answers, and nobody was faster."""
    from slimline import release

    if pending:
        if version is not None or allow_inconclusive:
            raise ConfigError("--pending carries out all that was approved, and takes neither a version nor an option.")
        sentences = release.promote_approved(name)
        out.print(escape("\n".join(sentences) or f"Nothing that was approved of {name} is waiting."))
        return
    out.print(escape(release.promote(name, version, allow_inconclusive=allow_inconclusive)))


@app.command()
def approve(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Its version, which has passed and waits.")],
    reject: Annotated[bool, typer.Option("--reject", help="Refuse it instead.")] = False,
    note: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Give a person's word on a version; `promote --pending` or the next run then makes it the champion."""
    from slimline import release

    out.print(escape(release.approve(name, version, reject, note)))


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    to: Annotated[int, typer.Option(help="A version that was champion; 0 for the one before.")] = 0,
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "",
) -> None:
    """Give the champion's place back to a version that had it, once it has loaded and answered."""
    from slimline import release

    out.print(escape(release.rollback(name, to, reason)))


@app.command()
def ledger(name: Annotated[str, typer.Argument(help="Registered model.")], json_: AsJson = False) -> None:
    """Every move of a model's champion: when, from where to where, who and why."""
    from slimline import release

    moves = release.history(name)
    if json_:
        out.print_json(json.dumps(moves))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("no.", "when", "move", "from", "to", "who", "why"):
        table.add_column(column, overflow="fold")
    for entry in moves:
        kind = f"{entry['kind']} (lost)" if entry["lost"] else entry["kind"]
        why = entry["why"] + (f" Approved by {entry['approved']}." if entry["approved"] else "")
        cells = (entry["number"], entry["at"], kind, entry["from"] or "-", entry["to"] or "-", entry["who"], why)
        table.add_row(*(escape(str(cell)) for cell in cells))
    out.print(table if moves else f"The champion of {escape(name)} has never been moved.")


@app.command()
def card(ref: Annotated[str, typer.Argument(help="models:/name@champion or models:/name/3.")]) -> None:
    """The model card of a version, as README.md for the Hugging Face Hub."""
    from slimline import release

    out.print(release.model_card(ref), markup=False, soft_wrap=True, end="")


@app.command()
def doctor(json_: AsJson = False) -> None:
    """What this machine has, and what follows from it."""
    from slimline import doctor as clinic
    from slimline import release

    findings = clinic.examine(store=release.examine_store)
    if json_:
        out.print_json(findings.model_dump_json())
        return
    for line in findings.lines():
        out.print(escape(line), soft_wrap=True)


@app.command()
def ui(port: Annotated[int, typer.Option(help="Where it listens.")] = 5000) -> None:
    """MLflow's own page on this store."""
    from slimline import store

    store.client()
    if store.uri().startswith("http"):
        out.print(f"The store is a server: open {store.uri()}")
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store.uri(), "--port", str(port)]
    out.print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
    os.execv(sys.executable, command)


@app.command()
def metrics(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 9095,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two looks at the store.")] = 60,
    folder: Annotated[
        Path | None, typer.Option(help="Serve what `mlflow server --expose-prometheus` keeps here.")
    ] = None,
) -> None:
    """Numbers for Prometheus: champions, gates and steps of this store."""
    try:
        from slimline import exporter
    except ModuleNotFoundError as missing:
        raise ConfigError(f"metrics needs {missing.name}: pip install 'slimline[metrics]'.") from None

    if folder:
        exporter.serve_folder(port, folder)
    else:
        exporter.serve(port, every)


app.registered_commands += cluster_cli.app.registered_commands


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Say the version and stop.")] = False,
) -> None:
    if version:
        out.print(f"slimline {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run a command; every failure becomes one sentence and the exit code of its kind."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = int(app(standalone_mode=False) or 0)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except SlimlineError as error:
        code = _say(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _say("stopped. The same command goes on where it was.", 130)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:
            code = _say(f"{usage()} See `slimline --help`.", ConfigError.exit_code)
        else:
            traceback.print_exc()
            code = _say("this is a mistake in slimline itself. Please report it with the lines above.", 1)
    sys.exit(code)


def _say(sentence: str, code: int) -> int:
    err.print(f"[red]error:[/red] {escape(sentence)}", soft_wrap=True)
    return code


def _terminate(*_: Any) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    main()
