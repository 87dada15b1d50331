"""Probabilities s to start from when some units are known to matter more than others."""

import math
from collections.abc import Callable

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
        def s(place: float) -> Tensor:
            return FLOOR + (1 - 2 * FLOOR) * torch.sigmoid((x - place) / temperature)

        low, high = float(x.min()) - 40 * temperature, float(x.max()) + 40 * temperature
        return s(_root(lambda place: float(s(place).sum()) - within, low, high, 1e-9 * within))

    within = min(max(budget, n * FLOOR), n * (1 - FLOOR))  # what s can sum to
    share = explore * budget
    spread = max(float(x.max() - x.min()), 1e-6)
    cold, hot = math.log(1e-4 * spread), math.log(1e2 * spread)

    def beyond(heat: float) -> float:
        return float(at(math.exp(heat))[outside].sum()) - share

    if beyond(hot) <= 0:
        return uniform
    return at(math.exp(_root(beyond, cold, hot, 1e-5 * share) if beyond(cold) < 0 else cold)).float()


def _root(f: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Where a monotonic f is within `tolerance` of 0, between `low` and `high`, where its signs differ.

    The Illinois method: regula falsi that halves the value at an end which stays twice (Dowell & Jarratt 1971).
    """
    at_low, at_high, side, x = f(low), f(high), 0, low
    for _ in range(200):
        x = (low * at_high - high * at_low) / (at_high - at_low)
        value = f(x)
        if abs(value) <= tolerance or not min(low, high) < x < max(low, high):
            break
        if (value > 0) == (at_high > 0):
            high, at_high = x, value
            at_low, side = (at_low / 2 if side == 1 else at_low), 1
        else:
            low, at_low = x, value
            at_high, side = (at_high / 2 if side == -1 else at_high), -1
    return x
