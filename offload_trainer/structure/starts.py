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

    within = min(max(budget, n * FLOOR), n * (1 - FLOOR))  # what s can sum to
    share = explore * budget
    spread = max(float(x.max() - x.min()), 1e-6)
    cold, hot = math.log(1e-4 * spread), math.log(1e2 * spread)
    curve = _Curve(x, within)

    def beyond(heat: float) -> tuple[float, float]:  # and its slope
        s = curve.at(heat)
        return float(s[outside].sum()) - share, curve.slope(outside)

    if beyond(hot)[0] <= 0:
        return uniform
    return curve.at(_root(beyond, cold, hot, (cold + hot) / 2, 1e-5 * share, rising=True)).float()


class _Curve:
    """s = FLOOR + (1 − 2 FLOOR) σ((x − place) / temperature), with the place at which it sums to `within`."""

    def __init__(self, x: Tensor, within: float):
        self._x, self._within, self._place = x, within, float(x.median())
        self._u = self._weight = x

    def at(self, heat: float) -> Tensor:
        """At a temperature of e^heat."""
        temperature = math.exp(heat)

        def excess(place: float) -> tuple[float, float]:  # and its slope
            self._u = (self._x - place) / temperature
            share = torch.sigmoid(self._u)
            self._weight = share * (1 - share)
            scale, total = 1 - 2 * FLOOR, float(share.sum())
            return len(share) * FLOOR + scale * total - self._within, -scale * float(self._weight.sum()) / temperature

        low, high = float(self._x.min()) - 40 * temperature, float(self._x.max()) + 40 * temperature
        start = min(max(self._place, low), high)
        self._place = _root(excess, low, high, start, 1e-9 * self._within, rising=False)
        return FLOOR + (1 - 2 * FLOOR) * torch.sigmoid(self._u)

    def slope(self, units: Tensor) -> float:
        """d/d heat of the sum of s over some units, where it was asked for last: the place moves along."""
        moved, weight = self._u * self._weight, self._weight
        mean = float(moved.sum()) / max(float(weight.sum()), 1e-300)
        return (1 - 2 * FLOOR) * (mean * float(weight[units].sum()) - float(moved[units].sum()))


def _root(
    f: Callable[[float], tuple[float, float]], low: float, high: float, start: float, tolerance: float, *, rising: bool
) -> float:
    """Where a monotonic f, which returns its slope too, is within `tolerance` of 0, or nearest, from `low` to `high`.

    Newton's method, and bisection where it would leave the interval or would not halve its step.
    """
    x, last = start, high - low
    for _ in range(200):
        value, slope = f(x)
        if abs(value) <= tolerance:
            break
        low, high = (low, x) if (value > 0) == rising else (x, high)
        step = value / slope if slope else math.inf
        if not low < x - step < high or abs(step) > abs(last) / 2:
            step = x - (low + high) / 2
        if x - step == x:
            break
        x, last = x - step, step
    return x
