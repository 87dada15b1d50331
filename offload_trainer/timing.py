"""What transfers took from round to round, and where a run's time went."""

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from offload_trainer.device import ranks
from offload_trainer.device.transfer import Work


@dataclass(frozen=True)
class Moved:
    """What transfers took over a while."""

    gather_ms: float = 0.0
    """The host's part of gathering, in the background where rounds overlap."""
    writeback_ms: float = 0.0
    """The host's part of the write-back, likewise."""
    link_ms: float = 0.0
    """Between staging and device, both ways."""
    waited_ms: float = 0.0
    """What training waited for of all of it."""
    bytes_moved: int = 0
    """Gathered and written back."""

    @classmethod
    def between(cls, before: Work, after: Work) -> Self:
        return cls(
            gather_ms=1e3 * (after.gather - before.gather),
            writeback_ms=1e3 * (after.writeback - before.writeback),
            link_ms=1e3 * (after.link - before.link),
            waited_ms=1e3 * (after.waited - before.waited),
            bytes_moved=after.nbytes - before.nbytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """With the speed of all transfers, wherever they ran, and the share of their time that was not waited for."""
        took = self.gather_ms + self.writeback_ms + self.link_ms
        speed = 1e3 * self.bytes_moved / took if took else 0.0
        hidden = max(0.0, 1 - self.waited_ms / took) if took else 0.0
        return {**asdict(self), "bytes_per_second": speed, "overlapped_share": hidden}


@dataclass(frozen=True)
class RoundReport(Moved):
    """The last finished round, and the newest write-back that had ended by then: of the same round or, where rounds
    overlap, of the one before. What was moved is that write-back, and what was gathered since the one before it."""

    delta_norm: float = 0.0
    """Euclidean norm of what that write-back changed in the master."""
    difference: float | None = None
    """d of the finished round: mean over its paired batches of L(m) − L(m′); None when it had no pairs."""


class Transfers:
    """Tells what transfers took from round to round, and in all."""

    def __init__(self) -> None:
        self._before = self._last = Work()

    def report(self, work: Work, delta_norm: float, difference: float | None) -> RoundReport:
        """At the end of a round. work: of all transfers until the newest write-back ended, delta_norm: of that."""
        moved = RoundReport.between(self._before, work)
        self._before = work
        return replace(moved, delta_norm=delta_norm, difference=difference)

    def end(self, work: Work) -> None:
        """work: of all transfers, when none is under way: where rounds overlap, no report has the last write-back."""
        self._last = work

    def total(self) -> Moved:
        """Of all transfers when `end` was told last."""
        return Moved.between(Work(), self._last)


@dataclass
class Spent:
    """Wall seconds since the start of what was not training, by what they went into."""

    gather: float = 0.0
    writeback: float = 0.0
    reference: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def share(self) -> float:
        """Of all the time so far, the part between two rounds: waiting for transfers, moving entries on the device."""
        return (self.gather + self.writeback) / max(1e-9, time.perf_counter() - self.started)

    @contextmanager
    def on(self, what: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + time.perf_counter() - start)


class Meter:
    """Loss and speed since the last reading, and where the wall time went."""

    def __init__(self, unit: str, base_bytes: int, before: Mapping[str, Any] | None = None):
        """before: what was read last of a run that is resumed, from which its times go on."""
        self.unit, self.base_bytes = unit, base_bytes
        self._before = {key: (before or {}).get(key) or 0.0 for key in ("train_seconds", "train_cpu_seconds")}
        self._losses: list[Tensor] = []
        self._units = self._total = 0
        self._window = self._start = time.perf_counter()
        self._cpu_start = time.process_time()
        self._paused: dict[str, float] = {}
        self._stopped: float | None = None
        self._within = self._paused_cpu = 0.0

    def add(self, units: int, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        self._units += units
        self._total += units

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean loss and speed since the last reading. The host waits for the device here."""
        loss = ranks.mean(accelerator, torch.stack(self._losses).mean())
        now = time.perf_counter()
        speed = self._units / (now - self._window)
        self._losses, self._units, self._window = [], 0, now
        wall = now - self._start - sum(self._paused.values())
        cpu = time.process_time() - self._cpu_start - self._paused_cpu
        spent = {"train_seconds": wall, "train_cpu_seconds": cpu}
        spent = {key: self._before[key] + seconds for key, seconds in spent.items()}
        return {"loss": loss, f"{self.unit}_per_second": speed, **spent}

    @contextmanager
    def paused(self, what: str):
        """Time that is not training."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - start
        self._paused_cpu += time.process_time() - cpu
        self._window += seconds
        self._paused[what] = self._paused.get(what, 0.0) + seconds

    def stop(self) -> None:
        """Training is over; what is paused from now on does not lie within its time."""
        self._stopped = time.perf_counter()
        self._within = sum(self._paused.values())

    def summary(self, spent: Spent) -> dict[str, Any]:
        seconds = (self._stopped or time.perf_counter()) - self._start - self._within
        split = {name: getattr(spent, name) for name in ("gather", "writeback", "reference")}
        return {
            f"{self.unit}_per_second": self._total / seconds if seconds else 0.0,
            "seconds": {"train": seconds - sum(split.values()), **split, **self._paused},
        }
