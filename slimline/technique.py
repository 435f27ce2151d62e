"""What a technique is, and how one is found: 'prune.heads' *is* slimline/prune/heads.py.

A technique is a module with four names:

    NEEDS   the format of the model it takes: "hf", "onnx", "path" (a folder from outside) or "any"
    GIVES   the format of what it leaves in `out`: "hf", "onnx", "genai", "gguf", "tensorrt" or "evaluation"
    Config  its options: a BaseConfig, every field with bound, unit and meaning
    run     (source: Path, out: Path, config: Config) -> Metrics; reads source, writes out, touches nothing else

The file system is the registry: a new technique is one new file, and the contract test finds it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from slimline.errors import ConfigError

STAGES = ("fetch", "train", "distill", "prune", "attention", "quantize", "export", "evaluate")

Metrics = dict[str, float]
Item = TypeVar("Item")


class IsStored:
    """Marks an option that names something stored."""


Stored = Annotated[str, IsStored()]
"""An option that is a ref outside (what the user writes and the history keeps) and a local path inside `run`."""


class BaseConfig(BaseModel):
    """Options of one technique: frozen, and closed to what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Technique(Protocol):
    """The shape of a technique's module, for type checkers."""

    __name__: str
    __doc__: str | None
    NEEDS: str
    GIVES: str
    Config: type[BaseConfig]

    def run(self, source: Path, out: Path, config: Any) -> Metrics: ...


def names(stage: str) -> list[str]:
    """The techniques of one stage, by file name."""
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}.{_nearest(stage, STAGES)} The stages are: {', '.join(STAGES)}.")
    package = importlib.import_module(f"slimline.{stage}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def all_names() -> list[str]:
    """Every technique there is, as 'stage.method'."""
    return [f"{stage}.{method}" for stage in STAGES for method in names(stage)]


def find(name: str) -> Technique:
    """The module of 'stage.method'. Raises ConfigError naming the nearest and all known ones."""
    stage, _, method = name.partition(".")
    known = names(stage)
    if method not in known:
        everywhere = all_names()
        raise ConfigError(
            f"no technique {name!r}.{_nearest(name, everywhere)} {stage} has: {', '.join(known) or 'none'}."
        )
    return cast(Technique, importlib.import_module(f"slimline.{name}"))


def configure(module: Technique, options: dict[str, Any]) -> BaseConfig:
    """The technique's Config from plain options. Raises ConfigError with every problem in one sentence."""
    name = module.__name__.removeprefix("slimline.")
    known = list(module.Config.model_fields)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{name} has no option {option!r}.{_nearest(option, known)} "
                f"It has: {', '.join(known) or 'none'}. See `slimline techniques {name}`."
            )
    try:
        return module.Config(**options)
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise ConfigError(f"{name}: {problems}. See `slimline techniques {name}`.") from None


def taken(module: Technique, options: dict[str, Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The options, and of what a pipeline offers to every method of a stage those that this one has."""
    return {**{k: v for k, v in offered.items() if k in module.Config.model_fields}, **options}


OFFERED = ("data", "teacher", "seed")
"""What ports offer rather than demand to be known."""


def stored_fields(config: type[BaseConfig]) -> list[str]:
    """The options of type `Stored` (or a tuple of them)."""
    return [
        key
        for key, field in config.model_fields.items()
        if any(isinstance(m, IsStored) for m in field.metadata) or "IsStored" in repr(field.annotation)
    ]


Listener = Callable[[str, int, int, str], None]
"""Called with (what is being done, items done, items in all, a short note such as 'loss 0.31')."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_doing: ContextVar[str] = ContextVar("doing", default="")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Everything tracked inside is reported to the listener."""
    token = _listener.set(listener)
    _doing.set("")
    try:
        yield
    finally:
        _listener.reset(token)


def doing() -> str:
    """What was last being tracked, and at which item: 'rounding layers, 3 of 8'; empty before anything was."""
    return _doing.get()


def track(
    items: Collection[Item], what: str, note: Callable[[], str] = lambda: "", every_s: float = 0.5
) -> Iterator[Item]:
    """Go through items and report progress to whoever listens; silent when nobody does."""
    listener, last = _listener.get(), 0.0
    for done, item in enumerate(items):
        now = time.monotonic()
        _doing.set(f"{what}, {done + 1} of {len(items)}")
        if listener and now - last >= every_s:
            listener(what, done, len(items), note())
            last = now
        yield item
    if listener:
        listener(what, len(items), len(items), note())


def _nearest(name: str, known: Collection[str]) -> str:
    part = name.rstrip(".")
    begun = [n for n in known if part == name and part and n.startswith(part)]  # int8 is int8_static rather than fp8
    close = begun or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"option {where!r} is required"
    if error["type"] == "tuple_type":
        return f"option {where!r} is {error['input']!r}, but input should be a list, as in [{error['input']!r}]"
    return f"option {where!r} is {error['input']!r}, but {error['msg'][0].lower()}{error['msg'][1:]}"
