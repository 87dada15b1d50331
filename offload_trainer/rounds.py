"""What a round cost and did, and where a run's time went."""

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offload_trainer.device import ranks
from offload_trainer.device.transfer import Work
from offload_trainer.device.workbench import Compile
from offload_trainer.errors import NotFinite, UserError


def require_arguments(
    sync_every: int, state: str, clip_norm: float | None, compile: Compile = False, *, fits: bool
) -> None:
    """Raise `UserError` unless rounds can be made of them (see `Offloader`). fits: what is compiled, if anything is,
    fits every plan."""
    if not isinstance(sync_every, Integral) or isinstance(sync_every, bool) or sync_every < 1:
        raise UserError(f"sync_every ({sync_every}) must be a whole number, at least 1")
    if state not in ("carry", "reset"):
        raise UserError(f"state ({state!r}) must be carry or reset")
    if clip_norm is not None and not clip_norm > 0:  # nor NaN
        raise UserError(f"clip_norm ({clip_norm}) must be positive, or None")
    if compile not in (False, True, "graphs"):
        raise UserError(f"compile ({compile!r}) must be False, True or graphs")
    if not fits:
        raise UserError("memory.compile needs plans of constant widths: structure.sampler fixed, budget per_group")


@dataclass
class Round:
    """A round under way: its steps so far, and what they showed (numbers that may still be on the device)."""

    paired: bool
    """Whether there is a reference to compare with."""
    undivided: bool = False
    """A step's batch may not come in parts."""
    steps: int = 0
    losses: list[Tensor] = field(default_factory=list)
    differences: list[Tensor] = field(default_factory=list)
    """L(m) − L(m′) of each paired batch."""

    def add_loss(self, loss: Tensor) -> None:
        """Of a batch, or of the next part of one. Raises `UserError` for a part where there may be none."""
        if self.undivided and len(self.losses) > self.steps:
            raise UserError(
                "CUDA graphs (memory.cuda_graphs) take a step's batch whole: a second backward pass before step() would"
                " overwrite the gradients of the first"
            )
        if not isinstance(loss, Tensor) or loss.ndim:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"loss_fn(module, batch) must return a scalar tensor; it returned {what}")
        self.losses.append(loss.detach().clone())  # a CUDA graph overwrites it in the next step

    def require_gradients(self, parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
        """At its first step: raise unless the subnet's parameters have gradients, and the full model's have none."""
        if self.steps:
            return
        stray = next((name for name, parameter in model.named_parameters() if parameter.grad is not None), None)
        if stray is not None:
            raise UserError(
                f"the loss reaches {stray} of the model itself, not of the subnet: loss_fn must compute with the module"
                " it is given, and no function or hook that a module keeps may refer to the model"
            )
        if all(parameter.grad is None for parameter in parameters.values()):
            raise RuntimeError("step() follows loss() and a backward pass: no parameter of the subnet has a gradient")

    def outcome(
        self, accelerator: Accelerator, weights: Tensor, credit: Mapping[str, Tensor] | None, steps: int, rounds: int
    ) -> float | None:
        """d: mean over the paired batches and the ranks of L(m) − L(m′); None if there were none. The host waits for
        the device here.

        Raises `NotFinite`, naming the step, unless the losses (means over the ranks), the weights and what s learns
        from are finite. weights: whether those are. steps: of the run so far, this round's included. rounds: finished
        before it.
        """
        difference = ranks.mean(accelerator, torch.stack(self.differences).mean()) if self.differences else None
        losses = torch.stack(self.losses)
        ranks.average_(accelerator, [losses])
        signals = (*(credit or {}).values(), *(() if difference is None else (torch.tensor(difference),)))
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        wrong = not all(bool(signal.isfinite().all()) for signal in signals)
        if not bad and bool(weights) and not wrong:
            return difference
        within = bad[0] * self.steps // len(losses) + 1 if bad else self.steps
        what = (
            "what s learns from, a loss of the reference or a gradient, is not finite"
            if wrong
            else "a weight is not finite"
        )
        what = f"the loss is {losses[bad[0]].item()}" if bad else what
        raise NotFinite(
            f"{what} at step {steps - self.steps + within}, round {rounds}: the master and the last checkpoint keep "
            "what was before this round; lower optimizer.lr, set optimizer.clip_norm or turn memory.autocast off"
        )


@dataclass(frozen=True)
class Boundary:
    """All that changes from round to round beside the master and its moments, as it was when a round ended."""

    numbers: Mapping[str, Any]
    structure: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    """States of the generators that dropout draws from."""

    def with_numbers(self, **numbers: float) -> "Boundary":
        """With numbers that were not known yet when the round ended."""
        return replace(self, numbers={**self.numbers, **numbers})


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
        """work: of all transfers, when none is under way: rounds that overlap report the last write-back no more."""
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

    def __init__(self, unit: str, base_bytes: int):
        self.unit, self.base_bytes = unit, base_bytes
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
        return {"loss": loss, f"{self.unit}_per_second": speed, "train_seconds": wall, "train_cpu_seconds": cpu}

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
