"""What the trainer asks of a task: a model, batches that are a function of the step alone, a loss and a metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor, or tuples, lists and dicts of tensors, whose axis 0 is the batch."""


@dataclass(frozen=True)
class Task:
    """A model to train, its data, and what is measured. Made by the `build` function of a module beside this one."""

    model: nn.Module
    """Real, or on the meta device when `materialise` is given."""
    example_inputs: tuple[Any, ...] | dict[str, Any]
    """Arguments of one small forward, on the host: a tuple (positional) or a dict (keywords)."""
    loss_fn: Callable[[nn.Module, Any], Tensor]
    """(module, batch) → scalar: the mean training loss, label smoothing and the like included."""
    metrics_fn: Callable[[nn.Module, Any], dict[str, Tensor]]
    """(module, batch) → scalars, among them `loss`, each a mean over the batch, from one forward."""
    train: Dataset[Any]
    """`train[step]` is the global batch of that optimizer step, for any step ≥ 0: endless, and equal whenever asked."""
    val: Sequence[Any]
    """Validation batches; the last may be smaller, so means over it are weighted by `count`."""
    unit: str
    """What is counted per second, plural: `tokens`, `images`, `samples`."""
    count: Callable[[Any], int]
    """Units in a batch."""
    derived: Callable[[Mapping[str, float]], dict[str, float]] | None = None
    """From the means of `metrics_fn`'s scalars over a data set, what else to report, such as perplexity."""
    parted: bool = False
    """Whether loss and metrics are means over rows: parts of a batch, weighted by `count`, say what all of it says."""
    widths: dict[Any, Any] = field(default_factory=dict)
    """Rules for width-carrying attributes that `find_groups` does not know."""
    materialise: Callable[[nn.Module], None] | None = None
    """Initialises in place a model that was built on meta and now has real memory; random from torch's seed."""
    initialise: Callable[[nn.Module], None] | None = None
    """Gives a model of this kind, of any widths, its first random weights, in place; None where they are known."""
    save_export: Callable[[nn.Module, Path], str | None] | None = None
    """Writes what belongs beside `model.safetensors`, such as a config; returns what a user must know, if anything."""
    why_no_config: Callable[[nn.Module], str | None] | None = None
    """Why the export of a sliced module (on meta, say) will have no config of its library, if it will not."""

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Means over a data set, with what `derived` makes of them."""
        return means | (self.derived(means) if self.derived is not None else {})


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """An independent random stream for each (seed, key): without state to save, so any step can be drawn again."""
    return np.random.default_rng((seed, *key))


class Shuffle:
    """An endless order over `size` items in batches: position p of the run is item perm_e[p mod size], e = p div size.

    Every epoch visits every item once, in an order of its own; a batch may span the border between two epochs.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._drawn: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def indices(self, step: int) -> Tensor:  # (batch_size,) int64
        """The items of one optimizer step."""
        position, pieces, wanted = step * self.batch_size, [], self.batch_size
        while wanted:
            epoch, offset = divmod(position, self.size)
            piece = self._permutation(epoch)[offset : offset + wanted]
            pieces.append(piece)
            position, wanted = position + len(piece), wanted - len(piece)
        return torch.cat(pieces)

    def _permutation(self, epoch: int) -> Tensor:  # (size,) int64
        drawn_epoch, permutation = self._drawn
        if drawn_epoch != epoch:
            permutation = torch.from_numpy(random_stream(self.seed, 0, epoch).permutation(self.size))
            self._drawn = (epoch, permutation)  # one assignment: a thread that loads ahead sees the old or the new pair
        return permutation
