"""Make questions of the newspaper texts: which sentence follows?

    python examples/smollm/make_choices.py examples/smollm/newspaper.parquet examples/smollm/choices/choices.jsonl

A question is two sentences of a test document, the one that follows them, and three of about its length from other
test documents. Each document is asked about where its text allows, at most three times, its sentences used once.
Questions are put in an order that does not begin with one document's, so that the first hundred are of a hundred.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

from slimline import data

A_DOCUMENT = 3
"""Questions."""
CONTEXT = 2
"""Sentences before the one that follows."""
LENGTHS = range(40, 161)
"""Characters of a sentence that is a choice."""
CHOICES = 4
NEAR = 40
"""Sentences of other documents, nearest in length, of which the others are drawn."""
TITLES = ("Mr", "Mrs", "Ms", "Dr", "St", "Gov", "Sen", "Rep", "Gen", "Jr", "No", "vs")
END = re.compile("".join(rf"(?<!\b{title}\.)" for title in TITLES) + r"(?<!\b[A-Z]\.)(?<=[.?!'\"])\s+(?=[A-Z'\"])")


def number(text: str) -> int:
    """A number that looks drawn but depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sentences(text: str) -> list[str]:
    return [part for part in END.split(text) if part]


def questions(ids: list[str], texts: list[str]) -> list[dict[str, object]]:
    """The questions of all documents, by their place in a document and then by document."""
    split = {name: sentences(text) for name, text in zip(ids, texts)}
    known = [(name, s) for name, parts in split.items() for s in parts if len(s) in LENGTHS and s[-1] in ".?!'\""]
    made: list[list[dict[str, object]]] = [[] for _ in range(A_DOCUMENT)]
    for name, parts in split.items():
        asked = 0
        for at in range(CONTEXT, len(parts), CONTEXT + 1):
            right = parts[at]
            if asked < A_DOCUMENT and (name, right) in known:
                key = f"{name}_{asked}"
                others = {s for other, s in known if other != name and s != right}
                others = sorted(others, key=lambda s, n=len(right): (abs(len(s) - n), s))[:NEAR]
                wrong = sorted(others, key=lambda s, k=key: number(k + s))[: CHOICES - 1]
                choices = sorted([right, *wrong], key=lambda s, k=key: number(s + k))
                context = " ".join(parts[at - CONTEXT : at])
                made[asked].append({"id": key, "context": context, "choices": choices, "label": choices.index(right)})
                asked += 1
    return [question for turn in made for question in turn]


def main(source: str, out: str) -> None:
    found = data.documents(Path(source), "test")
    lines = [json.dumps(question, ensure_ascii=False) for question in questions(found.ids, found.texts)]
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
