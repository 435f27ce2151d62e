"""A recipe: a YAML file of pipeline parameters, nothing more, checked whole before anything runs.

The parameters and their types come from the compiled pipeline, the options of each technique from its Config, so that a
typing mistake in the last stage is said in the first second and not after an hour of training.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from slimline import gate, technique
from slimline.errors import ConfigError, DataError

TYPES: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}
WORDS = {
    "STRING": "text", "NUMBER_INTEGER": "a whole number", "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false", "LIST": "a list", "STRUCT": "a mapping",
}  # fmt: skip


def pipelines() -> list[str]:
    """Names of the compiled pipelines that come with slimline."""
    folder = resources.files("slimline") / "compiled"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def pipeline_file(pipeline: str) -> Path:
    """The compiled pipeline of this name, or the file itself if it is one."""
    if pipeline.endswith((".yaml", ".yml")):
        if not Path(pipeline).is_file():
            raise ConfigError(f"{pipeline} does not exist. Compile it with `slimline compile`.")
        return Path(pipeline)
    if pipeline not in pipelines():
        raise ConfigError(
            f"no pipeline {pipeline!r}. There is: {', '.join(pipelines())}, or give a compiled .yaml file."
        )
    return Path(str(resources.files("slimline") / "compiled" / f"{pipeline}.yaml"))


def read(file: Path) -> dict[str, Any]:
    """The parameters in a recipe file; relative paths of `data` and `source` are taken from the file's folder."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist. Give a recipe with -f.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        where = str(error).split("\n")[0]
        raise ConfigError(f"{file} is not a recipe: {where}. It must be YAML in UTF-8.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a recipe: it must be lines of `parameter: value`.")
    for key in FILES:
        value = values.get(key)
        if isinstance(value, str) and "://" not in value and (file.parent / value).exists():
            values[key] = str(file.parent / value)
    return values


def assign(pairs: list[str]) -> dict[str, Any]:
    """Parameters from `--set name=value`, values read as YAML; `options.key=value` reaches into a mapping."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"{pair!r} is not name=value.")
        name, _, inner = name.partition(".")
        value = yaml.safe_load(text) if text else ""
        if inner:
            values.setdefault(name, {})[inner] = value
        else:
            values[name] = value
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings are merged."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def check(spec: dict[str, Any], values: dict[str, Any], here: bool = True) -> dict[str, Any]:
    """The values a pipeline will run with, defaults filled in. Raises ConfigError or DataError for what cannot be.

    Files are looked for only where the pipeline runs `here`, on this machine.
    """
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"the pipeline has no parameter {name!r}.{hint} It has: {', '.join(sorted(known))}.")
    whole = {}
    for name, definition in known.items():
        if values.get(name, definition.get("defaultValue")) == "" and name in REQUIRED:
            raise _missing(name, definition)
        if name in values:
            whole[name] = _typed(name, values[name], definition["parameterType"])
        elif "defaultValue" in definition:
            default = definition["defaultValue"]
            whole[name] = int(default) if definition["parameterType"] == "NUMBER_INTEGER" else default
        else:
            raise _missing(name, definition)
    _check_techniques(spec, whole)
    if "margin" in whole:
        limits(whole)
    if here:
        _check_files(whole)
    return whole


def limits(values: dict[str, Any]) -> gate.Limits:
    """The gate's limits that a pipeline's parameters set. Raises ConfigError for what cannot be."""
    own = {"margin": "margin", "gate_champion": "against_champion", "gate_require_approval": "require_approval"}
    given = {limit: values[parameter] for parameter, limit in own.items() if parameter in values}
    return gate.limits_from({**given, **values.get("gate_options", {})})


def _missing(name: str, definition: dict[str, Any]) -> ConfigError:
    meaning = definition.get("description", "").rstrip(".")
    return ConfigError(f"parameter {name!r} is required ({meaning}). Put it into the recipe, or --set {name}=...")


def whole_numbers(spec: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values with 3 for 3.0 where a whole number is meant: Kubeflow keeps all numbers as floats."""
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    kinds = {name: definition["parameterType"] for name, definition in known.items()}
    return {
        name: int(value) if kinds.get(name) == "NUMBER_INTEGER" and float(value).is_integer() else value
        for name, value in values.items()
    }


def _typed(name: str, value: Any, kind: str) -> Any:
    # YAML 1.1 reads 5e-5 as text: a number is meant.
    if (
        kind in ("NUMBER_DOUBLE", "NUMBER_INTEGER")
        and isinstance(value, str)
        and re.fullmatch(r"-?\d+(\.\d*)?e-?\d+", value)
    ):
        value = float(value)
    wrong = not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN")
    if wrong:
        raise ConfigError(f"parameter {name!r} is {value!r}, but {WORDS[kind]} is needed.")
    return float(value) if kind == "NUMBER_DOUBLE" else value


def _check_techniques(spec: dict[str, Any], values: dict[str, Any]) -> None:
    """Find and configure every technique that will run, with stand-ins for what earlier steps will make."""
    for step in steps(spec, values):
        stage, given = step.name.split("-")[0], step.given
        method, options = given.get("method"), given.get("options") or {}
        known = isinstance(method, str) and method not in ("none", PENDING) and options != PENDING
        if stage not in technique.STAGES or not known:
            continue
        module = technique.find(f"{stage}.{method}")
        plumbing = ("method", "options", "source", *RESOURCES)
        knobs = {
            k: v for k, v in given.items() if k not in plumbing and not k.startswith(CHANNEL) and v not in (None, "")
        }
        offered = {k: v for k, v in knobs.items() if k in technique.OFFERED}
        demanded = {k: v for k, v in knobs.items() if k not in technique.OFFERED}
        technique.configure(module, technique.taken(module, {**demanded, **options}, offered))


class Step(NamedTuple):
    """A step of a compiled pipeline: its port's name, the label of its container, and what it will be given."""

    name: str
    executor: str
    given: dict[str, Any]


def steps(spec: dict[str, Any], values: dict[str, Any], dag: dict[str, Any] | None = None) -> Iterator[Step]:
    """All steps, those inside an exit handler or another group too, with what the pipeline's values make of each."""
    for task in (dag or spec["root"]["dag"])["tasks"].values():
        component = spec["components"][task["componentRef"]["name"]]
        wanted = component.get("inputDefinitions", {}).get("parameters", {})
        found = task.get("inputs", {}).get("parameters", {})
        given = {key: _argument(found.get(key, {}), wanted.get(key, {}), values) for key in (*wanted, *found)}
        if "dag" in component:
            yield from steps(spec, given, component["dag"])
        else:
            name = re.sub(r"^comp-|-\d+$", "", task["componentRef"]["name"])
            yield Step(name, component["executorLabel"], given)


FILES = ("source", "data", "task")
"""Parameters that name something on disk: relative to the recipe, and there before anything runs."""
REQUIRED = (*FILES, "name")
"""Parameters that have no default but an empty one, so that a form can be opened without them."""
CHANNEL = "pipelinechannel--"
RESOURCES = (
    "cpu_limit", "cpu_request", "memory_limit", "memory_request", "accelerator_type", "accelerator_count",
)  # fmt: skip
"""What KFP adds to a step's inputs when it asks for resources by parameter."""
PENDING = "made by an earlier step"


def _argument(given: dict[str, Any], definition: dict[str, Any], values: dict[str, Any]) -> Any:
    if "componentInputParameter" in given:
        return values.get(given["componentInputParameter"])
    if "taskOutputParameter" in given:
        return PENDING
    value = given.get("runtimeValue", {}).get("constant", definition.get("defaultValue"))
    integral = definition.get("parameterType") == "NUMBER_INTEGER" and value is not None
    return int(value) if integral else value


def _check_files(values: dict[str, Any]) -> None:
    for name in FILES:
        value = values.get(name)
        if isinstance(value, str) and ":" not in value and not Path(value).expanduser().exists():
            raise DataError(f"{name} {value!r} does not exist in {Path.cwd()}. Give a path, or a ref.")
