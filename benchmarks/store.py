"""What the store does under load: a hundred pipelines at once, ten thousand runs behind them, and two gigabytes.

    python -m benchmarks.store [--part runs growth transfer] [--runs 100] [--at-once 8] [--sizes 0 100 1000 10000]
                               [--megabytes 2048] [--rounds 5] [--scratch FOLDER]

Everything on real servers of this machine: MLflow with sign-in on PostgreSQL (which writes to its disk before it
answers) and SeaweedFS, clients and servers on the same processors. `runs`: whole pipelines of a recipe that trains
nothing; afterwards every run, version and object in the bucket is accounted for. `growth`: seconds, and pages that the
database looked at, for what a step asks of the store, behind ever more runs, and a tenth as many versions; the rows are
those of a real run, copied inside the database. `transfer`: one file up and down, by slimline and by boto3 alone with
the same parts, interleaved, each time in a fresh process whose memory is watched. Needs PostgreSQL and the development
packages (make test installs them). Writes store.json and store.md; parts that were not asked for are kept.
"""

# Long because the three parts share servers, and their numbers one page.
from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from slimline import artifact, bench, launch, store, transfer
from tests.servers import S3, Postgres, Tracking
from tests.stores import saved
from tests.tiny import make_data, make_tiny

HERE = Path(__file__).parent
PARTS = ("runs", "growth", "transfer")
RECIPE = {
    "train_method": "none", "distill_method": "none", "prune_method": "none", "quantize_method": "none", "margin": 0.2,
    "latency_batch_size": 2, "latency_options": {"batches": 6}, "gate_options": {"size_alone": True},
}  # fmt: skip
REPEATS = 9
ACTIONS = ("look for a finished step", "find one", "a step with its model", "register", "move an alias", "fetch")


class World(NamedTuple):
    """Servers, and a folder for what clients keep."""

    folder: Path
    database: Postgres
    s3: S3
    server: Tracking


@contextlib.contextmanager
def world(scratch: Path, workers: int = 2) -> Iterator[World]:
    """Start the servers, and make this process their client."""
    with tempfile.TemporaryDirectory(prefix="slimline-store-", dir=scratch) as name:
        folder = Path(name)
        with (
            Postgres(folder / "postgres", durable=True) as database,
            S3(folder / "s3") as s3,
            Tracking(folder / "tracking", database, s3, workers=workers) as server,
        ):
            kept = dict(os.environ)
            os.environ.update(server.env, SLIMLINE_STORE=str(folder / "home"), SLIMLINE_RETRY_SECONDS="120")
            try:
                yield World(folder, database, s3, server)
            finally:
                os.environ.clear()
                os.environ.update(kept)


# Runs


def runs(here: World, count: int, at_once: int) -> dict[str, Any]:
    """Run pipelines from several processes at once, and account for everything that they left."""
    data = make_data(here.folder / "data.parquet", rows=420)
    empty, before, start = database_bytes(here), processor_s(here), time.perf_counter()
    workers = []
    for number in range(min(at_once, count)):
        mine = [str(i) for i in range(number, count, at_once)]
        command = [sys.executable, "-m", "benchmarks.store", "--worker", str(here.folder), str(data), *mine]
        environment = {**os.environ, "SLIMLINE_STORE": str(here.folder / f"home-{number}"), "OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    seconds = [float(word) for worker in workers for word in worker.communicate()[0].split()]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a worker failed: see above")
    wall, after = time.perf_counter() - start, processor_s(here)
    return {
        "runs": count, "at_once": at_once, "seconds": wall, "median_s": statistics.median(seconds),
        "processor_s": {name: (after[name] - before[name]) / count for name in after},
        "database_bytes": database_bytes(here) - empty, **audit(here, count),
    }  # fmt: skip


def database_bytes(here: World) -> int:
    return int(here.database.query(here.server.runs, "select pg_database_size(current_database())")[0][0])


def processor_s(here: World) -> dict[str, float]:
    """Seconds of processor that each server has used, with those of its children."""
    found = {}
    for name, one in (("tracking", here.server), ("database", here.database), ("bucket", here.s3)):
        assert one.process
        parent = psutil.Process(one.process.pid)
        total = 0.0
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        # Those of children that have ended are in their parent's: PostgreSQL has a process for every connection.
        ended = parent.cpu_times()
        found[name] = total + ended.children_user + ended.children_system
    return found


def worker(folder: Path, data: str, numbers: list[str]) -> None:
    """Run one pipeline after another, each on a model of its own, and print the seconds of each."""
    for number in numbers:
        source = make_tiny("bert", folder / f"source-{number}", layers=1, seed=int(number))
        values = {**RECIPE, "source": str(source), "data": data, "name": f"model-{number}"}
        outcome = launch.run("optimize", values, lambda event: None, "benchmarks.store")
        print(outcome.seconds, flush=True)


def audit(here: World, count: int) -> dict[str, Any]:
    """What is there, from the database and the bucket themselves: finished, lost, doubled, orphaned."""

    def number(statement: str) -> int:
        return int(here.database.query(here.server.runs, statement)[0][0])

    locations = {
        path.removeprefix(f"s3://{here.server.bucket}/")
        for (path,) in here.database.query(
            here.server.runs,
            "select artifact_location from logged_models where status = 2 and lifecycle_stage = 'active' "
            "union all select artifact_uri from runs where lifecycle_stage = 'active'",
        )
    }
    keys = here.s3.keys(here.server.bucket)
    orphans = [key for key in keys if not any(key.startswith(f"{place}/") for place in locations)]
    uploads = here.s3.client().list_multipart_uploads(Bucket=here.server.bucket).get("Uploads", [])
    doubled = (
        "select count(*) from (select key from tags where key like 'slimline.key.%' group by key having count(*) > 1) d"
    )
    ours = "name not like '%.ledger'"
    return {
        "pipelines_finished": number(
            "select count(*) from runs r join tags t on t.run_uuid = r.run_uuid and t.key = 'slimline.pipeline' "
            "where r.status = 'FINISHED'"
        ),
        "runs_total": number("select count(*) from runs"),
        "runs_not_finished": number("select count(*) from runs where status <> 'FINISHED'"),
        "steps_doubled": number(doubled),
        "versions": number(f"select count(*) from model_versions where {ours}"),
        "versions_lost": count - number(f"select count(distinct name) from model_versions where {ours}"),
        "models_not_ready": number("select count(*) from logged_models where status <> 2"),
        "objects": len(keys), "orphans": len(orphans), "unfinished_uploads": len(uploads),
        "bucket_bytes": sum(keys.values()),
    }  # fmt: skip


# Growth


def growth(here: World, sizes: list[int]) -> list[dict[str, Any]]:
    """Time what a step asks of the store behind ever more runs, and count the pages that it costs the database."""
    here.database.query(here.server.runs, "create extension if not exists pg_stat_statements")
    pattern = store.start_pipeline("growth", "growth", {"margin": 0.02}, "benchmarks.store")
    os.environ["SLIMLINE_PARENT_RUN"] = pattern
    first = saved(here.folder / "pattern", key="pattern")
    store.register("growth", first, "pattern", {}, "a pattern")
    found, filled = [], 0
    for size in sorted(sizes):
        fill(here, store.run_id_of(first), filled, size)
        filled = size
        here.database.query(here.server.runs, "analyze")
        found.append({"runs": size, "versions": size // 10, "actions": measure(here, size)})
    return found


def fill(here: World, pattern: str, since: int, until: int) -> None:
    """Copy a real run with all that belongs to it inside the database, and for every tenth a version."""
    if until <= since:
        return
    numbers = f"generate_series({since + 1}, {until}) n"
    new = "md5('run' || n)"
    database, rows = here.database, here.server.runs

    def copy(table: str, changed: dict[str, str], where: str, source: str = numbers) -> None:
        columns = [c for (c,) in database.query(rows, f"select column_name from information_schema.columns "
                   f"where table_name = '{table}' and is_generated = 'NEVER' order by ordinal_position")]  # fmt: skip
        chosen = ", ".join(changed.get(column, f"t.{column}") for column in columns)
        database.query(
            rows, f"insert into {table} ({', '.join(columns)}) select {chosen} from {table} t, {source} where {where}"
        )

    def renamed(letter: str) -> str:
        return f"case when t.key like 'slimline.key.%' then 'slimline.key.' || md5('{letter}' || n) else t.key end"

    model = database.query(rows, f"select model_id from logged_models where source_run_id = '{pattern}'")[0][0]
    ours = f"t.run_uuid = '{pattern}'"
    copy("runs", {"run_uuid": new, "start_time": "t.start_time - n * 60000"}, ours)
    copy(
        "tags",
        {"run_uuid": new, "key": renamed("k"),
         "value": "case when t.key = 'slimline.key' then md5('k' || n) else t.value end"}, ours,
    )  # fmt: skip
    for table in ("params", "metrics", "latest_metrics"):
        copy(table, {"run_uuid": new}, ours)
    named = {"model_id": "'m-' || md5('run' || n)"}
    copy("logged_models", {**named, "source_run_id": new}, f"t.model_id = '{model}'")
    copy("logged_model_tags", named, f"t.model_id = '{model}'")
    copy("inputs", {"source_id": new, "destination_id": "'m-' || md5('run' || n)", "input_uuid": "md5('in' || n)"},
         f"t.source_id = '{pattern}'")  # fmt: skip
    changed = {"name": "'grown-' || (n / 100)", "version": "(n / 10) % 10 + 1"}
    database.query(
        rows,
        "insert into registered_models (workspace, name, creation_time, last_updated_time) "
        "select distinct t.workspace, 'grown-' || (n / 100), t.creation_time, t.last_updated_time "
        f"from registered_models t, {numbers} where t.name = 'growth' and n % 10 = 0 on conflict do nothing",
    )
    copy("model_versions", changed, "t.name = 'growth' and t.version = 1 and n % 10 = 0")
    copy(
        "model_version_tags",
        {**changed, "key": renamed("v")},
        "t.name = 'growth' and t.version = 1 and n % 10 = 0",
    )  # fmt: skip


def measure(here: World, size: int) -> dict[str, dict[str, float]]:
    """The median seconds of every action, and pages looked at for one."""
    refs: list[str] = []
    for number in range(REPEATS + 1):  # the first is not counted
        refs.append(saved(here.folder / f"at-{size}" / str(number), key=f"{size}-{number}"))
    known = iter(range(10**6))

    def step() -> None:
        number = next(known)
        saved(here.folder / f"timed-{size}" / str(number), key=f"timed-{size}-{number}")

    def fetch() -> None:
        shutil.rmtree(store.home() / "fetched", ignore_errors=True)
        store.fetch(refs[0])

    steps = {
        "look for a finished step": lambda: store.find_finished(f"nobody-{next(known)}"),
        "find one": lambda: store.find_finished(f"{size}-3"),
        "a step with its model": step,
        "register": lambda: store.register(f"new-{size}-{next(known)}", refs[1], "k", {}, "a description"),
        "move an alias": lambda: store.set_alias("growth", "champion", 1),
        "fetch": fetch,
    }
    return {name: once(here, call) for name, call in steps.items()}


def once(here: World, call: Any) -> dict[str, float]:
    """Median seconds of a call, and pages that the database looked at, whatever else the machine does."""
    call()
    before, seconds = touched(here), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "pages": (touched(here) - before) / REPEATS}


def touched(here: World) -> int:
    """Pages of 8 kB that statements have looked at since the server began, in memory or on disk."""
    statement = (
        "select coalesce(sum(shared_blks_hit + shared_blks_read), 0) from pg_stat_statements s "
        "join pg_database d on d.oid = s.dbid where d.datname = current_database() and s.query not like '%pg_stat%'"
    )
    return int(here.database.query(here.server.runs, statement)[0][0])


# Transfer


def transfers(here: World, megabytes: int, rounds: int) -> dict[str, Any]:
    """Move one file up and down in turns, by slimline and by boto3 alone."""
    model = here.folder / "model"
    model.mkdir()
    block = os.urandom(2**20)
    with (model / "model.safetensors").open("wb") as handle:
        for number in range(megabytes):
            handle.write(number.to_bytes(8, "big") + block[8:])
    artifact.seal(model, format="hf", task="", labels=(), base="bytes")
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        ways = ("slimline", "boto3")
        for way in ways if number % 2 else ways[::-1]:
            for direction in ("up", "down"):
                place = f"s3://{here.server.bucket}/transfer/{way}"
                command = [sys.executable, "-m", "benchmarks.store", "--move", way, direction, place, str(model)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.setdefault(f"{way} {direction}", []).append(json.loads(said.splitlines()[-1]))
    return {"megabytes": megabytes, "rounds": rounds, **{name: told(tries, megabytes) for name, tries in found.items()}}


def told(tries: list[dict[str, float]], megabytes: int) -> dict[str, Any]:
    seconds = [one["seconds"] for one in tries]
    return {
        "seconds": seconds, "mb_per_s": megabytes / statistics.median(seconds) * 2**20 / 1e6,
        "memory_mb": statistics.median(one["memory_mb"] for one in tries),
    }  # fmt: skip


def move(way: str, direction: str, uri: str, model: Path) -> None:
    """One transfer, in a process of its own; prints its seconds and the memory that it took on top."""
    import boto3
    from boto3.s3.transfer import TransferConfig

    name, parts = "model.safetensors", urllib.parse.urlsplit(uri)
    config = TransferConfig(
        multipart_threshold=transfer.PART_BYTES,
        multipart_chunksize=transfer.PART_BYTES,
        max_concurrency=transfer.AT_ONCE,
    )
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    client.list_buckets()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        back, key = Path(scratch) / name, f"{parts.path.strip('/')}/{name}"
        start = time.perf_counter()
        if way == "boto3" and direction == "up":
            client.upload_file(str(model / name), parts.netloc, key, Config=config)
        elif way == "boto3":
            client.download_file(parts.netloc, key, str(back), Config=config)
        elif direction == "up":
            transfer.upload(transfer.Bucket(uri), {name: model / name})
        else:
            transfer.download(transfer.Bucket(uri), {name: (back, artifact.read(model).files[name])})
        seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "memory_mb": (after - before) / 1024}))


# The page


def page(known: dict[str, Any]) -> str:
    """All that is known, as a page."""
    where = f"{known['machine']['cores']} cores of {known['machine']['cpu']}, which clients and servers share"
    where += ". Counts, pages and ratios are what to compare: times are those of that machine, with all that ran on it"
    lines = ["# The store under load", "", f"`python -m benchmarks.store`, on {where}.", ""]
    if told := known.get("runs"):
        lines += [
            f"## {told['runs']} pipelines, {told['at_once']} at a time", "",
            "Processor seconds that a pipeline cost each server: "
            + ", ".join(f"{name} {value:.2f}" for name, value in told["processor_s"].items())
            + ". Counted afterwards in "
            "the database and in the bucket:", "", "| | |", "| --- | ---: |",
        ]  # fmt: skip
        skipped = ("runs", "at_once", "seconds", "median_s", "processor_s")
        lines += [
            f"| {name.replace('_', ' ')} | {value:,} |" for name, value in told.items() if name not in skipped
        ] + [""]
    if found := known.get("growth"):
        lines += [
            "## As the store grows",
            "",
            "Milliseconds of one call (median), and pages of 8 kB that the database looked at.",
            "",
        ]
        lines += ["| runs | versions | " + " | ".join(ACTIONS) + " |", "| ---: " * (2 + len(ACTIONS)) + "|"]
        for row in found:
            cells = [f"{a['seconds'] * 1000:.0f} ms, {a['pages']:.0f} pages" for a in map(row["actions"].get, ACTIONS)]
            lines.append(f"| {row['runs']:,} | {row['versions']:,} | " + " | ".join(cells) + " |")
        lines.append("")
    if told := known.get("transfer"):
        lines += [f"## One file of {told['megabytes']:,} MiB", "", f"Medians of {told['rounds']} rounds, in turns.", "",
                  "| | slimline | boto3 alone | ratio | memory, slimline | memory, boto3 |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for direction in ("up", "down"):
            ours, alone = told[f"slimline {direction}"], told[f"boto3 {direction}"]
            lines.append(
                f"| {direction} | {ours['mb_per_s']:.0f} MB/s | {alone['mb_per_s']:.0f} MB/s | "
                f"{ratio(told, direction):.0%} | {ours['memory_mb']:.0f} MB | {alone['memory_mb']:.0f} MB |"
            )
        lines += ["", "Down, slimline's time includes the sha256 of every byte."]
    return "\n".join(lines).rstrip() + "\n"


def ratio(told: dict[str, Any], direction: str) -> float:
    """The median over rounds of slimline's speed as a fraction of boto3's."""
    pairs = zip(told[f"slimline {direction}"]["seconds"], told[f"boto3 {direction}"]["seconds"])
    return statistics.median(alone / ours for ours, alone in pairs)


def main(arguments: list[str], out: Path = HERE) -> None:
    """Measure what was asked for, and write the page of all that is known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store")
    parser.add_argument("--part", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="*", default=[0, 100, 1000, 10_000])
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--move", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.worker:
        return worker(Path(asked.worker[0]), asked.worker[1], asked.worker[2:])
    if asked.move:
        return move(*asked.move[:3], Path(asked.move[3]))
    file = out / "store.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    with world(asked.scratch) as here:
        for part in [part for part in PARTS if part in asked.part]:
            if part == "runs":
                known[part] = runs(here, asked.runs, asked.at_once)
            elif part == "growth":
                known[part] = growth(here, asked.sizes)
            else:
                known[part] = transfers(here, asked.megabytes, asked.rounds)
            known["machine"] = bench.machine()
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            (out / "store.md").write_text(page(known), encoding="utf-8")
            print(part, "is measured", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
