"""The device's side of a round: the subnet that is trained, the one it is compared with, and their transfers.

Where rounds overlap, three plans are under way. The plan of the round is trained. The next round's lies on the device
as well, weights only, and is the reference. The one after that is gathered on the host in the background, beside the
next round's moments. What waits was gathered before the running round ended, so it lacks that round's changes, and no
others: at the swap, entries shared with the plan trained last are copied over on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offload_trainer.device import memory
from offload_trainer.device.elements import on_device, patch
from offload_trainer.device.movers import Mover
from offload_trainer.device.pipeline import Pipeline, in_background
from offload_trainer.device.processes import transfer_threads
from offload_trainer.device.subnet import Subnet, TrainedSubnet
from offload_trainer.device.transfer import Transfer, Work, limited
from offload_trainer.groups.plan import Plan
from offload_trainer.master.master import Master
from offload_trainer.master.moments import OptimizerFactory, StateLayout
from offload_trainer.master.slab import Part, Slab

Compile = bool | Literal["graphs"]


@dataclass(frozen=True)
class Written:
    """A write-back that has come to its end."""

    delta_norm: float = 0.0
    """Of what it changed in the master."""
    work: Work = field(default_factory=Work)
    """Of all transfers until then."""


class Workbench:
    """Puts plans on the device and their results back. Tensors are reused in place while plans keep their shapes.

    sampled: the tensors that some plan slices, so that their entries differ in age.
    carry: the optimizer's moments come and go with the weights; else they start anew with every round.
    overlap: transfers go on while a round trains, as far as plans keep their shapes and are known ahead.
    """

    def __init__(
        self,
        master: Master,
        device: torch.device,
        factory: OptimizerFactory,
        layout: StateLayout,
        *,
        sampled: frozenset[str],
        carry: bool,
        compile: Compile,
        overlap: bool,
        mover: Mover,
    ):
        self._master, self._device, self._overlap = master, device, overlap
        self._layout, self._sampled, self.compile = layout, sampled, compile
        self._new_subnet = partial(
            TrainedSubnet, device=device, factory=factory, layout=layout, carry=carry, sampled=sampled
        )
        self.transfer = Transfer(device, overlap=overlap, mover=mover)
        self.pipeline = Pipeline(overlap=overlap, threads=transfer_threads(device, overlap=overlap))
        self._subnet: TrainedSubnet | None = None
        self._reference: Subnet | None = None
        self._gathered: tuple[Plan, ...] = ()
        """Plans of the next two rounds for which staging holds what `_gather_ahead` says; or none."""
        self.forward: Any = None
        """The subnet's module as it is called: compiled where that was asked for."""
        self.clock = 0
        """Steps of the moments of entries of mixed age (see master/moments.py)."""
        self.trained = ""
        """Digest of the plan trained last: a plan that is trained twice running keeps its clock."""
        self._squared = 0.0
        """Σ (new − old)² of the weights that the write-back under way has merged."""
        self.written = Written()
        """The last write-back that came to its end."""
        self.broken = False
        """A write-back was begun and has not come to its end."""

    @property
    def subnet(self) -> TrainedSubnet:
        assert self._subnet is not None
        return self._subnet

    # A round

    def begin(self, plan: Plan, reference: Plan | None, following: tuple[Plan, ...], steps: int) -> None:
        """Make the trained subnet that of `plan`, and the reference that of `reference` (None: there is none).

        following: plans of the next rounds, as far as they are known; steps: that the run has taken so far.
        """
        same, fits = plan.digest == self.trained, self._subnet is not None and self._subnet.fits(plan)
        self.trained = plan.digest
        if not same:
            self.clock = min(steps, self._layout.horizon)
        swapped = fits and bool(self._gathered) and self._gathered[0] == plan
        if swapped:
            self._swap(*self._gathered)
        elif not (fits and same):
            self._take(plan, fits)
        self._gathered = ()
        self.subnet.begin(self.clock)
        ahead = self._overlap and len(following) == 2 and all(map(self.subnet.fits, following))
        wanted = following[0] if ahead else reference
        if wanted is None or not (swapped and self._reference is not None and self._reference.plan == wanted):
            self._take_reference(wanted)
        if ahead:
            self._gathered = following
            self._ahead()  # pinned here: another thread would do it from the first GPU, whichever this process has
            self.pipeline.do(partial(self._gather_ahead, *following))

    def end(self, steps: int, round: int) -> Written:
        """End a round, of this number, of `steps` steps: everything → master, where it is once the pipeline is done.

        Returns how the newest write-back went that has come to its end: this one or, where rounds overlap, the last.
        """
        self.wait()
        before = self.written
        subnet, rounding = self.subnet, self._master.precision.rounding
        subnet.end()
        self.clock += steps
        self._squared = 0.0
        staged = self.transfer.staging(subnet.kinds, subnet.slabs, "weights")
        unloading = self.transfer.unload(subnet.slabs, staged, rounding(round, "weights"))
        for part in unloading.parts:
            self.pipeline.do(partial(self._merge_weights, part, subnet.plan))
        for moment in subnet.moments:
            slabs = subnet.moment_slabs(moment)
            staged = self.transfer.staging(subnet.moment_kinds(moment), slabs, moment)
            for part in self.transfer.unload(slabs, staged, rounding(round, moment)).parts:
                self.pipeline.do(partial(self._merge_moments, part, moment, subnet.plan))
        self.pipeline.do(partial(self._ended, unloading.excess()))
        return before if self._overlap else self.written

    @torch.no_grad()
    def reference_loss(self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """L(m′), leaving no trace: its BatchNorm statistics stay, dropout draws what the subnet will draw."""
        assert self._reference is not None
        module, before = self._reference.module, memory.random_state(self._device)
        statistics = [buffer.clone() for buffer in module.buffers()]
        try:
            return loss_fn(module, batch)
        finally:
            for buffer, was in zip(module.buffers(), statistics, strict=True):
                buffer.copy_(was)
            memory.set_random_state(self._device, before)

    def drop_reference(self) -> None:
        """Free it for the rest of the round, unless it is trained next."""
        if not self._gathered:
            self._reference = None

    def wait(self) -> None:
        """Until the background is done; raises what went wrong there. Asked by the background itself: all that was to
        precede what it does now is done."""
        if in_background():
            return
        start = perf_counter()
        try:
            self.pipeline.wait()
        finally:
            self.transfer.work.waited += perf_counter() - start

    # What it does on the way

    def _take(self, plan: Plan, fits: bool) -> None:
        """Gather a plan now."""
        self.wait()
        if not fits:
            self._subnet = None  # before the next one is made: never two
            self._subnet = self._new_subnet(self._master, plan)
            self.forward = self._subnet.module
            if self.compile:
                mode = "reduce-overhead" if self.compile == "graphs" else None
                self.forward = torch.compile(self._subnet.module, mode=mode)
        self._load(self.subnet, plan)
        for moment in self.subnet.moments if self._master.scalars else ():
            kinds, slabs = self.subnet.moment_kinds(moment), self.subnet.moment_slabs(moment)
            self.transfer.fetch(self._master.moments[moment], kinds, slabs, plan, moment)

    def _take_reference(self, plan: Plan | None) -> None:
        if plan is None:
            self._reference = None
            return
        self.wait()
        if self._reference is None or not self._reference.fits(plan):
            self._reference = None  # before the next one is made: never two
            self._reference = Subnet(self._master, plan, self._device)
        self._load(self._reference, plan)

    def _load(self, subnet: Subnet, plan: Plan) -> None:
        self.transfer.fetch(self._master.tensors, subnet.kinds, subnet.slabs, plan, "weights")
        subnet.plan = plan

    def _ahead(self) -> tuple[list[Slab], dict[str, list[Slab]]]:
        """Staging of what is gathered ahead: weights, and moments by name, of tensors that some plan slices.

        Those of the others are all trained in every round, so what waits for them is on the device.
        """
        subnet, staging = self.subnet, self.transfer.staging_ahead
        moments = {m: staging(limited(subnet.moment_kinds(m), self._sampled), m) for m in subnet.moments}
        return staging(limited(subnet.kinds, self._sampled), "weights"), moments

    def _gather_ahead(self, following: Plan, later: Plan) -> None:
        """Moments of the next round's plan and weights of the one after. In the background, as is finding out what they
        share with the plan that is being trained."""
        weights, moments = self._ahead()
        for moment, staged in moments.items():
            self.transfer.gather(self._master.moments[moment], map(Slab.whole, staged), following)
        self.transfer.gather(self._master.tensors, map(Slab.whole, weights), later)
        for plan in (following, later):
            for name in self._sampled:
                _ = self.subnet.plan.shared(plan, name)

    def _swap(self, plan: Plan, later: Plan) -> None:
        """The reference's values become the trained subnet's, what was gathered becomes the reference's."""
        subnet, reference, before = self.subnet, self._reference, self.subnet.plan
        assert reference is not None and reference.plan == plan
        names = [name for slab in subnet.slabs for name in slab]
        of_plan, of_later = (
            on_device({name: before.shared(other, name) for name in names}, self._device) for other in (plan, later)
        )
        weights, moments = self._ahead()
        for moment, staged in moments.items():
            for waiting, slab in zip(staged, subnet.moment_slabs(moment), strict=True):
                arrived = self.transfer.arrived(waiting, slab.flat.dtype)
                for name in arrived:
                    patch(arrived[name], slab[name], of_plan[name])
                    slab[name].copy_(arrived[name])
        for waiting, slab, beside in zip(weights, subnet.slabs, reference.slabs, strict=True):
            arrived = self.transfer.arrived(waiting, slab.flat.dtype)
            for name in slab:
                patch(beside[name], slab[name], of_plan[name])
            for name in arrived:
                patch(arrived[name], slab[name], of_later[name])
            slab.flat.copy_(beside.flat)
            for name in arrived:
                beside[name].copy_(arrived[name])
        subnet.plan, reference.plan = plan, later

    def _merge_weights(self, part: Part, plan: Plan) -> None:
        self.broken = True
        self._squared += self.transfer.merge([part], self._master.tensors, plan, delta=True)

    def _merge_moments(self, part: Part, moment: str, plan: Plan) -> None:
        self.transfer.merge([part], self._master.moments[moment], plan)

    def _ended(self, excess: float) -> None:
        # Of rounded values: an unbiased estimate, less what rounding adds to it in expectation.
        delta_norm = max(0.0, self._squared - excess) ** 0.5
        self.written, self.broken = Written(delta_norm, replace(self.transfer.work)), False

    def clear(self) -> None:
        """Forget what is on the device."""
        self.pipeline.drain()
        self._subnet = self._reference = self.forward = None
        self._gathered = ()

    def close(self) -> None:
        self.pipeline.close()
        self.clear()
        self.transfer.close()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device from step to step: subnet, gradients, moments, reference."""
        held = self._reference.nbytes if self._reference is not None else 0
        if self._subnet is not None:
            gradients = sum(p.numel() * p.element_size() for p in self._subnet.parameters.values())
            held += self._subnet.nbytes + self._subnet.moment_bytes + gradients
        return held
