"""How a mask is drawn from the probabilities of one group. All randomness comes from the generator given."""

import torch
from torch import Tensor

_CERTAIN = 1e-9  # a float64 inclusion probability this close to 1 is 1


def bernoulli(
    s: Tensor,  # (n,) in [0, 1]
    min_units: int,  # 0..n
    generator: torch.Generator,
) -> Tensor:  # (n,) bool
    """Every unit on its own with probability s, as in the paper. The number kept varies.

    Fewer than `min_units` drawn: those of largest s among the rest are added, ties broken by the generator.
    """
    u = torch.rand(s.shape, generator=generator, dtype=torch.float64, device=s.device)
    return _at_least(min_units, u < s, s, generator)


def bernoulli_twins(
    s: Tensor,  # (n,) in [0, 1]
    min_units: int,  # 0..n
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # both (n,) bool
    """Two masks, each drawn as `bernoulli` does, from u and from 1 - u: as different as they can be."""
    u = torch.rand(s.shape, generator=generator, dtype=torch.float64, device=s.device)
    first, second = (_at_least(min_units, mask, s, generator) for mask in (u < s, 1 - u < s))
    return first, second


def fixed(
    s: Tensor,  # (n,) in [0, 1]
    k: int,  # 1..n
    generator: torch.Generator,
) -> Tensor:  # (n,) bool, exactly k True
    """Exactly k units, unit i with probability `inclusion(s, k)[i]`, which is s_i when sum(s) = k.

    Systematic sampling over a random order (Madow 1949; Hartley & Rao 1962): the probabilities are laid end
    to end as intervals on [0, k), and the units that hold the points u, u + 1, ..., u + k - 1 are kept. No
    interval is longer than 1, so no unit is hit twice. The shuffle makes the dependence between two units as
    weak as O(1/n).
    """
    return _systematic(s, k, generator, shifts=(0.0,))[0]


def fixed_twins(
    s: Tensor,  # (n,) in [0, 1]
    k: int,  # 1..n
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # both (n,) bool, exactly k True
    """Two masks, each drawn as `fixed` does, in the same order but half an interval apart, at u and u + 1/2.

    An interval of length s holds points of both with probability max(0, 2s - 1), so a unit is in both as rarely as it
    can be: the very joint distribution of `bernoulli_twins`.
    """
    first, second = _systematic(s, k, generator, shifts=(0.0, 0.5))
    return first, second


def _systematic(s: Tensor, k: int, generator: torch.Generator, shifts: tuple[float, ...]) -> list[Tensor]:
    p = inclusion(s, k)
    certain = p >= 1 - _CERTAIN
    k_open = k - int(certain.sum())
    masks = [certain.clone() for _ in shifts]
    if k_open > 0:
        units = ((p > 0) & ~certain).nonzero().flatten()
        units = units[torch.randperm(units.numel(), generator=generator, device=s.device)]
        ends = p[units].cumsum(0)
        ends = ends / ends[-1] * k_open  # the last end is exactly k_open
        u = torch.rand((), generator=generator, dtype=torch.float64, device=s.device)
        for mask, shift in zip(masks, shifts, strict=True):
            # It stays clear of 0 and 1: otherwise u + k - 1 could round up to k, beyond the last interval.
            points = ((u + shift) % 1).clamp(_CERTAIN, 1 - _CERTAIN) + torch.arange(k_open, device=s.device)
            mask[units[torch.searchsorted(ends, points, right=True)]] = True
    return masks


def _at_least(min_units: int, mask: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    missing = min_units - int(mask.sum())
    if missing > 0:
        shuffled = torch.randperm(s.numel(), generator=generator, device=s.device)
        rest = shuffled[~mask[shuffled]]
        mask[rest[s[rest].argsort(descending=True, stable=True)[:missing]]] = True
    return mask


def inclusion(
    s: Tensor,  # (n,) in [0, 1]
    k: int,  # 1..n
) -> Tensor:  # (n,) float64 in [0, 1], sum k
    """Probabilities that sum to k, as near to `s` as scaling with a cap allows: min(1, c * s) where s < 1.

    s = 1 stays 1 and s = 0 stays 0, unless k forbids it: more than k units with s = 1 share k evenly, and
    with fewer than k units above 0 those are certain and the zeros share the rest evenly. Raises ValueError
    for k not in 1..n.
    """
    n = s.numel()
    if not 1 <= k <= n:
        raise ValueError(f"k ({k}) must be from 1 to the number of units ({n})")
    p = s.double()
    ones, zeros = p >= 1, p <= 0
    n_ones, n_positive = int(ones.sum()), n - int(zeros.sum())
    if n_ones >= k:
        return ones.double() * (k / n_ones)
    if n_positive <= k:
        return torch.ones_like(p).masked_fill(zeros, (k - n_positive) / max(n - n_positive, 1))
    rest = p.masked_fill(ones, 0)
    factor = (k - n_ones) / rest.cumsum(0)[-1]  # not `sum`, which depends on the number of threads
    if factor * rest.max() <= 1:
        return (rest * factor).masked_fill(ones, 1)
    # With the i largest at 1, the rest is scaled to sum to k - i: the first i that leaves none above 1.
    largest = p.sort(descending=True).values
    i = torch.arange(n, device=s.device)
    scale = (k - i) / largest.flip(0).cumsum(0).flip(0)
    first = int(((i >= n_ones) & (scale * largest <= 1)).nonzero()[0])
    return (p * scale[first]).clamp(max=1).masked_fill(ones, 1)
