"""A Llama out of a folder that slimline wrote, run by the kernels that PyTorch has for the form of its weights.

What the folder holds (compressed-tensors: int8 or E4M3 with scales, or packed whole numbers of 4 bits) goes to the
device as it is and is multiplied as it is; nothing is turned into wider floats beforehand:

    bf16    torch.nn.functional.linear
    fp8     torch._scaled_mm, with the scales of rows and columns inside, or multiplied into the next step
    int8    torch._int_mm, its scales multiplied into the next step; it takes no fewer than 17 rows, so there are 32
    int4    torch._weight_int4pack_mm, or made bf16 on the way and given to the first

Maps that read the same are one product (query, key and value; gate and up). Between products there are five steps;
here they are in plain PyTorch, as the meaning that fused.py's Triton kernels are checked against and for a machine
without a GPU. Inputs of fp8 and int8 are rounded with a scale for each token, as slimline.activations says.

A `Model` reads texts of one length (`read`) and goes on with one token each (`step`) at a fixed place, over keys and
values that the caller keeps: all shapes are fixed, so that either can be captured as a CUDA graph.

Shapes: B = texts, T = tokens of each, M = B T, W = width, H = heads, G = heads of keys, D = width of one, F = D / 2,
O = outputs, I = inputs, C = groups of inputs that share a scale, V = vocabulary, L = places of the cache.
"""

# Long because a product, the step before it and the step behind it must agree on where a scale is multiplied.
from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from slimline import activations, hf
from slimline.shards import Weights

Tensor = torch.Tensor
ROWS = 32
"""Rows that torch._int_mm is given at least."""
JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixed": ("self_attn.o_proj",),
    "wide": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The products of a layer, and the maps that each joins."""
FORMS = {"float-quantized": "fp8", "int-quantized": "int8", "pack-quantized": "int4"}
"""Forms of weights, by what compressed-tensors calls them."""
TYPES = {"": torch.bfloat16, "int": torch.int8, "float": torch.float8_e4m3fn}
"""Inputs of a product, by what slimline.activations calls their kind; '' for floats."""


class Matrix(NamedTuple):
    """A map as its folder has it."""

    numbers_OI: Tensor
    """bfloat16, float8_e4m3fn or int8; of 4 bits as int8 from -8 to 7."""
    scale_OC: Tensor | None
    """float32."""
    zero_OC: Tensor | None
    bits: int

    @property
    def size(self) -> int:
        """Bytes that have to be read to multiply by it: its numbers, and two or four for each scale as stored."""
        scales = 0 if self.scale_OC is None else self.scale_OC.numel() * (2 if self.bits < 8 else 4)
        return self.numbers_OI.numel() * self.bits // 8 + scales

    def floats(self) -> Tensor:
        """float32 [O, I]."""
        if self.scale_OC is None:
            return self.numbers_OI.float()
        numbers_OCN = self.numbers_OI.float().reshape(*self.scale_OC.shape, -1)
        if self.zero_OC is not None:
            numbers_OCN = numbers_OCN - self.zero_OC.float().unsqueeze(2)
        return (numbers_OCN * self.scale_OC.unsqueeze(2)).flatten(1)


# Products: what a kernel keeps of a matrix, and how it multiplies


class Product(NamedTuple):
    """What a kernel gives: numbers [M, O], of which each is still to be multiplied by its row's and column's scale."""

    numbers_MO: Tensor
    row_M1: Tensor | None = None
    column_O: Tensor | None = None

    def floats(self) -> Tensor:
        """float32 [M, O]."""
        if self.row_M1 is None or self.column_O is None:
            return self.numbers_MO.float()
        return self.numbers_MO.float() * self.row_M1 * self.column_O


class Kernel(NamedTuple):
    """A way to multiply: `keep` makes of a matrix what `multiply` takes with inputs (and their scales) in `form`."""

    name: str
    form: str
    keep: Callable[[Matrix], tuple[Any, ...]]
    multiply: Callable[..., Product]
    rows: int = 0


def _plain(matrix: Matrix) -> tuple[Any, ...]:
    return (matrix.numbers_OI,)


def _linear(x_MI: Tensor, _: Any, weight_OI: Tensor) -> Product:
    return Product(functional.linear(x_MI, weight_OI))


def _scaled(matrix: Matrix) -> tuple[Any, ...]:
    assert matrix.scale_OC is not None
    return matrix.numbers_OI, matrix.scale_OC.reshape(1, -1).contiguous()


def _fp8_inside(x_MI: Tensor, row_M1: Tensor, weight_OI: Tensor, column_1O: Tensor) -> Product:
    return Product(
        torch._scaled_mm(
            x_MI, weight_OI.T, scale_a=row_M1, scale_b=column_1O, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )


def _with_one(matrix: Matrix) -> tuple[Any, ...]:
    assert matrix.scale_OC is not None
    return matrix.numbers_OI, matrix.scale_OC.flatten(), torch.ones((), device=matrix.numbers_OI.device)


def _fp8_behind(x_MI: Tensor, row_M1: Tensor, weight_OI: Tensor, column_O: Tensor, one: Tensor) -> Product:
    numbers_MO = torch._scaled_mm(
        x_MI, weight_OI.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return Product(numbers_MO, row_M1, column_O)


def _int8(x_RI: Tensor, row_M1: Tensor, weight_OI: Tensor, column_1O: Tensor) -> Product:
    return Product(torch._int_mm(x_RI, weight_OI.T)[: len(row_M1)], row_M1, column_1O.flatten())


def _tiles(matrix: Matrix) -> tuple[Any, ...]:
    assert matrix.scale_OC is not None
    zero_OC = torch.zeros_like(matrix.scale_OC) if matrix.zero_OC is None else -matrix.zero_OC * matrix.scale_OC
    both_CO2 = torch.stack((matrix.scale_OC, zero_OC), 2).transpose(0, 1).to(torch.bfloat16).contiguous()
    size, raised_OI = matrix.numbers_OI.shape[1] // matrix.scale_OC.shape[1], matrix.numbers_OI + 8
    if matrix.numbers_OI.is_cuda:
        bytes_OJ = (raised_OI[:, ::2] << 4 | raised_OI[:, 1::2]).to(torch.uint8)
        return torch._convert_weight_to_int4pack(bytes_OJ, 8), size, both_CO2
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised_OI.int(), 8), size, both_CO2


def _int4(x_MI: Tensor, _: Any, packed: Tensor, size: int, both_CO2: Tensor) -> Product:
    multiply = torch._weight_int4pack_mm if x_MI.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
    return Product(multiply(x_MI, packed, size, both_CO2))


def halves(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits for a kernel that reads a group of an output at a time: bytes [C, O, N / 2], scales and zeros [C, O].

    A byte holds two of a group's N numbers, each 8 too high: the first half's in its low, the second half's in its
    high bits. Scales and zeros are float32; a number less its zero, times its scale, is the weight.
    """
    assert matrix.scale_OC is not None
    raised_COSN = (matrix.numbers_OI + 8).reshape(*matrix.scale_OC.shape, 2, -1).transpose(0, 1)
    bytes_CON = (raised_COSN[:, :, 0] | raised_COSN[:, :, 1] << 4).to(torch.uint8).contiguous()
    zero_OC = torch.zeros_like(matrix.scale_OC) if matrix.zero_OC is None else matrix.zero_OC.float()
    return bytes_CON, matrix.scale_OC.T.contiguous(), (zero_OC + 8).T.contiguous()


def widen(bytes_CON: Tensor, scale_CO: Tensor, zero_CO: Tensor) -> Tensor:
    """bfloat16 [O, I]: what `halves` were made of."""
    numbers_CON = torch.cat((bytes_CON & 15, bytes_CON >> 4), 2).float()
    weight_CON = (numbers_CON - zero_CO.unsqueeze(2)) * scale_CO.unsqueeze(2)
    return weight_CON.transpose(0, 1).flatten(1).to(torch.bfloat16)


def _widened(x_MI: Tensor, _: Any, *parts: Tensor) -> Product:
    if x_MI.is_cuda:
        from benchmarks import fused

        return Product(functional.linear(x_MI, fused.widen(*parts)))
    return Product(functional.linear(x_MI, widen(*parts)))


def _ours(x_MI: Tensor, _: Any, *parts: Tensor) -> Product:
    from benchmarks import fused

    return Product(fused.multiply4(x_MI, *parts))


KERNELS: dict[str, list[Kernel]] = {
    "bf16": [Kernel("linear", "", _plain, _linear)],
    "fp8": [
        Kernel("_scaled_mm, scales inside", "float", _scaled, _fp8_inside),
        Kernel("_scaled_mm, scales behind", "float", _with_one, _fp8_behind),
    ],
    "int8": [Kernel("_int_mm, scales behind", "int", _scaled, _int8, ROWS)],
    "int4": [
        Kernel("_weight_int4pack_mm", "", _tiles, _int4),
        Kernel("made bf16, then linear", "", halves, _widened),
    ],
}
"""The ways to multiply that PyTorch has, by form of the weights."""
OURS: dict[str, list[Kernel]] = {"int4": [Kernel("Triton, ours", "", halves, _ours)]}
"""Those of fused.py, for a GPU."""


# Steps between products. What is to be rounded for the next product comes out in its `form`, with a scale a row


def low(values_MI: Tensor, form: str, rows: int = 0) -> tuple[Tensor, Tensor | None]:
    """Values in the form that a product takes, with the scale [M, 1] of each row; at least `rows` of them, more are 0.

    As slimline.activations rounds.
    """
    if not form:
        return values_MI.to(torch.bfloat16), None
    values_MI = values_MI.float()
    scale_M1 = activations.scale(values_MI.abs().amax(-1, keepdim=True), form)
    steps_MI = values_MI / scale_M1
    near_MI = steps_MI.clamp(-448, 448) if form == "float" else steps_MI.round().clamp(-128, 127)
    return functional.pad(near_MI, (0, 0, 0, max(0, rows - len(near_MI)))).to(TYPES[form]), scale_M1


def enter(
    residual_MW: Tensor, product: Any, row: Any, column: Any, norm_W: Tensor, eps: float, form: str, rows: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Add a product (if there is one) to the residual, in place, and give its RMSNorm."""
    if product is not None:
        residual_MW.copy_(residual_MW.float() + Product(product, row, column).floats())
    hidden_MW = residual_MW.float()
    normed_MW = hidden_MW * torch.rsqrt(hidden_MW.square().mean(-1, keepdim=True) + eps)
    return low(normed_MW * norm_W.float(), form, rows)


def turn(
    product: Tensor, row: Any, column: Any, cos_TF: Tensor, sin_TF: Tensor, key_BGTD: Tensor, value_BGTD: Tensor,
    heads: int,
) -> Tensor:  # fmt: skip
    """Queries [B, H, T, D], turned by their place; keys, turned, and values go where they are kept, in place."""
    texts, groups, tokens, width = key_BGTD.shape
    all_BTND = Product(product, row, column).floats().reshape(texts, tokens, heads + 2 * groups, width)
    turned_BNTD, value_BNTD = all_BTND.transpose(1, 2).split([heads + groups, groups], 1)
    first, second = turned_BNTD.chunk(2, -1)
    turned_BNTD = torch.cat((first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF), -1)
    key_BGTD.copy_(turned_BNTD[:, heads:])
    value_BGTD.copy_(value_BNTD)
    return turned_BNTD[:, :heads].to(torch.bfloat16).contiguous()


def close(mixed_MI: Tensor, form: str, rows: int = 0) -> tuple[Tensor, Tensor | None]:
    """What the heads gave, for the product behind them."""
    return low(mixed_MI, form, rows)


def gate(product: Tensor, row: Any, column: Any, form: str, rows: int = 0) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up, of a product [M, 2 F'] that holds both."""
    gate_MF, up_MF = Product(product, row, column).floats().chunk(2, -1)
    return low(functional.silu(gate_MF) * up_MF, form, rows)


class Steps(NamedTuple):
    """The four steps above, or the kernels that do the same."""

    enter: Callable[..., tuple[Tensor, Tensor | None]]
    turn: Callable[..., Tensor]
    close: Callable[..., tuple[Tensor, Tensor | None]]
    gate: Callable[..., tuple[Tensor, Tensor | None]]


PLAIN = Steps(enter, turn, close, gate)


def steps(device: str) -> Steps:
    """Triton's on a GPU."""
    if device == "cpu":
        return PLAIN
    from benchmarks import fused

    return Steps(fused.enter, fused.turn, fused.close, fused.gate)


# The model


class Layer(NamedTuple):
    """Norms, and of each product what every kernel keeps of its matrix, by the kernel's name."""

    norm_before_W: Tensor
    norm_between_W: Tensor
    kept: dict[str, dict[str, tuple[Any, ...]]]


class Cache(NamedTuple):
    """Keys and values of one layer, each [B, G, L, D] bfloat16."""

    key_BGLD: Tensor
    value_BGLD: Tensor


class Model:
    """A Llama on a device, in the form of its folder. Raises ModelError for a folder that lacks a weight."""

    def __init__(self, folder: Path, device: str) -> None:
        values, weights = hf.read_config(folder), Weights(folder)
        self.device, self.steps = device, steps(device)
        self.form = form(values)
        ours = OURS.get(self.form, []) if device != "cpu" else []
        self.kernels = {kernel.name: kernel for kernel in (*KERNELS[self.form], *ours)}
        self.width, self.feed = int(values["hidden_size"]), int(values["intermediate_size"])
        self.heads, self.groups = int(values["num_attention_heads"]), int(values["num_key_value_heads"])
        self.head = self.width // self.heads
        self.eps = float(values.get("rms_norm_eps", 1e-6))
        self.base = float((values.get("rope_parameters") or values).get("rope_theta", 10_000.0))

        def floats(name: str) -> Tensor:
            return weights.raw(name).to(device, torch.bfloat16)

        self.table_VW = floats("model.embed_tokens.weight")
        self.head_VW = floats("lm_head.weight") if "lm_head.weight" in weights else self.table_VW
        self.norm_W = floats("model.norm.weight")
        self.layers: list[Layer] = []
        self.made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.size = self.operations = 0
        """Bytes of all products' matrices, and operations that one token costs in them."""
        for i in range(int(values["num_hidden_layers"])):
            kept: dict[str, dict[str, tuple[Any, ...]]] = {}
            for product, names in JOINED.items():
                whole = joined([matrix(weights, f"model.layers.{i}.{name}", device) for name in names])
                kept[product] = keep(whole, self.kernels.values())
                self.size += whole.size
                self.operations += 2 * whole.numbers_OI.numel()
            norms = (floats(f"model.layers.{i}.{n}.weight") for n in ("input_layernorm", "post_attention_layernorm"))
            self.layers.append(Layer(*norms, kept))
            weights.close()

    def angles(self, first: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, F] of the places from the first on, float32. Made once."""
        if (first, tokens) in self.made:
            return self.made[first, tokens]
        speed_F = self.base ** (-torch.arange(0, self.head, 2, device=self.device).float() / self.head)
        angle_TF = torch.arange(first, first + tokens, device=self.device).float()[:, None] * speed_F
        self.made[first, tokens] = angle_TF.cos(), angle_TF.sin()
        return self.made[first, tokens]

    def room(self, texts: int, places: int) -> list[Cache]:
        """Keys and values for so many texts and places: random, so that nothing is timed on zeros."""
        shape = (texts, self.groups, places, self.head)
        return [
            Cache(*(torch.randn(shape, dtype=torch.bfloat16, device=self.device) for _ in range(2)))
            for _ in self.layers
        ]

    def run(self, ids_BT: Tensor, cache: list[Cache], first: int, kernel: Kernel, every: bool = False) -> Tensor:
        """Logits [B, V], bfloat16, behind the last token, or [B, T, V] behind `every` one; the first is at `first`."""
        texts, tokens = ids_BT.shape
        cos_TF, sin_TF = self.angles(first, tokens)
        residual_MW = functional.embedding(ids_BT.flatten(), self.table_VW)
        last = Product(None)  # type: ignore[arg-type]  # nothing to add yet
        for layer, (key_BGLD, value_BGLD) in zip(self.layers, cache):

            def multiply(name: str, prepared: tuple[Any, Any], layer: Layer = layer) -> Product:
                return kernel.multiply(*prepared, *layer.kept[name][kernel.name])

            form, rows = kernel.form, kernel.rows
            there = slice(first, first + tokens)
            key_BGTD, value_BGTD = key_BGLD[:, :, there], value_BGLD[:, :, there]
            prepared = self.steps.enter(residual_MW, *last, layer.norm_before_W, self.eps, form, rows)
            product = multiply("qkv", prepared)
            query_BHTD = self.steps.turn(*product, cos_TF, sin_TF, key_BGTD, value_BGTD, self.heads)
            mixed_BHTD = functional.scaled_dot_product_attention(
                query_BHTD, key_BGLD, value_BGLD, is_causal=tokens > 1, enable_gqa=True
            )
            mixed_MI = mixed_BHTD.transpose(1, 2).reshape(texts * tokens, -1)
            product = multiply("mixed", self.steps.close(mixed_MI, form, rows))
            prepared = self.steps.enter(residual_MW, *product, layer.norm_between_W, self.eps, form, rows)
            last = multiply("down", self.steps.gate(*multiply("wide", prepared), form, rows))
        normed_MW, _ = self.steps.enter(residual_MW, *last, self.norm_W, self.eps, "")
        normed_BTW = normed_MW.reshape(texts, tokens, -1)
        return functional.linear(normed_BTW if every else normed_BTW[:, -1], self.head_VW)

    def read(self, ids_BT: Tensor, cache: list[Cache], kernel: Kernel, every: bool = False) -> Tensor:
        """Logits behind texts that fill the cache from its beginning to its end."""
        return self.run(ids_BT, cache, 0, kernel, every)

    def step(self, ids_B1: Tensor, cache: list[Cache], kernel: Kernel) -> Tensor:
        """Logits [B, V] behind one more token each, at the last place of the cache, all of which it looks at."""
        return self.run(ids_B1, cache, cache[0].key_BGLD.shape[2] - 1, kernel)


def keep(whole: Matrix, kernels: Iterable[Kernel]) -> dict[str, tuple[Any, ...]]:
    """What each kernel keeps of a matrix, by its name; what two of them keep in the same way is there once."""
    made = {kernel.keep: kernel.keep(whole) for kernel in kernels}
    return {kernel.name: made[kernel.keep] for kernel in kernels}


def form(values: dict[str, Any]) -> str:
    """bf16, fp8, int8 or int4, by a config.json."""
    settings = values.get("quantization_config")
    return FORMS[settings["format"]] if settings else "bf16"


def matrix(weights: Weights, name: str, device: str) -> Matrix:
    """A map out of a folder, on the device."""

    def raw(stored: str) -> Tensor:
        return weights.raw(stored).to(device)

    whole = f"{name}.weight"
    if not weights.packing.packs(whole, weights.found):
        return Matrix(raw(whole).to(torch.bfloat16), None, None, 16)
    scale_OC = raw(f"{name}.weight_scale").float()
    if whole in weights.found:
        return Matrix(raw(whole), scale_OC.reshape(len(scale_OC), -1), None, 8)
    integers, bits = weights.packing.integers(whole, raw, weights.found)
    return Matrix(integers.numbers_OI, integers.scale_OG.float(), integers.zero_OG, bits)


def joined(matrices: list[Matrix]) -> Matrix:
    """Matrices that read the same, one below the other."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    kind = first.numbers_OI.dtype
    same = torch.uint8 if kind.itemsize == 1 else kind  # bytes can be joined whatever they mean
    numbers_OI = torch.cat([one.numbers_OI.view(same) for one in matrices]).view(kind)
    scale_OC, zero_OC = (
        None if getattr(first, part) is None else torch.cat([getattr(one, part) for one in matrices])
        for part in ("scale_OC", "zero_OC")
    )
    return Matrix(numbers_OI, scale_OC, zero_OC, first.bits)
