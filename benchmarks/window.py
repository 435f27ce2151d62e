"""What sliding-window attention with sinks costs and saves: memory for keys and values, and time, by length of text.

    OMP_NUM_THREADS=1 python -m benchmarks.window MODEL TEXT [--window 1020] [--sinks 4] [--lengths 512 1024 ...]

MODEL is a folder of format hf, TEXT a data set. The model reads one long text twice, with and without a window, in
pieces of 512 tokens; at every length it then answers a few tokens one by one. Times are processor time of one thread,
which other work on the machine disturbs less than the clock. Writes window.json and window.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimline import bench, data, decoder, language, technique, window
from slimline.attention import sliding_window

PIECE, ANSWERED = 512, 12
HERE = Path(__file__).parent


def measure(model: Any, ids: Sequence[int], lengths: Sequence[int]) -> list[dict[str, float]]:
    """Bytes of the cache, seconds of reading up to each length, and the median of those an answered token takes."""
    import torch

    cache, at, reading, rows = window.cache(model), 0, 0.0, []
    bounded = hasattr(model.config, window.WINDOW)

    def read(part: Sequence[int]) -> float:
        given, start = torch.tensor([list(part)]), time.process_time()
        if bounded:
            list(window.stream(model, [given], cache))
        else:
            with torch.no_grad():
                model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.process_time() - start

    for length in lengths:
        while at < length - ANSWERED:
            part = ids[at : min(at + PIECE, length - ANSWERED)]
            reading += read(part)
            at += len(part)
        answered = [read([token]) for token in ids[at:length]]
        at = length
        rows.append(
            {
                "length": float(length),
                "cache_bytes": float(window.cached_bytes(cache)),
                "reading_s": reading,
                "answer_s": statistics.median(answered),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(found: dict[str, Any]) -> str:
    """The numbers as a page."""
    machine, instructions = found["machine"], " ".join(found["machine"]["isa"])
    whole = {row["length"]: row for row in found["whole"]}
    lines = [
        "# Sliding-window attention with sinks",
        "",
        f"{found['model']}, float32, window {found['window']} + sinks {found['sinks']}, one text; processor time of "
        f"one thread, {machine['cpu']} ({machine['cores']} cores, {instructions}), torch {machine['torch']}. "
        "Each cell: whole attention, then the window. Made by `python -m benchmarks.window`.",
        "",
        "| tokens | keys and values, MB | reading so far, s | one more token, ms |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in found["bounded"]:
        other = whole.get(row["length"])
        cells = [("cache_bytes", 1e-6, ".1f"), ("reading_s", 1, ".1f"), ("answer_s", 1e3, ".0f")]
        said = [
            f"{other[name] * by:{form}} / {row[name] * by:{form}}" if other else f"– / {row[name] * by:{form}}"
            for name, by, form in cells
        ]
        lines.append(f"| {row['length']:,.0f} | {' | '.join(said)} |")
    lines += ["", f"The model holds {found['context']:,} tokens; longer text is read by the window alone.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write both files."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model", type=Path)
    ask.add_argument("text", type=Path)
    ask.add_argument("--name", default="SmolLM2-135M-Instruct")
    ask.add_argument("--window", type=int, default=1020)
    ask.add_argument("--sinks", type=int, default=4)
    ask.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    given = ask.parse_args()
    tokenizer, texts = language.Tokenizer(given.model), data.documents(given.text, "calibration").texts
    stream = itertools.chain.from_iterable(map(tokenizer.encode, itertools.cycle(texts)))
    ids = list(itertools.islice(stream, max(given.lengths)))
    whole = decoder.load(given.model)
    context = decoder.context(whole.config.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        options = {"window": given.window, "sinks": given.sinks}
        sliding_window.run(given.model, Path(folder), technique.configure(sliding_window, options))
        bounded = decoder.load(Path(folder))
        found = {
            "model": given.name, **options, "context": context, "machine": bench.machine(),
            "bounded": measure(bounded, ids, given.lengths),
            "whole": measure(whole, ids, [length for length in given.lengths if length <= context]),
        }  # fmt: skip
    (HERE / "window.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "window.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
