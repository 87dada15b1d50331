"""The units of the largest probabilities, of one group or of all together."""

from collections.abc import Mapping

import torch
from torch import Tensor


def largest(s: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest, (n,) bool; of equal ones the lower index comes first."""
    mask = torch.zeros_like(s, dtype=torch.bool)
    mask[s.argsort(descending=True, stable=True)[:count]] = True
    return mask


def largest_of_all(
    s: Mapping[str, Tensor],  # by group, (units,)
    least: Mapping[str, int],  # so many of each group at any rate
    count: int,  # of all groups together
) -> dict[str, Tensor]:  # masks by group, (units,) bool
    """Of equal ones the lower index comes first, across groups relative to their size: an untrained s gives each group
    its share."""
    masks = {name: largest(part, least[name]) for name, part in s.items()}
    sizes = [len(part) for part in s.values()]
    mask, flat = torch.cat(list(masks.values())), torch.cat(list(s.values()))
    place = torch.cat([torch.linspace(0, 1, size, device="cpu") for size in sizes])
    rest = place.argsort(stable=True)
    rest = rest[~mask[rest]]
    missing = max(count - int(mask.sum()), 0)
    mask[rest[flat[rest].argsort(descending=True, stable=True)[:missing]]] = True
    return dict(zip(s, mask.split(sizes), strict=True))
