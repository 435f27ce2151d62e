"""Encoders in PyTorch: load, answer, save. The only reader of folders of format hf.

A model is built from its config.json and then given the weights of its safetensors file, so nothing foreign runs and
nothing is looked up on a network. Physically pruned models need no format of their own: the shapes in the file are the
truth, and each layer is cut to them (heads = rows / width of a head).

Shapes: B = texts, T = tokens of the longest, L = labels.
"""

# Long because reading a model, cutting it to the shapes in its file and answering with it share one table of layouts.
from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline import packed, processor
from slimline.errors import ModelError

if TYPE_CHECKING:
    import torch

Floats = np.ndarray[Any, np.dtype[Any]]
Batch = dict[str, np.ndarray[Any, np.dtype[np.int64]]]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What a tokenizer gives, and so all that a graph may ask for."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its layers, and the linear maps of one layer."""

    layers: str
    query: str
    key: str
    value: str
    mixed: str
    """The map after the attention, whose columns are heads."""
    up: str
    down: str
    settled: str
    """The first module after the attention has mixed the tokens: from here on each token goes its own way."""


BERT = Layout(
    "encoder.layer",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "attention.output",
)
DISTILBERT = Layout(
    "transformer.layer",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
    "sa_layer_norm",
)
LAYOUTS = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "electra": BERT, "distilbert": DISTILBERT}


class Tokenizer:
    """Texts to padded arrays, by the tokenizers library alone."""

    def __init__(self, folder: Path, max_length: int) -> None:
        from tokenizers import Tokenizer as Fast

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder} has no tokenizer.json. Save the model with its fast tokenizer beside it.")
        try:
            self.fast = Fast.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file} cannot be read: {error}. Save the tokenizer again.") from None
        self.pad = self.fast.token_to_id(_pad_token(folder)) or 0
        found = (self.fast.token_to_id(name) for name in ("[MASK]", "<mask>", "[UNK]", "<unk>"))
        self.mask = next((number for number in found if number is not None), self.pad)
        self.max_length = max_length
        self.fast.enable_truncation(max_length)
        self.fast.no_padding()

    def encode(self, texts: Sequence[str], multiple: int = 1) -> Batch:
        """int64 arrays [B, T] input_ids, attention_mask and token_type_ids, padded on the right to the longest.

        T is a multiple of `multiple`, or the length at which texts are cut.
        """
        found = self.fast.encode_batch_fast(list(texts))
        ids = [encoding.ids for encoding in found]
        types = [encoding.type_ids for encoding in found]
        width = max((len(row) for row in ids), default=0)
        width = max(width, min(-(-width // multiple) * multiple, self.max_length))
        ids_BT = np.full((len(ids), width), self.pad, dtype=np.int64)
        mask_BT = np.zeros((len(ids), width), dtype=np.int64)
        types_BT = np.zeros((len(ids), width), dtype=np.int64)
        for i, row in enumerate(ids):
            ids_BT[i, : len(row)] = row
            mask_BT[i, : len(row)] = 1
            types_BT[i, : len(row)] = types[i]
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": types_BT}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special ones included, after truncation."""
        return [len(encoding.ids) for encoding in self.fast.encode_batch_fast(list(texts))]


def _pad_token(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    token = json.loads(file.read_text(encoding="utf-8")).get("pad_token") if file.is_file() else None
    return str(token.get("content") if isinstance(token, dict) else token or "[PAD]")


def tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The tokenizer of a model, cutting texts at `max_length` tokens. Imports neither torch nor transformers."""
    return Tokenizer(folder, max_length)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json. Give the folder of a whole Hugging Face model.")
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelError(f"{file} is not JSON. Save the model again.") from None
    return values


def device() -> str:
    """The best device there is."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16() -> bool:
    """Whether the GPU multiplies bf16 in hardware, or the processor in matrix tiles (AMX)."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return processor.this().has("amx_bf16")


def load(folder: Path, labels: Sequence[str] | None = None, seed: int = 0) -> torch.nn.Module:
    """A sequence classifier in evaluation mode on the best device, in float32.

    With `labels`, a model without a head gets a fresh one, seeded. Raises ModelError if a head is there that does not
    fit the labels, if weights are missing, or if the family is not known.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    values = read_config(folder)
    family = str(values.get("model_type"))
    if family not in LAYOUTS:
        raise ModelError(f"{folder} is a {family} model. This version takes {', '.join(LAYOUTS)}.")
    names = list(labels) if labels else _labels(values)
    values |= {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    packing = values.pop("quantization_config", None)
    weights = _weights(folder)
    if packing:
        weights = packed.unpack(weights, packing, str(folder))
    config = AutoConfig.for_model(**values)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    prefix = model.base_model_prefix + "."
    known = model.state_dict()
    weights = {prefix + k if k not in known and prefix + k in known else k: v for k, v in weights.items()}
    _check_head(weights, len(names), folder, fresh=labels is not None)
    _cut_to_shapes(model, weights, LAYOUTS[family], prefix)
    missing, _ = model.load_state_dict(weights, strict=False)
    lost = [k for k in missing if k.startswith(prefix) and "pooler" not in k and "position_ids" not in k]
    if lost or (missing and labels is None):
        raise ModelError(f"{folder} lacks weights: {', '.join((lost or missing)[:3])}. Is the checkpoint whole?")
    return model.float().eval().to(device())  # type: ignore[no-any-return]


def _labels(values: dict[str, Any]) -> list[str]:
    table = values.get("id2label") or {}
    return [str(table[key]) for key in sorted(table, key=int)] or ["0", "1"]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no safetensors file. Save the model with safe_serialization=True.")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= load_file(file)
    return weights


def _check_head(weights: dict[str, torch.Tensor], num_labels: int, folder: Path, fresh: bool) -> None:
    for key in ("classifier.weight", "classifier.out_proj.weight"):
        if key in weights and weights[key].shape[0] != num_labels:
            raise ModelError(
                f"{folder} has a head for {weights[key].shape[0]} labels but the data has {num_labels}. "
                "Bring in the bare encoder, or data with the labels of the head."
            )
    if not fresh and not any(key.startswith("classifier") for key in weights):
        raise ModelError(f"{folder} has no classification head. Fit it to the task first: train.finetune.")


def layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of an encoder, first to last."""
    layout = LAYOUTS[model.config.model_type]  # type: ignore[union-attr,index]
    return model.base_model.get_submodule(layout.layers)  # type: ignore[union-attr,return-value]


def layout(model: torch.nn.Module) -> Layout:
    """Where this model keeps the maps of a layer."""
    return LAYOUTS[model.config.model_type]  # type: ignore[union-attr,index]


@contextmanager
def first_token_only(model: torch.nn.Module) -> Iterator[None]:
    """Within it the last layer, once its attention has mixed the tokens, works on the first one alone.

    Answers and gradients are the same, since every head here reads the first token and no other; a sixth of the work
    of a six-layer model, and nearly half of a pruned one's, falls away. The last hidden state is then [B, 1, W].
    """
    last = list(layers(model))[-1]
    hook = last.get_submodule(layout(model).settled).register_forward_pre_hook(
        lambda module, inputs: tuple(x_BTW[:, :1] for x_BTW in inputs)
    )
    try:
        yield
    finally:
        hook.remove()


def head_width(model: torch.nn.Module) -> int:
    """Columns of one attention head."""
    config: Any = model.config
    return int(config.hidden_size // config.num_attention_heads)


def _cut_to_shapes(model: torch.nn.Module, weights: dict[str, torch.Tensor], layout: Layout, prefix: str) -> None:
    """Replace every linear map of a layer whose size in the file is another."""
    import torch

    for i, layer in enumerate(layers(model)):
        for name in (layout.query, layout.key, layout.value, layout.mixed, layout.up, layout.down):
            weight = weights.get(f"{prefix}{layout.layers}.{i}.{name}.weight")
            if weight is None or weight.shape == layer.get_submodule(name).weight.shape:
                continue
            rows, columns = weight.shape
            layer.set_submodule(name, torch.nn.Linear(columns, rows))


def save(model: torch.nn.Module, source: Path, out: Path) -> None:
    """Write safetensors and config.json, and the tokenizer files of `source` as they are."""
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if "position_ids" not in k}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config: Any = model.config
    values = {k: v for k, v in config.to_dict().items() if k != "transformers_version" and not k.startswith("_")}
    values["architectures"] = [type(model).__name__]
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    (out / "config.json").write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def max_length(folder: Path) -> int:
    """Tokens at which texts are cut: what training wrote down, else at most 512 and what the positions allow."""
    values = read_config(folder)
    positions = int(values.get("max_position_embeddings") or 512)
    if "roberta" in str(values.get("model_type")):  # it counts positions from behind its padding token
        positions -= int(values.get("pad_token_id") or 0) + 1
    return int(values.get("slimline_max_length") or min(512, positions))


def tensors(batch: Batch, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A batch as the model takes it, on its device: distilbert has no token types, roberta only one."""
    import torch

    config: Any = model.config
    given = {k: torch.from_numpy(v).to(config_device(model)) for k, v in batch.items()}
    if getattr(config, "type_vocab_size", 0) < 1 or config.model_type == "distilbert":
        del given["token_type_ids"]
    elif config.type_vocab_size == 1:
        given["token_type_ids"].zero_()
    return given


def config_device(model: torch.nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indexes in batches of like length, longest first, so that little is padded and memory shows its peak at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for at in range(0, len(order), batch_size):
        yield order[at : at + batch_size]


def logits(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    batch_size: int = 64,
    watch: Callable[[list[list[int]]], Iterator[list[int]]] | None = None,
) -> Floats:
    """float32 [B, L], in the order of the texts. `watch` may wrap the batches, to show progress."""
    import torch

    model.eval()
    batches = list(by_length(tokenizer.lengths(texts), batch_size))
    answers: Floats | None = None
    with torch.inference_mode():
        for rows in watch(batches) if watch else batches:
            found = model(**tensors(tokenizer.encode([texts[i] for i in rows]), model)).logits.float().cpu().numpy()
            if answers is None:
                answers = np.zeros((len(texts), found.shape[1]), dtype=np.float32)
            answers[rows] = found
    config: Any = model.config
    return answers if answers is not None else np.zeros((0, config.num_labels), dtype=np.float32)
