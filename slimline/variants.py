"""What evaluations of speed say of the models they compare: which they are, their names and their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimline import artifact
from slimline.artifact import Manifest


def distinct(paths: list[Path]) -> dict[str, Path]:
    """The folders by digest, in order, each once: a stage that was passed over gives its source again."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(artifact.read(path).digest, path)
    return found


def describe(manifest: Manifest, runtime: str) -> dict[str, Any]:
    """What a variant is, and its sizes. Its name: the last technique that changed it, and its format."""
    methods = [s.technique.split(".") for s in manifest.history]
    changed = [method for stage, method in methods if stage not in ("fetch", "export")]
    return {
        "name": f"{changed[-1] if changed else 'base'} · {manifest.format}",
        "digest": manifest.digest,
        "format": manifest.format,
        "runtime": runtime,
        "size_bytes": manifest.size_bytes,
        "weights_bytes": manifest.weights_bytes,
    }


def name_apart(variants: list[dict[str, Any]]) -> None:
    """Add the beginning of its digest to every name that is there twice."""
    names = [variant["name"] for variant in variants]
    for variant in variants:
        if names.count(variant["name"]) > 1:
            variant["name"] += f" · {variant['digest'][:6]}"
