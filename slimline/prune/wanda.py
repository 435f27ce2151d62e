"""Wanda: zero the weights that matter least to what a layer sees.

A weight w on an input x is worth |w| * ||x||, the norm over all calibration tokens (Sun et al., 2023, arXiv
2306.11695): a small weight on a loud input stays, a large one on a silent input goes. Of every row, or of every few
neighbours in it, those that are worth least become zero; nothing else changes. Every layer is measured on what the
pruned layers before it give. Needs no gradients, one layer of memory and two runs of the calibration text. Small models
have little to spare: SmolLM2-135M's perplexity goes from 48 to 121 without half of its weights, to 393 with 2:4;
prune.sparsegpt moves the weights that stay, and with 2:4 comes to 200.

Shapes: O = outputs, I = inputs, X = tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slimline import decoder, layerwise, passages, sparse
from slimline.errors import ModelError
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True


class Config(sparse.Sparsity):
    """Options of prune.wanda."""


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with zeros in the maps of all layers. Embedding and head stay whole."""
    kind = sparse.check(source, config.pattern)
    before = sparse.count(source)["sparsity"]
    tokens_NT = passages.draw(source, config)
    for layer in layerwise.walk(source, out, tokens_NT, "zeroing weights"):
        squares = layer.measure([group[0] for group in kind.readers], square_sums)
        for group in kind.readers:
            loudness_I = squares[group[0]].sqrt()
            if not loudness_I.isfinite().all():
                raise ModelError(f"{layer.name} has inputs that are not finite. Is {source} a working model?")
            for name in group:
                weight_OI = layer.weight(name)
                weight_OI[sparse.lowest(worth(weight_OI, loudness_I), config.sparsity, config.pattern)] = 0
        layer.store()
    decoder.copy_rest(source, out)
    return {**sparse.count(out), "sparsity_before": before, "calibration_tokens": float(tokens_NT.size)}


def square_sums(x_XI: torch.Tensor) -> torch.Tensor:
    """[I]: the sum over tokens of each input's square."""
    return x_XI.square().sum(dim=0)


def worth(weight_OI: torch.Tensor, loudness_I: torch.Tensor) -> torch.Tensor:
    """[O, I]: |w| * ||x||."""
    return weight_OI.abs() * loudness_I
