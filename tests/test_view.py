"""What is printed fits where it is read."""

import io
import sys

from rich.console import Console

from slimline import cli
from slimline.view import results_table

ROW = {
    "name": "int8_dynamic · onnx",
    "quality": 0.8361,
    "quality_low": 0.8212,
    "quality_high": 0.8501,
    "p50_ms": 10.81,
    "p99_ms": 149.53,
    "speedup": 13.1,
    "weights_bytes": 438.0e6,
    "peak_memory_bytes": 1590e6,
}


def test_the_table_of_results_keeps_one_line_a_model_on_a_terminal_of_80_columns():
    told = io.StringIO()
    Console(file=told, width=80).print(
        results_table([ROW, {**ROW, "is_candidate": True}], {"metric": "accuracy", "factor": 100})
    )
    lines = told.getvalue().splitlines()
    assert len(lines) == 4 and "83.6 (82.1-85.0)" in lines[2] and "..." not in told.getvalue()
    assert "…" not in told.getvalue() and lines[2].split() == lines[3].split()


def test_the_next_commands_name_the_program_as_the_shell_finds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/slimline"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert cli._me() == ".venv/bin/slimline"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "slimline").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cli._me() == "slimline"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/cli.py"])
    assert cli._me() == "slimline"
