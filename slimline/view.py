"""What a person sees while a pipeline runs, and the table at its end.

On a terminal: a line for each finished step and one bar for the step at work, with the time left. Elsewhere: plain
lines, one when a step starts or ends and one for every tenth of a long one; never a carriage return.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class View:
    """Shows the events of a run (see progress.py) on a console."""

    def __init__(self, console: Console) -> None:
        # Bound to today's stream: while a pipeline runs, standard error belongs to its log.
        self.console = Console(file=console.file, highlight=False)
        self.steps = self.finished = 0
        self.tenth, self.what = -1, ""
        self.began = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_{event['event']}", None)
        if handler:
            handler(event)

    def _run(self, event: dict[str, Any]) -> None:
        self.steps = event["steps"]
        self._line(f"[dim]run {event['run_id']}, log {event['log']}[/dim]")

    def _note(self, event: dict[str, Any]) -> None:
        self._line(f"[dim]note: {escape(event['text'])}[/dim]")

    def _start(self, event: dict[str, Any]) -> None:
        self.began, self.tenth, self.what = time.monotonic(), -1, ""
        if self.bar:
            self._clear()
            self.task = self.bar.add_task(event["step"], total=None, note="")
        else:
            self._line(f"{self._count()}{event['step']} ...")

    def _progress(self, event: dict[str, Any]) -> None:
        label = f"{event['step']}: {event['what']}"
        if self.bar and self.task is not None:
            if event["what"] != self.what:
                self.bar.reset(self.task)
            self.bar.update(
                self.task,
                description=label,
                completed=event["done"],
                total=event["total"],
                note=event["note"],
            )
        elif (tenth := 10 * event["done"] // max(event["total"], 1)) != self.tenth or event["what"] != self.what:
            if time.monotonic() - self.began > 5:
                self._line(f"      {label} {10 * tenth} % {event['note']}".rstrip())
            self.tenth = tenth
        self.what = event["what"]

    def _passed(self, event: dict[str, Any]) -> None:
        self.steps -= 1

    def _end(self, event: dict[str, Any]) -> None:
        self.finished += 1
        took = "reused" if event["reused"] else f"{event['seconds']:.1f} s"
        self._clear()
        self._line(f"{self._count(-1)}{event['step']:26} [green]{took}[/green]")

    def _error(self, event: dict[str, Any]) -> None:
        self._clear()
        self._line(f"{self._count()}{event['step']:26} [red]failed[/red]")

    def _count(self, shift: int = 0) -> str:
        return f"[dim]{self.finished + 1 + shift:2}/{self.steps}[/dim] " if self.steps else ""

    def _clear(self) -> None:
        if self.bar and self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


def results_table(rows: list[dict[str, Any]], terms: dict[str, Any]) -> Table:
    """Base and every stage's result: quality with its interval, latency, size and memory."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nmodel", no_wrap=True)
    for column in (
        f"{terms['metric']}\n(95 % interval)",
        "p50\nms",
        "p99\n<= ms",
        "speed-\nup",
        "weights\nMB",
        "peak\nMB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown = [f"{terms['factor'] * row[key]:.1f}" for key in ("quality", "quality_low", "quality_high")]
        table.add_row(
            escape(row["name"]),
            f"{shown[0]} ({shown[1]}-{shown[2]})",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['speedup']:.1f}x",
            f"{row['weights_bytes'] / 1e6:.1f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            style="bold" if row.get("is_candidate") else "",
        )
    return table
