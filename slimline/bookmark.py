"""Where a killed training goes on: weights, what the optimizer knows, and a few facts, in one safetensors file.

One file, moved into place when it is whole: there is the old bookmark or the new one, never half of either. Rates
follow from the step's number, and all that is drawn from it and the seed, so the number is all there is to restore of
schedule and chance: what goes on ends in the very bytes that it would have ended in.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FILE = "bookmark.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def write(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
    """Leave a bookmark in the place of the last; `facts` are plain JSON."""
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
            known = optimizer.state[weight]
            tensors |= {f"{part}.{name}": known[part].detach().cpu().contiguous() for part in MOMENTS}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{FILE}"
    save_file(tensors, unfinished, {"facts": json.dumps(facts)})
    with unfinished.open("rb") as handle:
        os.fsync(handle.fileno())
    unfinished.replace(folder / FILE)


def read(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    """Put a bookmark's weights and the optimizer's state in place and return its facts, of which `step` is one.

    Empty where there is none, or where its fact `key` is another: then it belongs to another training.
    """
    import torch
    from safetensors import safe_open

    if not (folder / FILE).is_file():
        return {}
    with safe_open(str(folder / FILE), framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        if facts["key"] != key:
            return {}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.data.copy_(file.get_tensor(f"weight.{name}"))
                steps = torch.tensor(float(facts["step"]), dtype=torch.float32, device=weight.device)
                moments = {part: file.get_tensor(f"{part}.{name}").to(weight.device) for part in MOMENTS}
                optimizer.state[weight] = {"step": steps, **moments}
    return facts
