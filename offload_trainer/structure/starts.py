"""Probabilities s to start from when some units are known to matter more than others."""

import torch
from torch import Tensor

FLOOR = 1e-3
"""Least distance of s from 0 and 1, where it could never move again."""


def polarised(
    scores: Tensor,  # (n,), not negative
    budget: float,  # in (0, n): the sum of s
    explore: float,  # in (0, 1)
) -> Tensor:  # (n,) float32 in (0, 1)
    """s as a logistic function of log score: near 1 for what matters, near 0 for what does not, even where in doubt.

    Its place is such that s sums to `budget`. Its steepness is such that the share `explore` of a subnet's units is
    expected to lie outside the round(budget) units of largest score; as much as a uniform s has, where that is less.
    Raises ValueError for scores that are negative or not finite.
    """
    if not bool(scores.isfinite().all()) or bool((scores < 0).any()):
        raise ValueError("scores must be finite and not negative")
    n = scores.numel()
    uniform = torch.full((n,), min(max(budget / n, FLOOR), 1 - FLOOR))
    positive = scores[scores > 0]
    if positive.numel() == 0:
        return uniform
    x = scores.double().clamp(min=float(positive.min()) / 2).log()  # units that do nothing come last
    outside = torch.ones(n, dtype=torch.bool)
    outside[scores.argsort(descending=True, stable=True)[: max(1, round(budget))]] = False

    def at(temperature: float) -> Tensor:
        low, high = float(x.min()) - 40 * temperature, float(x.max()) + 40 * temperature
        s = uniform.double()
        for _ in range(80):  # bisection on the place: the sum falls as it rises
            place = (low + high) / 2
            s = FLOOR + (1 - 2 * FLOOR) * torch.sigmoid((x - place) / temperature)
            low, high = (place, high) if float(s.sum()) > budget else (low, place)
        return s

    spread = max(float(x.max() - x.min()), 1e-6)
    cold, hot = 1e-4 * spread, 1e2 * spread
    if float(at(hot)[outside].sum()) <= explore * budget:
        return uniform
    for _ in range(50):  # bisection on the logarithm of the temperature: the share outside rises with it
        middle = (cold * hot) ** 0.5
        cold, hot = (middle, hot) if float(at(middle)[outside].sum()) <= explore * budget else (cold, middle)
    return at(cold).float()
