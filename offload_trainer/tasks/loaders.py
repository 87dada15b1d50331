"""Plain loaders of batches as the endless, step-indexed `train` and the finite `val` of a task."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from offload_trainer.errors import UserError
from offload_trainer.randomness import RandomState
from offload_trainer.tasks.task import random_stream


def train_batches(batches: Any, who: str, seed: int) -> Any:
    """`train[step]` of a DataLoader or other iterable, a sequence or Dataset of batches, or an endless Dataset.

    Raises UserError, beginning with `who`, for anything else, or if it is empty.
    """
    no_batches = isinstance(batches, (Mapping, str, Tensor))
    indexed = hasattr(batches, "__getitem__") and not isinstance(batches, IterableDataset)
    if indexed and not no_batches:
        return Cycle(_not_empty(batches, who)) if hasattr(batches, "__len__") else batches
    # An iterator would be used up after one epoch.
    if isinstance(batches, Iterable) and not no_batches and not isinstance(batches, Iterator):
        return LoaderBatches(batches, who, seed)
    raise UserError(f"{who} must be a DataLoader, or a sequence or Dataset of batches; it is {type(batches).__name__}")


def val_batches(batches: Any, who: str, seed: int) -> Sequence[Any]:
    """A finite sequence of what `train_batches` takes, but for an endless Dataset."""
    found = train_batches(batches, who, seed)
    if isinstance(found, Cycle):
        return found.batches
    if isinstance(found, LoaderBatches):
        return ValBatches(found)
    raise UserError(f"{who} must end: an endless Dataset ({type(batches).__name__}, without len) cannot validate")


def _not_empty(batches: Any, who: str) -> Any:
    if not len(batches):
        raise UserError(f"{who} is empty")
    return batches


class Cycle(Dataset[Any]):
    """A sequence of batches, over and over in its own order."""

    def __init__(self, batches: Sequence[Any]):
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]


class LoaderBatches(Dataset[Any]):
    """A DataLoader (or another iterable of batches) as `train[step]`: the same batch for the same (seed, step).

    Epoch e is iterated with torch's, NumPy's and Python's random state set from (seed, e), so shuffling and
    augmentation repeat; what the training itself draws in between has no influence on it, nor it on the training.
    Steps in a row cost nothing extra. Any other step, the first after a resume say, iterates from the beginning of its
    epoch up to it (from step 0, if the loader does not know its length).
    """

    def __init__(self, loader: Iterable[Any], who: str, seed: int):
        self.loader, self.who, self.seed = loader, who, seed
        try:
            self.length: int | None = len(_not_empty(loader, who))
        except TypeError:
            self.length = None  # an IterableDataset: its end shows when it comes
        self._batches: Iterator[Any] | None = None
        self._state = RandomState(0)
        self._epoch = self._first = self._next = 0  # the running epoch, its first step, the step that comes next
        self._last: tuple[int, Any] = (-1, None)

    def __getitem__(self, step: int) -> Any:
        if step != self._last[0]:
            epoch = step // self.length if self.length else self._epoch
            if self._batches is None or step < self._next or epoch != self._epoch:
                epoch = epoch if self.length else 0
                self._begin(epoch, first=epoch * (self.length or 0))
            while self._next < step:
                self._advance()
            self._last = (step, self._advance())
        return self._last[1]

    def _begin(self, epoch: int, first: int) -> None:
        self._epoch, self._first, self._next = epoch, first, first
        seed = int(random_stream(self.seed, 2, epoch).integers(2**31))
        self._state = RandomState(seed)
        sampler = getattr(self.loader, "sampler", None)
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)
        for owner in (self.loader, sampler):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        with self._state.installed():
            self._batches = iter(self.loader)

    def _advance(self) -> Any:
        assert self._batches is not None
        with self._state.installed():
            batch = next(self._batches, self)  # itself: the end
        if batch is not self:
            self._next += 1
            return batch
        if self.length is not None:
            raise UserError(f"{self.who} ended after {self._next - self._first} batches, but its len is {self.length}")
        if self._next == self._first:
            raise UserError(f"{self.who} is empty")
        self._begin(self._epoch + 1, first=self._next)
        return self._advance()


class ValBatches(Sequence[Any]):
    """The first epoch of a loader as a sequence: the same at every evaluation, one batch in memory at a time."""

    def __init__(self, loader: LoaderBatches):
        if loader.length is None:
            with RandomState(0).installed():
                loader.length = sum(1 for _ in loader.loader)
        if not loader.length:
            raise UserError(f"{loader.who} is empty")
        self.loader, self.length = loader, loader.length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        chosen = range(self.length)[index]
        return [self.loader[number] for number in chosen] if isinstance(chosen, range) else self.loader[chosen]
