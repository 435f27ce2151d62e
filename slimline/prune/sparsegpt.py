"""SparseGPT: zero weights one column at a time, and let those to the right make up for each.

Of all matrices with zeros in some places, the one sought answers most like the old one on the calibration inputs X, so
least of trace((V - W) H (V - W)') with H = X' X. A weight that becomes zero is worth its square over the diagonal of
the inverse Hessian of the inputs that are still to come, and what it gave is spread over these by that inverse, as the
optimal brain surgeon does (Frantar & Alistarh, 2023, arXiv 2301.00774). One Cholesky factor holds all these inverses:
with U' U = H^-1 the one from input i on has U[i, i]^2 in its corner. Zeros are chosen `block` columns at a time, by
what the columns before have left of the weights; in a pattern, as its neighbours come.

Every layer is measured on what the pruned layers before it give. Needs one layer of memory, two runs of the calibration
text, and for each map two matrices of inputs by inputs; minutes for a small model. Half of all weights costs about half
as much quality as with prune.wanda.

Shapes: O = outputs, I = inputs, B = inputs of a block, X = tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from slimline import decoder, layerwise, passages, sparse
from slimline.errors import ModelError
from slimline.technique import Metrics

if TYPE_CHECKING:
    import torch

NEEDS = GIVES = "hf"
RESUMES = True
WHOLE = 10.0
"""The most that the Hessian is damped, in means of its diagonal: inputs then hardly make up for each other any more."""


class Config(sparse.Sparsity):
    """Options of prune.sparsegpt."""

    damp: float = Field(
        0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean; grows if singular"
    )
    block: int = Field(128, ge=8, multiple_of=8, description="columns whose zeros are chosen together")


def run(source: Path, out: Path, config: Config) -> Metrics:
    """Write the model with zeros in the maps of all layers, and weights that make up for them."""
    kind = sparse.check(source, config.pattern)
    before = sparse.count(source)["sparsity"]
    tokens_NT = passages.draw(source, config)
    damp = config.damp
    for layer in layerwise.walk(source, out, tokens_NT, "zeroing weights"):
        hessians = layer.measure([group[0] for group in kind.readers], products)
        for group in kind.readers:
            root_II, took = root(hessians.pop(group[0]), config.damp, f"{layer.name}.{group[0]}")
            damp = max(damp, took)
            for name in group:
                weight_OI = layer.weight(name)
                weight_OI.copy_(prune(weight_OI, root_II, config.sparsity, config.pattern, config.block))
        layer.store()
    decoder.copy_rest(source, out)
    return {
        **sparse.count(out),
        "sparsity_before": before,
        "damp": damp,
        "calibration_tokens": float(tokens_NT.size),
    }


def products(x_XI: torch.Tensor) -> torch.Tensor:
    """[I, I]: the sum over tokens of products of two inputs."""
    return x_XI.T @ x_XI


def root(hessian_II: torch.Tensor, damp: float, name: str = "a map") -> tuple[torch.Tensor, float]:
    """Upper triangular U with U' U = (H + damp * mean of its diagonal)^-1 in float64, and the damping that it took.

    Where H stays singular the damping grows tenfold, up to WHOLE. Raises ModelError for inputs that are not finite.
    """
    import torch

    hessian_II = hessian_II.double()
    mean = hessian_II.diagonal().mean()
    if not hessian_II.isfinite().all():
        raise ModelError(f"{name} has inputs that are not finite. Is the model whole, and does it work on this text?")
    if mean == 0:  # nothing ever enters this map, so it matters nowhere which weights go
        return torch.eye(len(hessian_II), dtype=torch.float64, device=hessian_II.device), damp
    while damp <= WHOLE:
        damped_II = hessian_II + torch.eye(len(hessian_II), dtype=torch.float64, device=hessian_II.device) * damp * mean
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        root_II, singular = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed and not singular and root_II.isfinite().all():
            return root_II, damp
        damp *= 10
    raise ModelError(
        f"what enters {name} goes together so much that nothing can be told apart. Calibrate on more text."
    )


def prune(
    weight_OI: torch.Tensor, root_II: torch.Tensor, sparsity: float, pattern: sparse.Pattern, block: int
) -> torch.Tensor:
    """[O, I]: the matrix with zeros, computed in its own type. `root_II` is U, upper triangular."""
    import torch

    new_OI, root_II, every = weight_OI.clone(), root_II.to(weight_OI), sparse.neighbours(pattern)
    for at in range(0, new_OI.shape[1], block):
        here = slice(at, at + block)
        left_OB, root_BB = new_OI[:, here], root_II[here, here]
        price_B, spread_OB = root_BB.diagonal().square(), torch.zeros_like(left_OB)
        goes_OB = torch.zeros_like(left_OB, dtype=torch.bool) if every else least(left_OB.square() / price_B, sparsity)
        for i in range(left_OB.shape[1]):
            if every and i % every[1] == 0:
                near = slice(i, i + every[1])
                goes_OB[:, near] = sparse.lowest(left_OB[:, near].square() / price_B[near], sparsity, pattern)
            spread_OB[:, i] = torch.where(goes_OB[:, i], left_OB[:, i], 0) / root_BB[i, i]
            left_OB[:, i:] -= spread_OB[:, i : i + 1] * root_BB[i, i:]
            left_OB[goes_OB[:, i], i] = 0  # what rounding has left
        new_OI[:, at + block :] -= spread_OB @ root_II[here, at + block :]
    return new_OI


def least(worth_OB: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True for the weights of a whole block that are worth least, whichever rows they are in."""
    return sparse.lowest(worth_OB.reshape(1, -1), sparsity).reshape(worth_OB.shape)
