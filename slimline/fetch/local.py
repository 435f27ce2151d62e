"""Local: a model from a folder of this machine, or from inside an installed package, without running any of it.

The folder is checked (see slimline.allowlist), then what a model needs is copied: config.json, the tokenizer's files
and the weights: shards of an encoder merged into one model.safetensors, those of a language model as they are, since
whatever reads one reads shards. Numbers keep their format, memory stays small, and the source is only read.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import pkgutil
import shutil
from collections.abc import Collection
from pathlib import Path

from slimline import allowlist, streaming
from slimline.decoder import FAMILIES
from slimline.errors import ConfigError, ModelError
from slimline.technique import BaseConfig, Metrics, track

NEEDS, GIVES = "path", "hf"
PACKAGE = "package:"


class Config(BaseConfig):
    """No options: what to bring in is the source."""


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Copy the checked model of a folder (or of the folder a file of it lies in) into `out`."""
    folder = source.parent if source.is_file() else source
    allowlist.check(folder)
    settings, found = allowlist.read_config(folder), allowlist.tensors(folder)
    layers, width = (
        next((settings[name] for name in names if name in settings), None)
        for names in (("num_hidden_layers", "n_layers", "n_layer"), ("hidden_size", "dim", "n_embd"))
    )
    if type(layers) is not int or type(width) is not int or layers < 1 or width < 1:
        raise ModelError(f"{folder / 'config.json'} gives layers {layers!r} and width {width!r}. Both must be numbers.")
    for name in ("config.json", *allowlist.TOKENIZER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if (folder / allowlist.WEIGHTS).is_file():
        shutil.copyfile(folder / allowlist.WEIGHTS, out / allowlist.WEIGHTS)
    elif settings["model_type"] in FAMILIES:
        for name in (allowlist.INDEX, *sorted({tensor.file.name for tensor in found.values()})):
            shutil.copyfile(folder / name, out / name)
    else:
        merge(found, out / allowlist.WEIGHTS)
    return {
        "parameters": float(sum(math.prod(t.shape) for t in found.values() if t.dtype.startswith(("F", "BF")))),
        "size_bytes": float(sum(file.stat().st_size for file in out.iterdir())),
        "layers": float(layers),
        "width": float(width),
    }


def merge(found: dict[str, allowlist.Tensor], out: Path) -> None:
    """Write tensors of many files into one safetensors file, in the order of their names, byte for byte."""
    # Widest elements first, as the format's own writer does: every tensor then starts at a multiple of its width.
    names = sorted(found, key=lambda name: (-allowlist.WIDTHS[found[name].dtype], name))
    with out.open("wb") as handle:
        handle.write(streaming.head({name: (found[name].dtype, found[name].shape) for name in names}))
        for name in track(names, "merging shards"):
            for piece in allowlist.chunks(found[name]):
                handle.write(piece)


def locate(source: str) -> Path:
    """The path that a source names: a path itself, or package:NAME/folder in an installed package, never imported."""
    if not source.startswith(PACKAGE):
        path = Path(source).expanduser()
        if not path.exists():
            near = _nearest(path.name, [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else [])
            raise ModelError(f"{source} does not exist.{near} Give a folder, a file, or package:NAME/folder.")
        return path
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or ".." in Path(inside).parts or Path(inside).is_absolute():
        raise ConfigError(f"{source!r} does not name a package's folder. Write it as package:NAME/folder/inside.")
    spec = importlib.util.find_spec(name)  # a plain name: nothing is imported to find it
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    if not places:
        near = _nearest(name, [module.name for module in pkgutil.iter_modules() if module.ispkg])
        raise ModelError(f"no package {name!r} is installed here.{near} Install it with pip, or give a folder.")
    for place in places:
        if (place / inside).exists():
            return place / inside
    folders = sorted(f.name for f in places[0].iterdir() if f.is_dir() and not f.name.startswith("_"))
    raise ModelError(
        f"package {name} has no {inside!r}.{_nearest(inside, folders)} Its folders: {', '.join(folders) or 'none'}."
    )


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
