"""The device's side of a round: the subnet that is trained, the one it is compared with, and their transfers.

Where rounds overlap, three plans are under way. The plan of the round is trained. The next round's lies on the device
as well, weights only, and is the reference. The one after that is gathered on the host in the background, beside the
next round's moments (see swap.py for what happens between two rounds).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offload_trainer import memory
from offload_trainer.device.movers import Mover
from offload_trainer.device.pipeline import Pipeline, in_background
from offload_trainer.device.processes import transfer_threads
from offload_trainer.device.subnet import Subnet, TrainedSubnet
from offload_trainer.device.swap import Ahead, Swap
from offload_trainer.device.transfer import Transfer, limited
from offload_trainer.device.writeback import WriteBack
from offload_trainer.groups.plan import Plan
from offload_trainer.master import Master, Slab
from offload_trainer.master.interrupts import defer_interrupts
from offload_trainer.master.moments import OptimizerFactory, StateSpec
from offload_trainer.randomness import random_state, set_random_state

Compile = bool | Literal["graphs"]


class Workbench:
    """Puts plans on the device and their results back. Tensors are reused in place while plans keep their shapes.

    sampled: the tensors that some plan slices, so that their entries differ in age.
    overlap: transfers go on while a round trains, as far as plans keep their shapes and are known ahead.
    """

    def __init__(
        self,
        master: Master,
        device: torch.device,
        factory: OptimizerFactory,
        state_spec: StateSpec,
        *,
        sampled: frozenset[str],
        compile: Compile,
        overlap: bool,
        mover: Mover,
    ):
        self._master, self._device, self._overlap = master, device, overlap
        self._state_spec, self._sampled, self.compile = state_spec, sampled, compile
        self._new_subnet = partial(
            TrainedSubnet, device=device, factory=factory, state_spec=state_spec, sampled=sampled
        )
        self.transfer = Transfer(device, overlap=overlap, mover=mover)
        self._swap = Swap(self.transfer, device, in_place=compile == "graphs" or device.type == "cpu")
        self.pipeline = Pipeline(device, overlap=overlap, threads=transfer_threads(device, overlap=overlap))
        self.writeback = WriteBack(master, self.transfer, self.pipeline, overlap=overlap)
        self._subnet: TrainedSubnet | None = None
        self._reference: Subnet | None = None
        self._next_plan: Plan | None = None
        """Plan of the next round, whose weights are the reference's."""
        self._ahead: Future[Ahead | None] | None = None
        """For the next two rounds."""
        self._resident: Plan | None = None
        """Of which the subnet holds what the master holds, between two rounds."""
        self.forward: Any = None
        """The subnet's module as it is called: compiled where that was asked for."""
        self.clock = 0
        """Steps of the moments of entries of mixed age (see master/moments.py)."""
        self.last_digest = ""
        """Digest of the plan trained last: a plan that is trained twice running keeps its clock."""

    @property
    def subnet(self) -> TrainedSubnet:
        assert self._subnet is not None
        return self._subnet

    @property
    def ahead(self) -> Ahead | None:
        """What was gathered for the next two rounds; between two rounds."""
        return self._ahead and self._ahead.result()

    # A round

    def begin(self, plan: Plan, reference: Plan | None, next_plan: Plan | None, steps: int) -> None:
        """Make the trained subnet that of `plan`, and the reference that of `reference` (None: there is none).

        next_plan: plan of the next round, if it is known; steps: that the run has taken so far.
        """
        resident, ahead = self._resident, self.ahead
        self._resident = self._ahead = None
        self.clock = self.clock if plan.digest == self.last_digest else min(steps, self._state_spec.horizon)
        self.last_digest = plan.digest
        if ahead is not None and ahead.next_plan == plan:
            assert self._reference is not None and self._reference.plan == plan
            with defer_interrupts():
                self._swap.do(self.subnet, self._reference, ahead, self.writeback.unloaded, self.clock)
        else:
            ahead = None
            self._hold_for_link()
            if resident != plan:
                self._gather_subnet(plan)
            self.subnet.load_state(self.clock)
        self._next_plan = next_plan if self._overlap and next_plan is not None and self.subnet.fits(next_plan) else None
        wanted = self._next_plan or reference
        if ahead is None or ahead.after_next != wanted:
            self._gather_reference(wanted)

    def look_ahead(self, draw: Callable[[], Plan | None]) -> None:
        """Gather for the next two rounds while this one trains. draw: the plan of the second, if it is known."""
        staged = self._staging_ahead()  # pinned here: another thread would do it from the first GPU
        self._ahead = self.pipeline.do(partial(self._gather_ahead, self._next_plan, draw, staged))

    @torch.no_grad()
    def unload(self, steps: int, round: int) -> None:
        """The values of a round, of this number and of `steps` steps, leave for staging; after `wait`. The host waits
        for nothing, unless an optimizer keeps numbers on the device.

        `writeback.merge` follows, or `clear` if they are not to reach the master.
        """
        self.subnet.reattach()
        self.subnet.save_state()
        self.clock += steps
        self.writeback.unload(self.subnet, round)
        self._resident = self.subnet.plan

    def step(self) -> None:
        """An optimizer step of the subnet, for which its moments must have arrived."""
        self._swap.hold("moments")
        self.subnet.step()

    @torch.no_grad()
    def reference_loss(self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """L(m′), leaving no trace: its BatchNorm statistics stay, dropout draws what the subnet will draw."""
        assert self._reference is not None
        self._swap.hold("weights")
        module, before = self._reference.module, random_state(self._device)
        statistics = [buffer.clone() for buffer in module.buffers()]
        try:
            return loss_fn(module, batch)
        finally:
            self._reference.reattach(keep=False)
            for buffer, was in zip(module.buffers(), statistics, strict=True):
                buffer.copy_(was)
            set_random_state(before, self._device)

    def drop_reference(self) -> None:
        """Free it for the rest of the round, unless it is trained next."""
        if self._next_plan is None:
            self._hold_for_link()
            self._reference = None

    def wait(self) -> None:
        """Until the background thread is done; raises what went wrong there. Asked by that thread itself: at once,
        since its earlier jobs are done."""
        if in_background():
            return
        start = perf_counter()
        try:
            self.pipeline.wait()
        except BaseException:
            self._ahead = None  # what was to follow what failed was left out
            raise
        finally:
            self.transfer.work.waited += perf_counter() - start

    # What it does on the way

    def _gather_subnet(self, plan: Plan) -> None:
        """Gather a plan now."""
        self.wait()
        self._hold_for_link()
        if self._subnet is None or not self._subnet.fits(plan):
            self._subnet = None  # before the next one is made: never two
            self._subnet = self._new_subnet(self._master, plan)
            self.forward = self._subnet.module
            if self.compile:
                mode = "reduce-overhead" if self.compile == "graphs" else None
                self.forward = torch.compile(self._subnet.module, mode=mode)
        self._load(self.subnet, plan)
        for moment in self.subnet.moments if self._master.scalars else ():
            layouts, slabs = self.subnet.layouts_of(moment), self.subnet.slabs_of(moment)
            self.transfer.fetch(self._master.moments[moment], layouts, slabs, plan, moment)

    def _hold_for_link(self) -> None:
        """Training waits until nothing crosses the link; the host does not. Before memory there is used for more."""
        self._swap.hold("weights", "moments")
        self.writeback.hold()

    def _gather_reference(self, plan: Plan | None) -> None:
        self._hold_for_link()
        if plan is None:
            self._reference = None
            return
        self.wait()
        if self._reference is None or not self._reference.fits(plan):
            self._reference = None  # before the next one is made: never two
            self._reference = Subnet(self._master, plan, self._device)
        self._load(self._reference, plan)

    def _load(self, subnet: Subnet, plan: Plan) -> None:
        self.transfer.fetch(self._master.tensors, subnet.layouts, subnet.slabs, plan, "weights")
        subnet.plan = plan

    def _staging_ahead(self) -> dict[str, list[Slab]]:
        """Staging of weights, and of moments by name; of nothing if no plan waits. Without tensors that no plan slices:
        all of those is trained in every round, so what waits is on the device."""
        staging, layouts = self.transfer.staging_ahead, self.subnet.layouts_of
        wanted = () if self._next_plan is None else ("weights", *self.subnet.moments)
        return {what: staging(limited(layouts(what), self._sampled), what) for what in wanted}

    def _gather_ahead(
        self, next_plan: Plan | None, draw: Callable[[], Plan | None], staged: dict[str, list[Slab]]
    ) -> Ahead | None:
        """Moments of the next round's plan and weights of the one after, where both fit. In the background."""
        after_next = draw()
        if next_plan is None or after_next is None or not self.subnet.fits(after_next):
            return None
        ahead = self._swap.prepare(self.subnet, next_plan, after_next, staged)
        for moment in self.subnet.moments:
            self.transfer.gather(self._master.moments[moment], map(Slab.whole, staged[moment]), next_plan)
        self.transfer.gather(self._master.tensors, map(Slab.whole, staged["weights"]), after_next)
        return ahead

    def state_dict(self) -> dict[str, Any]:
        """What outlasts a round beside the master."""
        return {"clock": self.clock, "trained": self.last_digest, "delta_norm": self.writeback.delta_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clear()
        self.clock, self.last_digest = state["clock"], state["trained"]
        self.writeback.delta_norm = state["delta_norm"]

    def clear(self) -> None:
        """Forget what is on the device."""
        self.pipeline.drain()
        memory.synchronize(self._device)  # what crosses the link may be on its way
        self._subnet = self._reference = self.forward = None
        self._next_plan = self._ahead = self._resident = None
        self.writeback.give_up()

    def close(self) -> None:
        self.pipeline.close()
        self.clear()
        self.transfer.close()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device from step to step: subnet, gradients, moments, reference."""
        trained = self._subnet.trained_bytes if self._subnet is not None else 0
        return trained + (self._reference.nbytes if self._reference is not None else 0)
