"""Rotations that spread what stands out: Hadamard matrices of the sizes that models have, or drawn at random.

A Hadamard matrix holds only +1 and -1 and its rows are orthogonal: every coordinate of what it turns is a mix of
all in equal parts. Orders are 2^k times one that Paley's constructions give: q + 1 for a prime q = 3 mod 4, or
2 (q + 1) for a prime q = 1 mod 4 (Paley, 1933). That covers the widths of the usual models, such as 576 = 16 * 36.

Shapes: n = the size of what is turned, m = the order of the Paley part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimline.errors import ConfigError

Floats = np.ndarray[Any, np.dtype[np.float64]]


def matrix(size: int, form: str, seed: int) -> Floats:
    """An orthogonal float64 [n, n], by seed: a Hadamard matrix with the signs of its rows drawn, or a random one.

    Raises ConfigError if there is no Hadamard matrix of that size here.
    """
    draw = np.random.default_rng([seed, size])
    if form == "hadamard":
        signed: Floats = hadamard(size) * draw.choice((-1.0, 1.0), size=(size, 1)) / np.sqrt(size)
        return signed
    turned, triangle = np.linalg.qr(draw.standard_normal((size, size)))
    whole: Floats = turned * np.sign(np.diag(triangle))  # of all orthogonal matrices none is then likelier than others
    return whole


def hadamard(size: int) -> Floats:
    """float64 [n, n] of +1 and -1 with orthogonal rows. Raises ConfigError if none of that size is built here."""
    doubled, part = 1, size
    while part > 2 and part % 2 == 0 and _paley_prime(part) is None:
        doubled, part = doubled * 2, part // 2
    found = np.ones((1, 1)) if part == 1 else np.array([[1.0, 1.0], [1.0, -1.0]]) if part == 2 else paley(part)
    if found is None:
        raise ConfigError(f"there is no Hadamard matrix of size {size} here. Ask for form='random'.")
    while doubled > 1:
        found, doubled = np.block([[found, found], [found, -found]]), doubled // 2
    return found


def paley(order: int) -> Floats | None:
    """The Hadamard matrix [m, m] that a prime gives by Paley's first or second construction; None if none does."""
    prime = _paley_prime(order)
    if prime is None:
        return None
    squares = {i * i % prime for i in range(1, prime)}
    sign = np.array([0.0, *(1.0 if i in squares else -1.0 for i in range(1, prime))])
    residues = sign[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    edge = np.ones((1, prime))
    if prime % 4 == 3:
        whole: Floats = np.block([[np.zeros((1, 1)), edge], [-edge.T, residues]]) + np.eye(order)
        return whole
    conference = np.block([[np.zeros((1, 1)), edge], [edge.T, residues]])
    twice: Floats = np.kron(conference, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(
        np.eye(prime + 1), [[1.0, -1.0], [-1.0, -1.0]]
    )
    return twice


def _paley_prime(order: int) -> int | None:
    """The prime from which a Hadamard matrix of this order is built."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and prime % 4 == remainder and _is_prime(prime):
            return prime
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
