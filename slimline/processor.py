"""What this machine's processor is and can do, as its kernel says in /proc/cpuinfo."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple


class Processor(NamedTuple):
    """The first one of a machine; the others are alike."""

    name: str
    """Empty where the kernel does not say."""
    flags: frozenset[str]
    """The kernel's names for what it has, instruction sets among them."""

    def has(self, *any_of: str) -> bool:
        """Whether it has any one of these flags."""
        return not self.flags.isdisjoint(any_of)


def read(text: str) -> Processor:
    """The first processor in the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""
    return Processor(fields.get("model name", ""), frozenset(flags.split()))


@cache
def this() -> Processor:
    """That of this machine; without a name or a flag on a system that has no /proc."""
    file = Path("/proc/cpuinfo")
    return read(file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "")
