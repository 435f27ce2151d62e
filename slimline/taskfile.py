"""Task files of lm-evaluation-harness, read as what they are: files from outside.

A task is a folder with one YAML file, as the harness has them, and the data that it names, as JSON lines or Parquet.
What it may set is a list of keys; `!function`, `include`, custom data sets, data from a hub and metrics from one are
refused, each in one sentence, before the harness sees any of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from slimline.errors import DataError

Rows = list[dict[str, Any]]

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
KEYS = (
    *("task", "task_alias", "tag", "metadata", "dataset_path", "dataset_kwargs", *SPLITS, "output_type", "metric_list"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter"),
    "num_fewshot",
)
"""What a task file may set."""
METRICS = ("acc", "acc_norm")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Rows]]:
    """The settings of a task and the rows of its splits. Raises DataError for whatever a task may not ask for."""
    file = find(folder)
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        tag = str(error.problem).partition("tag ")[2] or str(error.problem)
        raise DataError(
            f"{file} holds {tag}: code, which no task may bring. Say it as a template, or in the data."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not YAML: {str(error).splitlines()[0]}. Write it again.") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("task"), str):
        raise DataError(f"{file} names no task. Give it a line such as `task: my_questions`.")
    if unknown := sorted(str(key) for key in settings.keys() - set(KEYS)):
        raise DataError(
            f"{file} sets {unknown[0]!r}, which this version does not take. It takes: {', '.join(sorted(KEYS))}."
        )
    _check_kinds(file, settings)
    files = (settings.pop("dataset_kwargs", None) or {}).get("data_files")
    kind = settings.pop("dataset_path", None)
    if kind not in ("json", "parquet") or not isinstance(files, dict) or not files:
        raise DataError(
            f"{file} takes its data from {kind!r}. Only local files are read: dataset_path: json (or parquet), "
            "dataset_kwargs: {data_files: {test: questions.jsonl}}."
        )
    splits = {str(split): _rows(file, kind, name) for split, name in files.items()}
    asked = {key: settings[key] for key in SPLITS if settings.get(key) is not None}
    for key, split in asked.items():
        if split not in splits:
            raise DataError(f"{file}: {key} is {split!r}, but data_files has {', '.join(splits)}. Name one of these.")
    if not asked.keys() & {"test_split", "validation_split"}:
        raise DataError(f"{file} says not what to ask. Set test_split to one of: {', '.join(splits)}.")
    return settings, splits


def find(folder: Path) -> Path:
    """The one task file of a folder."""
    found = sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml"))
    if len(found) != 1:
        raise DataError(f"{folder} has {len(found)} YAML files. A task is a folder with one, and the data it names.")
    return found[0]


def _check_kinds(file: Path, settings: dict[str, Any]) -> None:
    if settings.get("output_type") != "multiple_choice":
        raise DataError(f"{file}: output_type is {settings.get('output_type')!r}. Set multiple_choice.")
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        kinds: tuple[type, ...] = (str, list) if key == "doc_to_choice" else (str, int)
        if not isinstance(settings.get(key), kinds):
            raise DataError(f"{file}: {key} is {settings.get(key)!r}. Name a column, or write a template.")
    for entry in settings.pop("metric_list", None) or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in METRICS:
            raise DataError(f"{file} asks for the metric {name!r}. This version computes {' and '.join(METRICS)}.")
    settings["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS]
    shots = settings.get("num_fewshot") or 0
    if not isinstance(shots, int) or not 0 <= shots <= 64:
        raise DataError(f"{file}: num_fewshot is {shots!r}. Set a number from 0 to 64.")


def _rows(task: Path, kind: str, name: Any) -> Rows:
    """The rows of one data file, which must lie in the task's folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = task.parent / str(name)
    if not isinstance(name, str) or not file.resolve().is_relative_to(task.parent.resolve()) or not file.is_file():
        raise DataError(f"{task} takes data from {name!r}, which is no file in its folder. Put the file there.")
    try:
        if kind == "parquet":
            rows: Rows = pq.read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0][:200]}. Write it again.") from None
    if not rows or not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise DataError(f"{file} needs at least one row, and the same columns in each. Mend it.")
    return rows
