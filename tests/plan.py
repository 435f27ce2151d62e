"""What an engine of TensorRT for RTX says of itself, read from its bytes.

Without a GPU the runtime opens no engine (it asks for a CUDA stream first), so its own inspector cannot be used here.
This reads what version 1.7.1 writes: a header, the profiles' shapes as tagged numbers, the compiled program as text.
"""

import re
import struct

CAPABILITIES = {"8.0": 2, "8.6": 4, "8.9": 8, "12.0": 16, "12.1": 32}
"""Bits of the header's mask, found by building for one at a time."""
SHAPE = rb"\x07\x80\x01\x00.{4}\x01\x80\x09\x80\x01\x00(.{8})((?:(?!\xa6\x7f).)*)\xa6\x7f"
TRIPLE = re.compile(rb"\x59\x80\x01\x00\x03\x00{7}" + 3 * SHAPE, re.DOTALL)


def version(plan: bytes) -> str:
    assert plan[:4] == b"vtrt"
    return ".".join(str(n) for n in plan[24:28])


def capabilities(plan: bytes) -> set[str]:
    (mask,) = struct.unpack_from("<I", plan, 32)
    return {name for name, bit in CAPABILITIES.items() if mask & bit}


def profiles(plan: bytes) -> list[tuple[tuple[int, ...], ...]]:
    """(min, opt, max) of every input of every profile, in the order of profiles and then of inputs."""
    found = []
    for match in TRIPLE.finditer(plan):
        sizes = [struct.unpack("<q", size)[0] for size in match.groups()[::2]]
        found.append(tuple(struct.unpack(f"<{n}q", raw) for n, raw in zip(sizes, match.groups()[1::2], strict=True)))
    return found


def types(plan: bytes) -> dict[str, str]:
    """The type of every tensor of the compiled program, by name. Those of a second profile are numbered apart."""
    lines = re.findall(rb"\n  tensor=\{([^\n]*)\}", plan)
    pairs = (re.search(rb'name="([^"]*)".* type=(\w+)', line) for line in lines)
    return {m.group(1).decode(): m.group(2).decode() for m in pairs if m}


def operands(plan: bytes, node: str) -> set[str]:
    """The types of what enters the compiled operations that a node of the graph became part of."""
    known, found = types(plan), set()
    for line in re.findall(rb"\n  (?:fully_connected|runtime_fusion)=\{([^\n]*)\}", plan):
        text = line.decode("latin-1")
        if f"[ONNX Layer: {node}]" in text:
            inputs = re.search(r'input(?:_args)?=\{((?: ?"[^"]*")*)', text)
            names = re.findall(r'"([^"]*)"', inputs.group(1)) if inputs else []
            found |= {known.get(name.removesuffix("^deref"), "") for name in names if "_alpha" not in name}
    return found - {""}
