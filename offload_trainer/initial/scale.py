"""Initial weights of the scale that a network as narrow as the subnet would have been given.

Initialisations keep a layer's output at one scale by dividing through its width. A slice of a wide layer, first weights
and all, is a narrow layer with the weights of a wide one: its output is too small, and where a norm follows, which
undoes that, its steps are too large for its weights.
"""

from collections.abc import Callable

import torch
from torch import nn

from offload_trainer.groups.slicing import named_tensors, rebuild
from offload_trainer.offloader import Offloader

NOTICED = 0.05
"""A relative difference of scale that matters; of small tensors it must be more than the chance of two draws."""


@torch.no_grad()
def match_scale(offloader: Offloader, initialise: Callable[[nn.Module], None]) -> int:
    """Multiplies every sliced matrix of the master: its scale becomes that of a network of the first plan's widths.

    Before the first round. `initialise` gives a module its first random weights, in place; the random state stays as it
    was. Returns how many matrices that changed.
    """
    plan, sliced = offloader.agenda.top(), offloader.groups.sliced_by(offloader.structure.names)
    empty = {name: torch.empty(plan.shape(name), dtype=t.dtype) for name, t in named_tensors(offloader.model).items()}
    narrow = rebuild(offloader.model, empty, plan, offloader.groups)
    with torch.random.fork_rng(devices=[]):
        initialise(narrow)
    changed = 0
    for name, parameter in narrow.named_parameters():
        full = offloader.master[name]
        if name not in sliced or parameter.ndim < 2 or not plan.slices(name):
            continue
        wanted, there = _scale(parameter), _scale(full)
        chance = 4 / (2 * parameter.numel()) ** 0.5
        if wanted > 0 and there > 0 and abs(wanted / there - 1) > max(NOTICED, chance):
            full.mul_(wanted / there)
            changed += 1
    return changed


def _scale(tensor: torch.Tensor) -> float:
    """Root of the mean square, without a copy in another type."""
    kind = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=kind)) / max(1, tensor.numel()) ** 0.5
