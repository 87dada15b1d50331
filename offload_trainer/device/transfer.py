"""Gather (master → device) and write-back (device → master) of what a plan keeps, each in two steps.

The host's step moves elements between the master and staging, slabs of the master's types that are laid out as the
device's; it may go on in the background. The link's step moves staging and the device's slabs into each other, one copy
a slab; it is where types change, so a narrow master means fewer bytes on the link. On a CPU a slab is its own staging
where types agree and nothing overlaps.

A write-back to a narrower master rounds at random (master/precision.py) and leaves on the device what it rounded to:
between rounds the device holds what the master holds.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from offload_trainer.device.elements import distance
from offload_trainer.device.movers import Mover, Plain
from offload_trainer.device.pipeline import in_background
from offload_trainer.groups.plan import Plan
from offload_trainer.master.precision import Rounding
from offload_trainer.master.slab import Slab

LINK_CHUNK = 2**21
"""Elements whose type changes at a time: up to 20 bytes of scratch each, on the device."""

Layout = tuple[torch.dtype, torch.dtype, Mapping[str, torch.Size]]
"""Of a slab: the type computed in, the type stored in the master, and the shapes by name."""


def layouts(entries: Mapping[str, tuple[torch.dtype, torch.Size]], stored: Mapping[str, torch.dtype]) -> list[Layout]:
    """One for each type and, of it, each stored type: so a slab crosses the link as a whole."""
    table: dict[tuple[torch.dtype, torch.dtype], dict[str, torch.Size]] = {}
    for name, (dtype, shape) in entries.items():
        table.setdefault((dtype, stored[name]), {})[name] = shape
    return [(*types, shapes) for types, shapes in table.items()]


def limited(kinds: Iterable[Layout], names: Container[str]) -> list[Layout]:
    """The same slabs, of tensors of these names only."""
    return [
        (dtype, stored, {name: shape for name, shape in shapes.items() if name in names})
        for dtype, stored, shapes in kinds
    ]


@dataclass
class Work:
    """What transfers took so far."""

    gather: float = 0.0
    """Seconds of the host's steps; they may have been spent in the background."""
    writeback: float = 0.0
    link: float = 0.0
    """Seconds of the link's steps, both ways."""
    waited: float = 0.0
    """Seconds that training waited: for the link, for the host's steps outside the background, for the background."""
    nbytes: int = 0
    """Gathered and written back, in the master's types."""


class Transfer:
    """Between a master and one device.

    Where transfers overlap, `use` tells stagings of one layout apart, which then hold something at the same time.
    """

    def __init__(self, device: torch.device, *, overlap: bool = False, mover: Mover | None = None):
        self._mover = mover or Plain()
        self._device, self._pin = device, device.type == "cuda"
        self._apart = overlap or device.type != "cpu"
        self._staging: dict[tuple, Slab] = {}
        self.work = Work()

    @property
    def staging_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._staging.values())

    def fetch(
        self, full: Mapping[str, Tensor], kinds: Iterable[Layout], slabs: Sequence[Slab], plan: Plan, use: str
    ) -> None:
        """Device ← what the plan keeps of the master: both steps at once."""
        staged = self.staging(kinds, slabs, use)
        self.gather(full, staged, plan)
        self.load(staged, slabs)

    def gather(self, full: Mapping[str, Tensor], staged: Iterable[Slab], plan: Plan) -> None:
        """Staging ← what the plan keeps of the master."""
        start = perf_counter()
        for slab in staged:
            self._mover.gather([(slab[name], full[name], plan.indices(name)) for name in slab])
            self.work.nbytes += slab.nbytes
        self._took("gather", start)

    def load(self, staged: Iterable[Slab], slabs: Iterable[Slab]) -> None:
        """Device ← staging. The host waits here for the link."""
        start = perf_counter()
        for source, target in zip(staged, slabs, strict=True):
            if source.flat.dtype != target.flat.dtype:
                for there, here in zip(target.flat.split(LINK_CHUNK), source.flat.split(LINK_CHUNK), strict=True):
                    there.copy_(here.to(there.device))
            elif source is not target:
                target.flat.copy_(source.flat)
        self._took("link", start)

    def arrived(self, staged: Slab, dtype: torch.dtype) -> Slab:
        """Staging as a slab on the device, of the type computed in: a new one unless it is there already."""
        if self._device.type == "cpu" and staged.flat.dtype == dtype:
            return staged
        new = Slab({name: view.shape for name, view in staged.items()}, dtype, self._device)
        self.load([staged], [new])
        return new

    def unload(self, slabs: Iterable[Slab], staged: Iterable[Slab], rounding: Rounding) -> float:
        """Staging ← device, rounded where the master is narrower. The host waits here for the round's last kernels.

        Returns Σ (value − rounded value)².
        """
        start, squared = perf_counter(), 0.0
        for source, target in zip(slabs, staged, strict=True):
            if source.flat.dtype != target.flat.dtype:
                for here, there in zip(target.flat.split(LINK_CHUNK), source.flat.split(LINK_CHUNK), strict=True):
                    rounded = rounding.narrow(there, int(there.storage_offset()))
                    squared += distance(there, rounded)
                    there.copy_(rounded)
                    here.copy_(rounded)
            elif source is not target:
                target.flat.copy_(source.flat)
        self._took("link", start)
        return squared

    def merge(self, staged: Iterable[Slab], full: Mapping[str, Tensor], plan: Plan, *, delta: bool = False) -> float:
        """Master ← staging. With `delta`, returns Σ (new − old)²."""
        start, squared = perf_counter(), 0.0
        for slab in staged:
            pairs = [(slab[name], full[name], plan.indices(name)) for name in slab]
            squared += self._mover.scatter(pairs, delta=delta)
            self.work.nbytes += slab.nbytes
        self._took("writeback", start)
        return squared

    def _took(self, step: str, start: float) -> None:
        seconds = perf_counter() - start
        setattr(self.work, step, getattr(self.work, step) + seconds)
        if not in_background():
            self.work.waited += seconds

    def staging(self, kinds: Iterable[Layout], slabs: Iterable[Slab], use: str) -> list[Slab]:
        """Pinned slabs of these layouts, kept while shapes stay the same; a slab of `slabs` where it will do itself."""
        return [
            slab if dtype == stored and not self._apart else self._staged(stored, shapes, use if self._apart else "")
            for (dtype, stored, shapes), slab in zip(kinds, slabs, strict=True)
        ]

    def staging_ahead(self, kinds: Iterable[Layout], use: str) -> list[Slab]:
        """Pinned slabs of these layouts beside those of `staging`."""
        return [self._staged(stored, shapes, f"{use} ahead") for _, stored, shapes in kinds]

    def _staged(self, dtype: torch.dtype, shapes: Mapping[str, torch.Size], use: str) -> Slab:
        key = (use, dtype, tuple(shapes))
        slab = self._staging.get(key)
        if slab is None or any(slab[name].shape != shape for name, shape in shapes.items()):
            if slab is not None:
                self._staging.pop(key).close()
            self._staging[key] = Slab(shapes, dtype, pin=self._pin)
        return self._staging[key]

    def close(self) -> None:
        for slab in self._staging.values():
            slab.close()
        self._staging.clear()
