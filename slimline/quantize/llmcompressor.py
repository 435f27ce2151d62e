"""GPTQ by llm-compressor: 4 or 8-bit weights that make up for each other's rounding, in the form that vLLM loads.

arXiv 2210.17323, by the library's maintained implementation: column by column, what a rounded weight loses on the
calibration texts is put on those not rounded yet. The matrices of the layers are quantized, in groups of columns with
one scale each; embeddings, norms, pooler and head stay as they are. Activations are not rounded, so that it saves
memory and traffic, not arithmetic. Other steps read such a model as floats (see packed.py).

llm-compressor holds transformers back to releases that training here is past: this runs in an image, or a virtual
environment, of its own (`pip install 'slimline[llm]'`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from slimline import data, hf, parity
from slimline.errors import ConfigError, ModelError
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"


class Config(parity.Guard):
    bits: int = Field(4, ge=4, le=8, multiple_of=4, description="of a weight: 4 or 8")
    group_size: int = Field(32, ge=8, le=1024, description="columns that share a scale; must divide every matrix")
    samples: int = Field(128, ge=1, description="texts that the errors are weighed on")
    damping: float = Field(0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write packed weights, config.json and the tokenizer. Raises ModelError where the answers stray too far."""
    model: Any = hf.load(source)
    tokenizer = hf.tokenizer(source, hf.max_length(source))
    matrices = quantizable(model, config.group_size)
    texts = parity.texts(Path(config.data), config.texts)
    before = hf.logits(model, tokenizer, texts)
    weigh(model, tokenizer, data.read(Path(config.data), "calibration").texts[: config.samples], source, config)
    expected = hf.logits(model, tokenizer, texts)
    save(model, source, out)
    after = hf.logits(hf.load(out), tokenizer, texts)
    again = parity.compare(expected, after)
    parity.require_equal(again, texts, 1e-4, "What was written is not what was made: report it")
    difference = parity.compare(before, after)
    parity.require_close(difference, texts, config, "Try bits=8, a smaller group_size or more samples.")
    return {
        "num_quantized_matmul": float(len(matrices)),
        "size_before_bytes": float(sum(file.stat().st_size for file in source.glob("*.safetensors"))),
        "size_bytes": float((out / "model.safetensors").stat().st_size),
        "agreement": difference.agreement,
        "kl_mean": difference.kl_mean,
        "max_abs": difference.max_abs,
    }


def quantizable(model: torch.nn.Module, group_size: int) -> list[str]:
    """The names of the layers' matrices. Raises ConfigError naming the first that groups do not fill."""
    import torch

    prefix = f"{model.base_model_prefix}.{hf.layout(model).layers}."
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    found = [(name, part) for name, part in found if name.startswith(prefix)]
    for name, part in found:
        if part.in_features % group_size:
            raise ConfigError(
                f"group_size {group_size} does not divide the {part.in_features} columns of {name}. "
                f"Ask for group_size={largest_divisor([p.in_features for _, p in found], group_size)}."
            )
    return [name for name, _ in found]


def target(model: torch.nn.Module) -> str:
    """What llm-compressor, and vLLM when it loads the result, find the layers by.

    It may begin anywhere: what transformers calls `roberta.encoder` is `bert.encoder` in vLLM.
    """
    return f"re:.*{hf.layout(model).layers.replace('.', '[.]')}[.].*"


def largest_divisor(widths: list[int], limit: int) -> int:
    """The largest number up to a limit that divides all of these."""
    return next(n for n in range(limit, 0, -1) if all(width % n == 0 for width in widths))


def weigh(model: Any, tokenizer: hf.Tokenizer, texts: list[str], source: Path, config: Config) -> None:
    """Quantize the model in place, text by text, so that nothing is padded. Raises ConfigError without the library."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # datasets forks
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ConfigError(
            f"quantize.llmcompressor needs a package that is not here ({error.name}). Install it in an environment of "
            "its own with `pip install 'slimline[llm]'`, or run the step in the image slimline-llm."
        ) from None
    arguments = QuantizationArgs(num_bits=config.bits, group_size=config.group_size, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=[target(model)], weights=arguments)
    rows = [{k: v[0].tolist() for k, v in hf.tensors(tokenizer.encode([text]), model).items()} for text in texts]
    model.config._name_or_path = str(source)  # the library asks the folder's config.json what it has in its hands
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        processor=PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast),  # type: ignore[no-untyped-call]
        recipe=GPTQModifier(config_groups={"layers": scheme}, dampening_frac=config.damping),
        num_calibration_samples=len(rows),
        max_seq_length=max(len(row["input_ids"]) for row in rows),
        batch_size=1,
        pipeline="sequential",
        shuffle_calibration_samples=False,
    )


def save(model: Any, source: Path, out: Path) -> None:
    """Packed safetensors in one file, their config.json and the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, save_compressed=True, max_shard_size="1TB")
    if not (out / "model.safetensors").is_file():
        raise ModelError(f"llm-compressor wrote no model.safetensors for {source}. Report it with the versions used.")
    (out / "model.safetensors").chmod(0o644)  # its owner's alone otherwise
    for name in hf.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
