"""The steps between a Llama's products, each as one Triton kernel: what runner.py takes on a GPU.

Each does what the function of the same name in runner.py does, in float32 from load to store; there it is said what is
what. One program works on one row, so that the scale of a token is found, and used, without a second kernel.

Shapes: M = tokens of all texts, W = width, I = inputs of the product that follows, F = neurons, D = width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FORMS = {"": 0, "int": 1, "float": 2}
LOW = {"": torch.bfloat16, "int": torch.int8, "float": torch.float8_e4m3fn}


@triton.jit
def _low(values, FORM: tl.constexpr):
    """(the row as it is stored, its scale)."""
    scale = 1.0
    if FORM == 0:
        stored = values.to(tl.bfloat16)
    else:
        largest = tl.max(tl.abs(values), axis=0)
        if FORM == 1:
            scale = tl.where(largest > 0, largest / 127.5, 1.0)
            steps = (values / scale + 12582912.0) - 12582912.0  # to the nearest, ties to even, as torch rounds
            stored = tl.minimum(tl.maximum(steps, -128.0), 127.0).to(tl.int8)
        else:
            scale = tl.where(largest > 0, largest / 448.0, 1.0)
            stored = tl.minimum(tl.maximum(values / scale, -448.0), 448.0).to(tl.float8e4nv)
    return stored, scale


@triton.jit
def _enter(residual, product, row, column, norm, low, scale, width, eps,
           ADDS: tl.constexpr, SCALED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    hidden = tl.load(residual + m * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(product + m * width + at, mask=inside, other=0).to(tl.float32)
        if SCALED:
            added = added * tl.load(row + m) * tl.load(column + at, mask=inside, other=0.0)
        kept = (hidden + added).to(tl.bfloat16)
        tl.store(residual + m * width + at, kept, mask=inside)
        hidden = kept.to(tl.float32)
    mean = tl.sum(hidden * hidden, axis=0) / width
    weight = tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
    stored, found = _low(hidden * tl.rsqrt(mean + eps) * weight, FORM)
    tl.store(low + m * width + at, stored, mask=inside)
    if FORM != 0:
        tl.store(scale + m, found)


@triton.jit
def _close(mixed, low, scale, width, FORM: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    stored, found = _low(tl.load(mixed + m * width + at, mask=inside, other=0.0).to(tl.float32), FORM)
    tl.store(low + m * width + at, stored, mask=inside)
    tl.store(scale + m, found)


@triton.jit
def _gate(product, row, column, low, scale, feed, SCALED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # one program a row where a scale is to be found
    inside = at < feed
    gate = tl.load(product + 2 * m * feed + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(product + (2 * m + 1) * feed + at, mask=inside, other=0).to(tl.float32)
    if SCALED:
        by = tl.load(row + m)
        gate = gate * by * tl.load(column + at, mask=inside, other=0.0)
        up = up * by * tl.load(column + feed + at, mask=inside, other=0.0)
    stored, found = _low(gate * tl.sigmoid(gate) * up, FORM)
    tl.store(low + m * feed + at, stored, mask=inside)
    if FORM != 0:
        tl.store(scale + m, found)


@triton.jit
def _turn(product, row, column, cos, sin, query, key, value, tokens, heads, groups,
          key_b, key_g, key_t, value_b, value_g, value_t, SCALED: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    m, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = m // tokens, m % tokens
    at = tl.arange(0, HALF)
    here = head * 2 * HALF + at
    begin = product + m * (heads + 2 * groups) * 2 * HALF
    first, second = tl.load(begin + here).to(tl.float32), tl.load(begin + here + HALF).to(tl.float32)
    if SCALED:
        by = tl.load(row + m)
        first, second = first * by * tl.load(column + here), second * by * tl.load(column + here + HALF)
    if head < heads + groups:  # queries and keys are turned by their place, values are not
        c, s = tl.load(cos + t * HALF + at), tl.load(sin + t * HALF + at)
        first, second = first * c - second * s, second * c + first * s
    out = query + ((b * heads + head) * tokens + t) * 2 * HALF
    if head >= heads + groups:
        out = value + b * value_b + (head - heads - groups) * value_g + t * value_t
    elif head >= heads:
        out = key + b * key_b + (head - heads) * key_g + t * key_t
    tl.store(out + at, first.to(tl.bfloat16))
    tl.store(out + at + HALF, second.to(tl.bfloat16))


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


def _room(like: torch.Tensor, tokens: int, inputs: int, form: str, rows: int) -> tuple[Any, Any]:
    low = torch.empty(max(tokens, rows), inputs, dtype=LOW[form], device=like.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=like.device) if form else None
    return low, scale


def enter(
    residual_MW: Any, product: Any, row: Any, column: Any, norm_W: Any, eps: float, form: str, rows: int = 0
) -> tuple[Any, Any]:
    """See runner.enter."""
    tokens, width = residual_MW.shape
    low, scale = _room(residual_MW, tokens, width, form, rows)
    block = triton.next_power_of_2(width)
    _enter[(tokens,)](
        residual_MW, product, row, column, norm_W, low, scale, width, eps,
        product is not None, row is not None, FORMS[form], block, num_warps=_warps(block),
    )  # fmt: skip
    return low, scale


def close(mixed_MI: Any, form: str, rows: int = 0) -> tuple[Any, Any]:
    """See runner.close."""
    if not form:
        return mixed_MI, None
    tokens, width = mixed_MI.shape
    low, scale = _room(mixed_MI, tokens, width, form, rows)
    block = triton.next_power_of_2(width)
    _close[(tokens,)](mixed_MI, low, scale, width, FORMS[form], block, num_warps=_warps(block))
    return low, scale


def gate(product: Any, row: Any, column: Any, form: str, rows: int = 0) -> tuple[Any, Any]:
    """See runner.gate."""
    tokens, feed = product.shape[0], product.shape[1] // 2
    low, scale = _room(product, tokens, feed, form, rows)
    block = triton.next_power_of_2(feed) if form else 1024
    _gate[(tokens, triton.cdiv(feed, block))](
        product, row, column, low, scale, feed, row is not None, FORMS[form], block, num_warps=_warps(block)
    )
    return low, scale


def turn(
    product: Any, row: Any, column: Any, cos_TF: Any, sin_TF: Any, key_BGTD: Any, value_BGTD: Any, heads: int
) -> Any:
    """See runner.turn."""
    texts, groups, tokens, width = key_BGTD.shape
    query_BHTD = torch.empty(texts, heads, tokens, width, dtype=torch.bfloat16, device=product.device)
    _turn[(texts * tokens, heads + 2 * groups)](
        product, row, column, cos_TF, sin_TF, query_BHTD, key_BGTD, value_BGTD, tokens, heads, groups,
        *key_BGTD.stride()[:3], *value_BGTD.stride()[:3], row is not None, width // 2, num_warps=1,
    )  # fmt: skip
    return query_BHTD


@triton.jit
def _widen(numbers, scale, zero, weight, outputs, groups, SIZE: tl.constexpr, ROWS: tl.constexpr):
    c, o = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at, there = tl.arange(0, SIZE // 2), o < outputs
    place = c.to(tl.int64) * outputs + o
    both = tl.load(numbers + place[:, None] * (SIZE // 2) + at[None, :], mask=there[:, None], other=0)
    by = tl.load(scale + place, mask=there, other=0.0)[:, None]
    less = tl.load(zero + place, mask=there, other=0.0)[:, None]
    out = weight + (o.to(tl.int64)[:, None] * groups + c) * SIZE + at[None, :]
    tl.store(out, (((both & 15).to(tl.float32) - less) * by).to(tl.bfloat16), mask=there[:, None])
    tl.store(out + SIZE // 2, (((both >> 4).to(tl.float32) - less) * by).to(tl.bfloat16), mask=there[:, None])


def widen(bytes_CON: torch.Tensor, scale_CO: torch.Tensor, zero_CO: torch.Tensor) -> torch.Tensor:
    """See runner.widen."""
    groups, outputs, half = bytes_CON.shape
    weight_OI = torch.empty(outputs, groups * half * 2, dtype=torch.bfloat16, device=bytes_CON.device)
    _widen[(groups, triton.cdiv(outputs, 32))](bytes_CON, scale_CO, zero_CO, weight_OI, outputs, groups, 2 * half, 32)
    return weight_OI


@triton.jit
def _multiply4(x, numbers, scale, zero, out, tokens, outputs, inputs, each,
               HALF: tl.constexpr, OUT: tl.constexpr, TOKENS: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    at = tl.arange(0, HALF)
    there, asked = o < outputs, m < tokens
    first = tl.program_id(1) * each
    total = tl.zeros((OUT, TOKENS), tl.float32)
    for c in range(first, first + each):
        place = c * outputs + o
        both = tl.load(numbers + place[:, None] * HALF + at[None, :], mask=there[:, None], other=0).to(tl.int16)
        by = tl.load(scale + place, mask=there, other=0.0)
        less = tl.load(zero + place, mask=there, other=0.0) + 128.0
        begin = x + m[None, :] * inputs + c * 2 * HALF + at[:, None]
        low = tl.load(begin, mask=asked[None, :], other=0.0)
        high = tl.load(begin + HALF, mask=asked[None, :], other=0.0)
        # 0x4300 is 128 in bfloat16, and its last four bits count on from there: no conversion is needed
        part = tl.dot(((both & 15) | 0x4300).to(tl.bfloat16, bitcast=True), low)
        part = tl.dot((((both >> 4) & 15) | 0x4300).to(tl.bfloat16, bitcast=True), high, part)
        heard = tl.sum(low.to(tl.float32) + high.to(tl.float32), axis=0)
        total += (part - less[:, None] * heard[None, :]) * by[:, None]
    where = out + m[None, :] * outputs + o[:, None]
    if ADDS:
        tl.atomic_add(where, total, mask=there[:, None] & asked[None, :], sem="relaxed")
    else:
        tl.store(where, total, mask=there[:, None] & asked[None, :])


PROGRAMS = 528
"""Four for each multiprocessor of a Hopper GPU: with fewer, memory would not be kept busy."""


def multiply4(x_MI: torch.Tensor, bytes_CON: torch.Tensor, scale_CO: torch.Tensor, zero_CO: torch.Tensor) -> Any:
    """float32 [M, O]: inputs times a matrix of 4 bits (runner.halves), whose bytes are read once for 64 tokens.

    Numbers are multiplied as bfloat16s 128 too high; what that adds, and the zero, come off a group's sum, which then
    gets its scale. Where outputs alone make too few programs, groups are shared out and their sums added.
    """
    (tokens, inputs), (groups, outputs, half) = x_MI.shape, bytes_CON.shape
    at_once = min(64, max(16, triton.next_power_of_2(tokens)))
    tiles, blocks = triton.cdiv(outputs, 64), triton.cdiv(tokens, at_once)
    asked = max(1, PROGRAMS // (tiles * blocks))
    shares = max(n for n in range(1, groups + 1) if groups % n == 0 and n <= asked)
    make = torch.zeros if shares > 1 else torch.empty
    out_MO = make(tokens, outputs, dtype=torch.float32, device=x_MI.device)
    _multiply4[(tiles, shares, blocks)](
        x_MI, bytes_CON, scale_CO, zero_CO, out_MO, tokens, outputs, inputs, groups // shares,
        half, 64, at_once, shares > 1, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out_MO
