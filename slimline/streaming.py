"""A safetensors file written piece by piece: what it begins with is known before any tensor is read."""

import json
import math

from slimline.allowlist import WIDTHS


def head(sizes: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """What a safetensors file begins with, for tensors of these (dtype, shape), which follow in this order."""
    entries, at = {}, 0
    for name, (dtype, shape) in sizes.items():
        end = at + math.prod(shape) * WIDTHS[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
