"""What `vllm serve` loads: a plain Hugging Face folder, and the arguments as a file that it reads itself.

Argument names, families and group sizes are those of vLLM 0.33.0. The three families are classifiers in vLLM itself, so
that nothing is converted. A model of floats is served in float32, the precision that it was judged in; one with packed
weights in float16, which the kernels for those take.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from slimline import artifact, hf
from slimline.errors import ModelError
from slimline.package import Model, plain

FAMILIES = ("bert", "roberta", "xlm-roberta")
GROUP_SIZES = (32, 64, 128)
FOLDER, ARGUMENTS = "model", "vllm.yaml"


def write(model: Model, out: Path) -> None:
    """Write the folder, the arguments and the manifest of the source. Raises ModelError for what vLLM cannot load."""
    values = plain.require(model, "vLLM")
    check(model, values)
    plain.write(model, values, out / FOLDER)
    shutil.copyfile(model.path / artifact.MANIFEST, out / artifact.MANIFEST)
    (out / ARGUMENTS).write_text(readable(model, arguments(model, values)), encoding="utf-8")


def started(model: Model, out: Path) -> tuple[str, str]:
    """What to do first (nothing), and the command that starts a server on the folder."""
    return "", f"cd {shlex.quote(str(out))} && vllm serve --config {ARGUMENTS}"


def check(model: Model, values: dict[str, Any]) -> None:
    """Raise ModelError for a family or a way of packing that vLLM does not serve."""
    if values["model_type"] not in FAMILIES:
        raise ModelError(
            f"{model.ref} is a {values['model_type']} model, and of those vLLM classifies with {', '.join(FAMILIES)}. "
            "Put export.onnx after it and package that with --for triton."
        )
    packing = values.get("quantization_config")
    if packing is None:
        return
    form = f"{packing.get('quant_method')} {packing.get('format')}"
    if form != "compressed-tensors pack-quantized":
        raise ModelError(f"{model.ref} is packed as {form}, not by quantize.llmcompressor. Quantize it with that.")
    for group in (packing.get("config_groups") or {}).values():
        size = (group.get("weights") or {}).get("group_size")
        if size not in GROUP_SIZES:
            raise ModelError(
                f"{model.ref} has scales for {size} columns each, and vLLM has kernels for "
                f"{', '.join(map(str, GROUP_SIZES))}. Quantize it again with such a group_size."
            )


def arguments(model: Model, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `vllm serve`, by their long names."""
    found = {
        "model": FOLDER,
        "served-model-name": model.name,
        "runner": "pooling",
        "max-model-len": hf.max_length(model.path),
        "dtype": "float32",
    }
    if "quantization_config" in values:
        found |= {"quantization": "compressed-tensors", "dtype": "float16"}
    return found


def readable(model: Model, found: dict[str, Any]) -> str:
    """The arguments as YAML, below what they belong to."""
    import yaml

    origin = " ".join(f"{model.ref} ({model.manifest.digest})".split())
    return f"# {origin}, written by slimline. In this folder: vllm serve --config {ARGUMENTS}\n" + yaml.safe_dump(
        found, sort_keys=False, allow_unicode=True
    )
