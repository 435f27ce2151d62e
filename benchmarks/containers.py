"""What it costs to run a step in a container: against the same step in a process, and where the seconds go.

    make images && python -m benchmarks.containers [--rounds 3]

Runs `optimize` on a tiny model, whose steps have almost nothing to do, in three ways in turn: in containers, in a fresh
process a step (what kfp.local does), and forked from a warm server (what `slimline run` does, docs/adr/0004). Each run
has a store of its own. Then the cpu image is started with ever more to do. Writes containers.json and containers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimline import bench, containers, launch
from tests.test_launch import parameters

WAYS = ("container", "process", "forked")
TIMES_ITSELF = "evaluate_latency"
"""Left out: half a minute of its own work, whose length is chance."""
LADDER = {
    "nothing: the engine makes, starts and removes it": ["true"],
    "starts Python": ["python", "-c", "pass"],
    "imports kfp's executor": ["python", "-c", "import kfp.dsl.executor_main"],
    "imports slimline's steps and MLflow": ["python", "-c", "import kfp.dsl.executor_main, slimline.step"],
    "imports torch and transformers": [
        "python", "-c",
        "import kfp.dsl.executor_main, slimline.step, torch, transformers.models.auto.modeling_auto",
    ],
}  # fmt: skip
"""What a container does, each with all before it."""


def main(arguments: list[str]) -> None:
    """Run all ways in turn, measure the ladder, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.containers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=Path, default=Path("build/images.json"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args(arguments)
    out = asked.out.absolute()
    image = next(v for k, v in json.loads(asked.images.read_text()).items() if k.startswith("slimline-cpu:"))
    seconds: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="slimline-bench-") as scratch:
        place = Path(scratch)
        values = parameters(place)
        subprocess.run(["chmod", "-R", "a+rX", scratch], check=True)
        os.chdir(place)
        for turn in range(asked.rounds):
            for way in WAYS if turn % 2 == 0 else reversed(WAYS):
                os.environ["SLIMLINE_STORE"] = str(place / f"{way}-{turn}")
                with timed(way, seconds[way]):
                    launch.run("optimize", values, lambda event: None, place=launch.Place(way == "container"))
        ladder = climb(image, rounds=5)
    measured = {"machine": bench.machine(), "steps": seconds, "ladder": ladder}
    (out / "containers.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (out / "containers.md").write_text(page(measured), encoding="utf-8")
    print(out / "containers.md")


@contextmanager
def timed(way: str, into: dict[str, list[float]]) -> Iterator[None]:
    """Within it, the seconds of every step are added under the step's name, numbered where it comes again."""
    kind: Any = containers.Containers if way == "container" else launch.Worker
    plain, seen = kind.run, dict[str, int]()

    def run(self: Any, *given: Any, **named: Any) -> int:
        command = named.get("full_command") or named.get("command") or next(g for g in given if isinstance(g, list))
        step = containers.argument(command, "--function_to_execute")
        if step == TIMES_ITSELF:
            return int(plain(self, *given, **named))
        seen[step] = seen.get(step, 0) + 1
        start = time.perf_counter()
        code = fresh(self, command) if way == "process" else int(plain(self, *given, **named))
        into.setdefault(f"{step} {seen[step]}", []).append(time.perf_counter() - start)
        return code

    kind.run = run
    try:
        yield
    finally:
        kind.run = plain


def fresh(worker: Any, command: list[str]) -> int:
    """A step in a process of its own, as kfp.local starts it."""
    kept = {key: value for key, value in worker.environment.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "_KFP_RUNTIME": "true", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    with worker.log.open("ab") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log).returncode


def climb(image: str, rounds: int) -> dict[str, float]:
    """Median seconds of a container of this image that does each of LADDER, in turn."""
    import docker

    taken: dict[str, list[float]] = {name: [] for name in LADDER}
    with containers.engine():
        client = docker.from_env(timeout=120)
        for _ in range(rounds):
            for name, command in LADDER.items():
                start = time.perf_counter()
                container = client.containers.create(
                    image, command, read_only=True, network_mode="none", tmpfs={"/tmp": "mode=1777"},
                    environment={"_KFP_RUNTIME": "true"},
                )  # fmt: skip
                container.start()
                if code := container.wait()["StatusCode"]:
                    raise SystemExit(f"{command} ended with {code}: {container.logs().decode()[-500:]}")
                container.remove(v=True)
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def page(measured: dict[str, Any]) -> str:
    """Both tables as Markdown, with the machine and the command that made them."""
    machine = ", ".join(f"{key} {value}" for key, value in measured["machine"].items() if value)
    median: Callable[[list[float]], float] = statistics.median
    steps = {way: {name: median(times) for name, times in found.items()} for way, found in measured["steps"].items()}
    extra = [steps["container"][name] - steps["process"][name] for name in steps["container"]]
    rounds = len(next(iter(measured["steps"]["container"].values())))
    lines = [
        "# A step in a container against the same step in a process",
        "",
        "`make images`, then `python -m benchmarks.containers`: `optimize` on a tiny model, so that next to nothing of "
        f"a step is its own work. Medians of {rounds} runs, all ways in turn. Machine: {machine}.",
        "",
        f"A container takes {median(extra):.1f} s longer than a fresh process in the median of {len(extra)} steps, "
        f"{max(extra):.1f} s at most.",
        "",
        "| step | container s | fresh process s | container adds s | forked from a warm server s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in steps["container"]:
        inside, process, forked = (steps[way][name] for way in WAYS)
        lines.append(f"| {name} | {inside:.1f} | {process:.1f} | {inside - process:+.1f} | {forked:.1f} |")
    lines += ["", "Where the seconds of a container go, each line with all before it:", ""]
    lines += ["| a container that | s | more s |", "| --- | ---: | ---: |"]
    last = 0.0
    for name, seconds in measured["ladder"].items():
        lines.append(f"| {name} | {seconds:.2f} | {seconds - last:+.2f} |")
        last = seconds
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
