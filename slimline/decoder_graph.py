"""A language model as a plain ONNX graph with a KV cache, and whether that graph says what the model says.

Standard operators alone, so that every runtime reads it and precision.py can type it. Inputs are input_ids [B, S],
attention_mask [B, P + S] and past_key_values.I.key and .value [B, H, P, D]; outputs logits [B, S, V] and present.I.key
and .value [B, H, P + S, D]. P may be 0: the same graph reads a prompt and then goes on token by token. Positions are
counted within the mask, so texts may be padded on either side.

Made for low precision as well: rotations are read from tables, since angles of a thousand radians have no cosine in 16
bits; what may not be seen gets -10,000, which no type makes infinite; every matrix is the second operand of a MatMul
[I, O] under its own name; a head that is the embedding is not stored again.

Shapes: B = texts, S = new tokens, P = tokens before, H = heads of keys, D = width of a head, V = vocabulary, N = rows.
"""

# Long because a form that is traced well, the tracing and the proof that both say the same belong together.
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimline import decoder, graph, parity
from slimline.errors import ModelError
from slimline.profiles import PAST

if TYPE_CHECKING:
    import onnx
    import torch

    from slimline.language import Tokenizer

FAR = -1e4
BY_KIND = ("qwen2", "qwen3", "gemma2", "gemma3_text")
"""Families that take a mask for each kind of layer."""
KEEPS_TABLES = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on the position alone, not on how long the text is."""
LONGEST = 48
"""Tokens of the texts that parity is asked on."""


def trace(model: Any, kind: decoder.Family, opset: int, longest: int) -> onnx.ModelProto:
    """The graph of a model for texts of up to `longest` tokens. Raises ModelError where the exporter cannot.

    The model is changed into a form that is traced well, and says the same.
    """
    import torch

    model.cpu().set_attn_implementation("eager")
    _plain_products(model, kind)
    _tables(model, longest)
    layers = len(model.get_submodule(kind.layers))
    heads, width = cache_shape(model.config)
    pasts = [f"{PAST}{i}.{part}" for i in range(layers) for part in ("key", "value")]
    ids_BS = torch.full((2, 3), 5)
    mask_BT = torch.ones(2, 7, dtype=torch.int64)
    mask_BT[1, :2] = 0
    open_ = torch.export.Dim.DYNAMIC
    try:
        program: Any = torch.onnx.export(
            _cached(model, layers),
            (ids_BS, mask_BT, *(torch.zeros(2, heads, 4, width) for _ in pasts)),
            dynamo=True,
            verbose=False,
            opset_version=max(opset, 18),
            input_names=["input_ids", "attention_mask", *pasts],
            output_names=["logits", *(name.replace(PAST, "present.") for name in pasts)],
            dynamic_shapes=({0: open_, 1: open_}, {0: open_, 1: open_}, tuple({0: open_, 2: open_} for _ in pasts)),
        )
        traced: onnx.ModelProto = program.model_proto
    except Exception as error:  # the exporter's own, of many kinds
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ModelError(
            f"a {model.config.model_type} model of this form cannot be exported by PyTorch {torch.__version__}: "
            f"{reason}. Serve it as it is, or quantized by what takes no graph."
        ) from None
    _name(traced)
    return traced


def cache_shape(config: Any) -> tuple[int, int]:
    """(heads of keys, width of a head)."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return heads, int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _cached(model: Any, layers: int) -> torch.nn.Module:
    """The model with its cache as plain inputs and outputs."""
    import torch

    config = model.config
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None

    class Cache:
        is_compileable = False

        def __init__(self, past: Sequence[torch.Tensor]) -> None:
            self.past, self.present = past, [*past]

        def update(
            self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            for at, new in ((2 * layer, key), (2 * layer + 1, value)):
                self.present[at] = torch.cat([self.past[at], new], dim=2)
            return self.present[2 * layer], self.present[2 * layer + 1]

        def get_seq_length(self, *_: Any) -> Any:
            return self.past[0].shape[2]

    class Cached(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor) -> Any:
            new, total = input_ids.shape[1], attention_mask.shape[1]
            places_BS = (attention_mask.cumsum(1) - 1)[:, total - new :].clamp(min=0)
            keys_T = torch.arange(total)
            queries_S1 = keys_T[total - new :].unsqueeze(1)
            before_ST = keys_T <= queries_S1

            def mask(seen_ST: torch.Tensor) -> torch.Tensor:
                seen_BST = seen_ST.unsqueeze(0) & (attention_mask.unsqueeze(1) > 0)
                return torch.where(seen_BST, 0.0, FAR).unsqueeze(1)

            near = mask(before_ST & (keys_T > queries_S1 - window)) if window else mask(before_ST)
            masks: Any = near
            if config.model_type in BY_KIND:
                masks = {"full_attention": mask(before_ST), "sliding_attention": near}
            cache = Cache(past)
            answer = self.source(
                input_ids=input_ids, attention_mask=masks, position_ids=places_BS, past_key_values=cache, use_cache=True
            )
            return (answer.logits, *cache.present)

    return Cached().eval()


def _plain_products(model: Any, kind: decoder.Family) -> None:
    """Turn every linear map into a product with a matrix [I, O]; a head that is the embedding has it on the left."""
    import torch

    class Product(torch.nn.Module):
        def __init__(self, weight_IO: torch.Tensor, bias: torch.Tensor | None) -> None:
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(weight_IO.contiguous(), requires_grad=False), bias

        def forward(self, x_BSI: torch.Tensor) -> torch.Tensor:
            y_BSO = torch.matmul(x_BSI, self.weight)
            return y_BSO if self.bias is None else y_BSO + self.bias

    class TiedHead(torch.nn.Module):
        def __init__(self, table: torch.nn.Module) -> None:
            super().__init__()
            self.table = table

        def forward(self, x_BSW: torch.Tensor) -> torch.Tensor:
            return torch.matmul(self.table.weight, x_BSW.transpose(1, 2)).transpose(1, 2)  # type: ignore[arg-type]

    embedding = model.get_submodule(kind.embedding)
    for name, module in list(model.named_modules()):
        if name == kind.head and module.weight is embedding.weight and module.bias is None:
            model.set_submodule(name, TiedHead(embedding))
        elif isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Product(module.weight.T, module.bias))
        elif type(module).__name__ == "Conv1D":
            model.set_submodule(name, Product(module.weight, module.bias))


def _tables(model: Any, longest: int) -> None:
    """Read rotations from tables of `longest` positions. Raises ModelError for those that depend on the length."""
    import torch

    class Tables(torch.nn.Module):
        def __init__(self, rotary: Any, kinds: Sequence[str]) -> None:
            super().__init__()
            places_1T = torch.arange(longest).unsqueeze(0)
            for kind in kinds:
                cos_1TD, sin_1TD = rotary(torch.zeros(1), places_1T, *([kind] if kind else []))
                self.register_buffer(f"cos{kind}", cos_1TD[0].contiguous())
                self.register_buffer(f"sin{kind}", sin_1TD[0].contiguous())

        def forward(self, x: Any, position_ids: torch.Tensor, layer_type: str = "") -> Any:
            tables = (getattr(self, f"{wave}{layer_type}") for wave in ("cos", "sin"))
            return tuple(torch.nn.functional.embedding(position_ids, table_TD) for table_TD in tables)

    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            how = getattr(module, "rope_type", "default")
            unknown = [h for h in (how.values() if isinstance(how, dict) else [how]) if h not in KEEPS_TABLES]
            if unknown:
                raise ModelError(
                    f"this model rotates by {unknown[0]}, which depends on how long a text is and cannot be exported. "
                    "Serve it as it is."
                )
            model.set_submodule(name, Tables(module, list(how) if isinstance(how, dict) else [""]))


def _name(model: onnx.ModelProto) -> None:
    """Call nodes by the module they come from, as in /model/layers.0/self_attn/q_proj/MatMul, and name open sizes."""
    taken: dict[str, int] = {}
    for node in model.graph.node:
        said = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
        scopes = re.findall(r"'([^']*)'", said)
        path = scopes[-2].removeprefix("source").strip(".") if len(scopes) > 1 else ""
        name = "/".join(["", *filter(None, [re.sub(r"\.(?!\d)", "/", path)]), node.op_type])
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith((PAST, "present.")):
            sizes = {0: "batch", 2: "past" if value.name.startswith(PAST) else "total"}
        else:
            sizes = {0: "batch", 1: "total" if value.name == "attention_mask" else "new"}
        for axis, size in sizes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = size


def prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The first tokens of texts, a few of some and up to LONGEST of others, so that batches are padded unevenly."""
    cut = [tokenizer.encode(text)[: 3 + 13 * i % (LONGEST - 2)] for i, text in enumerate(texts)]
    return [ids for ids in cut if ids]


def difference(model: Any, file: Path, prompts: Sequence[Sequence[int]], hint: str) -> parity.Difference:
    """How far a graph is from its model: on whole prompts padded on either side, and on the token after them."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = graph.session(file, options)
    heads, width = cache_shape(model.config)
    names = [value.name for value in session.get_outputs()]
    found: list[parity.Difference] = []
    for number, at in enumerate(range(0, len(prompts), parity.BATCH)):
        ids_BS, mask_BS = _padded(prompts[at : at + parity.BATCH], left=number % 2 == 0)
        past = {
            name.replace("present.", PAST): np.zeros((len(ids_BS), heads, 0, width), np.float32) for name in names[1:]
        }
        cache = None
        seen_BT = mask_BS
        for _ in range(2):
            places_BS = np.maximum(seen_BT.cumsum(1) - 1, 0)[:, -ids_BS.shape[1] :]
            with torch.inference_mode():
                said = model(
                    input_ids=torch.from_numpy(ids_BS), attention_mask=torch.from_numpy(seen_BT),
                    position_ids=torch.from_numpy(places_BS), past_key_values=cache, use_cache=True,
                )  # fmt: skip
            answers = session.run(names, {"input_ids": ids_BS, "attention_mask": seen_BT, **past})
            past = {name.replace("present.", PAST): value for name, value in zip(names[1:], answers[1:])}
            real = seen_BT[:, -ids_BS.shape[1] :] > 0
            expected_NV = said.logits.numpy()[real]
            found.append(parity.compare(expected_NV, answers[0][real], hint))
            cache = said.past_key_values
            ids_BS = said.logits.numpy()[:, -1:].argmax(axis=2)
            seen_BT = np.concatenate([seen_BT, np.ones_like(ids_BS)], axis=1)
    worst = max(range(len(found)), key=lambda i: found[i].max_abs / (found[i].scale or 1.0))
    agreement = float(np.mean([one.agreement for one in found]))
    return found[worst]._replace(agreement=agreement, worst=worst // 2 * parity.BATCH)


def _padded(prompts: Sequence[Sequence[int]], left: bool) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    longest = max(map(len, prompts))
    ids_BS, mask_BS = np.zeros((2, len(prompts), longest), np.int64)
    for row, ids in enumerate(prompts):
        where = slice(longest - len(ids), None) if left else slice(len(ids))
        ids_BS[row, where], mask_BS[row, where] = ids, 1
    return ids_BS, mask_BS
