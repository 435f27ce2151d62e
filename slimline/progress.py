"""What a step tells whoever watches: one JSON line an event, in the file that SLIMLINE_PROGRESS names.

A step may run in another process or container, so its progress is written, not drawn. Events: start, progress, end and
error, and passed for a step that has nothing to do; `launch` reads them and `cli` draws them. Without the variable
nothing is written.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def emit(event: str, step: str, **fields: Any) -> None:
    """Append one event. A line is written in one call, so that two steps never mix theirs."""
    path = os.environ.get("SLIMLINE_PROGRESS")
    if path:
        line = json.dumps({"event": event, "step": step, "at": time.time(), **fields}) + "\n"
        with Path(path).open("a", encoding="utf-8") as handle:
            handle.write(line)
