"""Gather (master → device) and write-back (device → master) of what a plan keeps, each in two steps.

The host's step moves elements between the master and staging, slabs of the master's types that are laid out as the
device's; it may go on in the background. The link's step moves staging and the device's slabs into each other; it is
where types change, so a narrow master means fewer bytes on the link. Where both steps are waited for, a slab goes in
parts: the host moves one while another crosses. On a CPU a slab is its own staging where types agree and nothing
overlaps.

A write-back to a narrower master rounds at random (master/precision.py) and leaves on the device what it rounded to:
between rounds the device holds what the master holds.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

import torch
from torch import Tensor

from offload_trainer import memory
from offload_trainer.device.elements import norm
from offload_trainer.device.movers import Mover, Plain
from offload_trainer.device.pipeline import in_background
from offload_trainer.device.streams import Event, SideStream
from offload_trainer.groups.plan import Plan
from offload_trainer.master.precision import Rounding
from offload_trainer.master.slab import Part, Slab

PART = 2**27
"""Bytes of a slab that cross the link at once, while the host moves others: some milliseconds, to which the start of
the threads that move them adds one."""
LINK_CHUNK = 2**23
"""Elements whose type changes at a time: up to 20 bytes of scratch each, on the device."""

SlabLayout = tuple[torch.dtype, torch.dtype, Mapping[str, torch.Size]]
"""Of a slab: the type computed in, the type stored in the master, and the shapes by name."""


def slab_layouts(
    entries: Mapping[str, tuple[torch.dtype, torch.Size]], stored: Mapping[str, torch.dtype]
) -> list[SlabLayout]:
    """One for each type and, of it, each stored type: so a slab crosses the link as a whole."""
    table: dict[tuple[torch.dtype, torch.dtype], dict[str, torch.Size]] = {}
    for name, (dtype, shape) in entries.items():
        table.setdefault((dtype, stored[name]), {})[name] = shape
    return [(*types, shapes) for types, shapes in table.items()]


def limited(layouts: Iterable[SlabLayout], names: Container[str]) -> list[SlabLayout]:
    """The same slabs, of tensors of these names only."""
    return [
        (dtype, stored, {name: shape for name, shape in shapes.items() if name in names})
        for dtype, stored, shapes in layouts
    ]


@dataclass
class Work:
    """What transfers took so far."""

    gather: float = 0.0
    """Seconds of the host's steps; they may have been spent in the background."""
    writeback: float = 0.0
    link: float = 0.0
    """Seconds of the link's steps, both ways, that no host's step of the same slab went on beside; of what arrives at a
    swap, from the first copy to the last, as the device's clock has it."""
    waited: float = 0.0
    """Seconds that training waited: for the link, for the host's steps outside the background, for the background."""
    nbytes: int = 0
    """Gathered and written back, in the master's types."""


@dataclass
class Unloading:
    """Copies from the device that are under way."""

    parts: Iterator[Part]
    """Of staging, each once it has arrived: the host waits for it."""
    unloaded: Mapping[str, Event]
    """When a tensor's values have left the device."""
    _excess: Tensor
    _told: Event

    def excess(self) -> float:
        """Σ (value − rounded value)², over all slabs."""
        self._told.synchronize()
        return float(self._excess)


class Transfer:
    """Between a master and one device.

    Where transfers overlap, `use` tells stagings of one layout apart, which then hold something at the same time.
    """

    def __init__(self, device: torch.device, *, overlap: bool = False, mover: Mover | None = None):
        self._mover = mover or Plain()
        self._device, self._pin = device, device.type == "cuda"
        self._overlap = overlap
        self._staging: dict[tuple, Slab] = {}
        self._down = SideStream(device)
        self._held: list[tuple[Event, Event]] = []
        self.work, self._lock = Work(), Lock()

    @property
    def staging_bytes(self) -> int:
        return sum(slab.nbytes for slab in self._staging.values())

    def fetch(
        self, full: Mapping[str, Tensor], layouts: Iterable[SlabLayout], slabs: Sequence[Slab], plan: Plan, use: str
    ) -> None:
        """Device ← what the plan keeps of the master: both steps at once."""
        for source, target in zip(self.staging(layouts, slabs, use), slabs, strict=True):
            for part in source.parts(PART):
                self.gather(full, [part], plan)
                self._send(part.flat, target.flat[part.place])
        self._wait()

    def gather(self, full: Mapping[str, Tensor], staged: Iterable[Part], plan: Plan) -> None:
        """Staging ← what the plan keeps of the master."""
        start = perf_counter()
        for part in staged:
            self._mover.gather([(part.slab[name], full[name], plan.indices(name)) for name in part.names])
            self.work.nbytes += part.nbytes
        self._took("gather", start)

    def _send(self, here: Tensor, there: Tensor) -> None:
        """Device ← staging; may be under way still. On a CPU both may be the same."""
        start = perf_counter()
        if here.dtype != there.dtype:
            for target, source in zip(there.split(LINK_CHUNK), here.split(LINK_CHUNK), strict=True):
                target.copy_(source.to(target.device, non_blocking=True))
        elif here.data_ptr() != there.data_ptr():
            there.copy_(here, non_blocking=True)
        self._took("link", start)

    def _wait(self) -> None:
        """The host waits for the copies that are under way."""
        start = perf_counter()
        Event(self._device).synchronize()
        self._took("link", start)

    def arrived(self, staged: Part, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """What a part of staging holds, on the device and in the type computed in: new tensors, unless it is that
        already. May be under way still, on the current stream."""
        if self._device.type == "cpu" and staged.flat.dtype == dtype:
            return staged.views(staged.flat)
        new = torch.empty(staged.flat.shape, dtype=dtype, device=self._device)
        self._send(staged.flat, new)
        return staged.views(new)

    def unload(self, slabs: Iterable[Slab], staged: Iterable[Slab], rounding: Rounding) -> Unloading:
        """Staging ← device, after the kernels queued so far; under way still.

        Where the master is narrower, the device rounds what it holds first. `unloaded` says when a tensor may change.
        """
        start, pairs = perf_counter(), list(zip(slabs, staged, strict=True))
        narrow = [source.flat for source, target in pairs if source.flat.dtype != target.flat.dtype]
        errors = [error for flat in narrow for error in self._round(flat, rounding)]
        excess = torch.stack(errors).double().square().sum() if errors else torch.zeros(())
        excess = excess.to("cpu", non_blocking=True)
        rounded = Event(self._device)
        queued: list[tuple[Part, Event]] = []
        with self._down.after(rounded):
            for source, target in pairs:
                for part in target.parts(PART):
                    self._leave(source.flat[part.place], part.flat)
                    queued.append((part, Event(self._device)))
        self._took("link", start)
        unloaded = {name: event for part, event in queued for name in part.names}
        return Unloading(self._arriving(queued), unloaded, excess, rounded)

    def _round(self, flat: Tensor, rounding: Rounding) -> Iterator[Tensor]:
        """Leaves what a narrower master will hold. Yields norms of what that changed."""
        for value in flat.split(LINK_CHUNK):
            rounded = rounding.narrow(value, int(value.storage_offset()))
            yield norm(value, rounded)
            value.copy_(rounded)

    def _leave(self, there: Tensor, here: Tensor) -> None:
        """Staging ← device; may be under way still. On a CPU both may be the same."""
        if here.dtype != there.dtype:
            for source, target in zip(there.split(LINK_CHUNK), here.split(LINK_CHUNK), strict=True):
                target.copy_(source.to(target.dtype), non_blocking=True)
        elif here.data_ptr() != there.data_ptr():
            here.copy_(there, non_blocking=True)

    def _arriving(self, queued: Iterable[tuple[Part, Event]]) -> Iterator[Part]:
        for part, event in queued:
            start = perf_counter()
            event.synchronize()
            self._took("link", start)
            yield part

    def hold(self, event: Event) -> None:
        """Training waits until then, the host does not; `count` adds how long to `work`."""
        before = Event(self._device, timed=True)
        event.wait()
        self._held.append((before, Event(self._device, timed=True)))

    def held(self) -> list[tuple[Event, Event]]:
        """Where training was held since the last call: begin and end."""
        held, self._held = self._held, []
        return held

    def count(self, held: Iterable[tuple[Event, Event]]) -> None:
        """Add to `work` how long training was held there. The host waits for the device to have passed those places."""
        for before, after in held:
            after.synchronize()
            self.work.waited += after.seconds_since(before)

    def merge(self, staged: Iterable[Part], full: Mapping[str, Tensor], plan: Plan, *, delta: bool = False) -> float:
        """Master ← staging. With `delta`, returns Σ (new − old)²."""
        start, squared = perf_counter(), 0.0
        for part in staged:
            pairs = [(part.slab[name], full[name], plan.indices(name)) for name in part.names]
            squared += self._mover.scatter(pairs, delta=delta)
            self.work.nbytes += part.nbytes
        self._took("writeback", start)
        return squared

    def _took(self, step: str, start: float) -> None:
        seconds = perf_counter() - start
        with self._lock:  # both threads add to them
            setattr(self.work, step, getattr(self.work, step) + seconds)
            if not in_background():
                self.work.waited += seconds

    def staging(self, layouts: Iterable[SlabLayout], slabs: Iterable[Slab], use: str) -> list[Slab]:
        """Pinned slabs of these layouts, whose memory is kept; a slab of `slabs` where it will do itself."""
        same, use = self._device.type == "cpu" and not self._overlap, use if self._overlap else ""
        return [
            slab if same and dtype == stored else self._staged(stored, shapes, use)
            for (dtype, stored, shapes), slab in zip(layouts, slabs, strict=True)
        ]

    def staging_ahead(self, layouts: Iterable[SlabLayout], use: str) -> list[Slab]:
        """Pinned slabs of these layouts beside those of `staging`."""
        return [self._staged(stored, shapes, f"{use} ahead") for _, stored, shapes in layouts]

    def _staged(self, dtype: torch.dtype, shapes: Mapping[str, torch.Size], use: str) -> Slab:
        key = (use, dtype, tuple(shapes))
        slab = self._staging.get(key)
        if slab is None or any(slab[name].shape != shape for name, shape in shapes.items()):
            self._staging[key] = Slab(shapes, dtype, pin=self._pin, over=self._staging.pop(key, None))
        return self._staging[key]

    def close(self) -> None:
        memory.synchronize(self._device)  # what was broken off may still be writing into staging
        for slab in self._staging.values():
            slab.close()
        self._staging.clear()
