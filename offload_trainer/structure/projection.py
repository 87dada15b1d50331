"""Euclidean projection of probabilities onto their box and budget."""

import torch
from torch import Tensor


def project(
    s: Tensor,  # (n,), finite
    budget: float,  # >= 0, units
) -> Tensor:  # (n,), dtype of s
    """The point of {0 <= s <= 1, sum(s) <= budget} nearest to `s`.

    By the KKT conditions of min |x - s|^2 it is clamp(s - v, 0, 1), v >= 0 being the multiplier of the
    budget: 0 where clamp(s, 0, 1) is feasible already, else the root of sum(clamp(s - v, 0, 1)) = budget.
    That sum is linear in v between the 2n edges s_i - 1 (where unit i leaves 1) and s_i (where it reaches 0),
    so sorting them gives v without an iteration. Works in float64; the result is rounded once, to the
    dtype of `s`.
    """
    clamped = s.clamp(0, 1)
    if clamped.sum(dtype=torch.float64) <= budget:
        return clamped
    x, n = s.double(), s.numel()
    edges, order = torch.cat([x - 1, x]).sort()
    moving = torch.where(order < n, 1, -1).cumsum(0)[:-1]  # units between 0 and 1, right of each edge
    total = n - (moving * edges.diff()).cumsum(0)  # the sum at edges 1, 2, ...; it is n at edge 0, and falls
    # v lies between the last edge where the sum exceeds the budget and the next: step back from the latter.
    j = min(int((total > budget).sum()), total.numel() - 1)  # rounding must not look beyond the last edge
    v = edges[j + 1] - (budget - total[j]) / moving[j]
    return (x - v).clamp(0, 1).to(s.dtype)
