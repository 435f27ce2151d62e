"""Sliding-window attention with sinks: memory for keys and values that does not grow with the text.

Every token sees the first few tokens of a text, the sinks, and the last `window` ones (StreamingLLM, Xiao et al., 2023,
arXiv 2309.17453). Texts up to `window` + `sinks` tokens get the same answers as before; longer ones, of any length, are
answered in the memory and at the speed of that one, by what is near. Weights stay as they are, so it costs nothing to
make; what was said before the window is forgotten. Reading a long prompt takes longer than by transformers' own kernel
up to some thousands of tokens (benchmarks/window.md).

Without sinks it is the family's own window, in plain transformers, where it has one (mistral, phi3, qwen2, qwen3,
gemma2). With sinks, config.json says so by keys of ours, which slimline hears of; others run the model with whole
attention.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from slimline import decoder, hf, window
from slimline.errors import ConfigError, ModelError
from slimline.technique import BaseConfig, Metrics

NEEDS = GIVES = "hf"
PLAIN = ("mistral", "phi3", "qwen2", "qwen3", "gemma2")
"""Families that have a window of their own, which the others' lack."""


class Config(BaseConfig):
    """Options of attention.sliding_window."""

    window: int = Field(1024, ge=1, description="last tokens that each sees, itself among them")
    sinks: int = Field(4, ge=0, description="first tokens of the text that all see; 0 for none")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the same weights with another attention."""
    values = hf.read_config(source)
    decoder.family(values, source)
    context, seen = decoder.context(values), config.window + config.sinks
    before = values.get(window.WINDOW) or (
        values.get("sliding_window") if values.get("use_sliding_window", True) else 0
    )
    if seen >= context:
        raise ConfigError(f"window and sinks are {seen} tokens, and {source} holds {context} anyway. Ask for fewer.")
    if before and config.window > before:
        raise ConfigError(f"{source} has a window of {before} already. Ask for at most that.")
    changes = (
        plain(values, config.window) if not config.sinks and values["model_type"] in PLAIN else ours(values, config)
    )
    for file in sorted((*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json"))):
        shutil.copyfile(file, out / file.name)
    decoder.copy_rest(source, out)
    (out / "config.json").write_text(json.dumps(values | changes, indent=2, sort_keys=True), encoding="utf-8")
    return {"window": float(config.window), "sinks": float(config.sinks), "cache_fraction": seen / context}


def plain(values: dict[str, Any], size: int) -> dict[str, Any]:
    """What makes every layer of a family slide in plain transformers."""
    changes: dict[str, Any] = {"sliding_window": size}
    if values["model_type"].startswith("qwen"):
        changes |= {"use_sliding_window": True, "max_window_layers": 0}
    if values["model_type"] in ("qwen2", "qwen3", "gemma2"):
        changes["layer_types"] = ["sliding_attention"] * int(values["num_hidden_layers"])
    return changes


def ours(values: dict[str, Any], config: Config) -> dict[str, Any]:
    """What makes every layer slide by slimline.window. Raises ModelError for a family that it cannot have."""
    window.check(values, "the model")
    if any(kind != "full_attention" for kind in values.get("layer_types") or ()):
        raise ModelError("some layers of the model have a window of their own. Ask for sinks=0, or leave it as it is.")
    changes: dict[str, Any] = {window.WINDOW: config.window, window.SINKS: config.sinks}
    if "sliding_window" in values or values["model_type"] in PLAIN:  # the family's own is off, and so are its caches
        changes["sliding_window"] = None
    return changes
