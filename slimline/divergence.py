"""How far a student's next-token distribution is from its teacher's, over the whole vocabulary or over its top.

Forward is KL(p || q), which makes the student q cover all that the teacher p may say; reverse is KL(q || p), which
makes it say nothing that the teacher would not (Gu et al., 2023, arXiv 2306.08543); the generalized Jensen-Shannon
divergence lies between them (Agarwal et al., 2023, arXiv 2306.13649):

    JSD(p, q) = beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

Of a teacher's answer only the K likeliest tokens may be known, and the mass of all others together. Student and teacher
are then compared on K + 1 classes. By the chain rule of KL that is the whole divergence less what it is among the
others: p_rest KL(p | rest || q | rest) for forward, q_rest KL(q | rest || p | rest) for reverse. So it never says more
than the whole does, and is exact where nothing is left or where the student agrees on the rest; Jensen-Shannon falls
short by at most beta p_rest ln(1 / beta) + (1 - beta) q_rest ln(1 / (1 - beta)).

Shapes: N = tokens, V = vocabulary, K = classes that are known, C = classes compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["forward", "reverse", "jensen_shannon"]


def apart(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor, kind: Kind, beta: float = 0.5) -> torch.Tensor:
    """[N], in nats: how far q is from p. Both are logarithms of distributions, finite everywhere."""
    import torch

    if kind == "forward":
        return _kl(log_p_NC, log_q_NC)
    if kind == "reverse":
        return _kl(log_q_NC, log_p_NC)
    log_m_NC = torch.logaddexp(log_p_NC + math.log(beta), log_q_NC + math.log1p(-beta))
    return beta * _kl(log_p_NC, log_m_NC) + (1 - beta) * _kl(log_q_NC, log_m_NC)


def _kl(log_p_NC: torch.Tensor, log_q_NC: torch.Tensor) -> torch.Tensor:
    return (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(dim=-1)


def classes(logits_NV: torch.Tensor, ids_NK: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 [N, K + 1]: log-probabilities of these tokens, and of all others together, softened. [N, K] if K = V."""
    import torch

    soft_NV = logits_NV.float() / temperature
    whole_N1 = soft_NV.logsumexp(dim=1, keepdim=True)
    known_NK = soft_NV.gather(1, ids_NK)
    if ids_NK.shape[1] == logits_NV.shape[1]:
        return known_NK - whole_N1
    rest_N1 = soft_NV.scatter(1, ids_NK, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([known_NK, rest_N1], dim=1) - whole_N1


def likeliest(logits_NV: torch.Tensor, number: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [N, K], what `classes` says of them): the likeliest tokens, the likeliest first."""
    ids_NK = logits_NV.float().topk(min(number, logits_NV.shape[1]), dim=1).indices
    return ids_NK, classes(logits_NV, ids_NK, temperature)
