"""Where two rounds meet: the subnet that waited is trained, and the one trained last makes room for the next to wait.

What waits was gathered before the running round ended, so it lacks that round's changes, and no others: entries shared
with the plan trained last are copied over on the device. What comes over the link then goes on beside training:
tensors are replaced once their old values have left, and training waits for the weights of the next reference where
that is evaluated, for the moments at the first optimizer step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from offload_trainer.device.elements import Index, copy_all, on_device, patch
from offload_trainer.device.streams import Event, SideStream, wait_all
from offload_trainer.device.subnet import Subnet, TrainedSubnet
from offload_trainer.device.transfer import Transfer
from offload_trainer.groups.plan import Plan
from offload_trainer.master.slab import Part, Slab

Staged = Mapping[str, Sequence[Slab]]
"""Slabs of "weights" (with the buffers), and of each moment by its name."""
Unloaded = Mapping[str, Mapping[str, Event]]
"""When the old values of each tensor have left the device, likewise."""
Places = Mapping[str, tuple[Index, Index]]
"""Of each tensor: where two plans share entries, in the one and in the other."""
ARRIVING = 2**25
"""Bytes, on the device, of neighbouring tensors that come over the link at once and are copied at once to where they
belong."""


@dataclass(frozen=True)
class Ahead:
    """What was gathered while a round trained, for the two rounds after it."""

    next_plan: Plan
    """Of the next round. Its moments are staged; its weights wait on the device."""
    after_next: Plan
    """Of the one after, whose weights are staged."""
    staged: Staged
    shared: Places
    """By `next_plan` and the plan that trained meanwhile."""
    shared_after_next: Places
    """By `after_next` and the plan that trained meanwhile."""


class Swap:
    """Hands one round over to the next, for the two subnets on one device.

    in_place: the trained subnet's tensors stay where they are, since CUDA graphs read them there, or since nothing is
        won by it; otherwise they change places with the reference's, and the next round need not wait until they left.
    """

    def __init__(self, transfer: Transfer, device: torch.device, *, in_place: bool):
        self._transfer, self._device, self._in_place = transfer, device, in_place
        self._link = SideStream(device)
        self._coming: dict[str, Event] = {}
        """What training has not waited for yet: when it will be there."""
        self._last: tuple[Event, Event] | None = None
        """Begin and end of what came over the link last."""

    def prepare(self, subnet: Subnet, next_plan: Plan, after_next: Plan, staged: Staged) -> Ahead:
        """For the swap after the running round: find out what its plan shares with the two that follow.

        In the background; from then on staging may be written.
        """
        if self._last is not None:
            begin, end = self._last
            end.synchronize()
            self._transfer.work.link += end.seconds_since(begin)
            self._last = None
        names = [name for slab in subnet.slabs for name in slab]
        with self._link.open():  # a copy on the training stream would wait for the steps that are queued there
            shared, shared_after_next = (
                on_device({name: subnet.plan.shared(other, name) for name in names}, self._device)
                for other in (next_plan, after_next)
            )
        return Ahead(next_plan, after_next, staged, shared, shared_after_next)

    def do(self, subnet: TrainedSubnet, reference: Subnet, ahead: Ahead, unloaded: Unloaded, clock: int) -> None:
        """Begin the round of the reference's plan, and have the one after it wait. The host does not wait.

        clock: see `TrainedSubnet.load_state`.
        """
        self.hold("weights", "moments")
        staged = ahead.staged
        slabs = list(zip(staged["weights"], subnet.slabs, reference.slabs, strict=True))
        for _, slab, beside in slabs:
            for name in slab:
                # The indices lie in memory of the other stream, which waits for this (below) before it uses that again.
                patch(beside[name], slab[name], ahead.shared[name])
        if not self._in_place:
            subnet.exchange(reference)
        with self._link.after(Event(self._device)):
            begin = Event(self._device, timed=True)
            for waiting, slab, beside in slabs:
                self._replace(
                    slab, waiting, ahead.shared_after_next, unloaded["weights"], beside if self._in_place else None
                )
            wait_all(unloaded["weights"])  # of tensors that no plan slices, too: they are trained where they are
            self._coming["weights"] = Event(self._device)
            for moment in subnet.moments:
                for waiting, slab in zip(staged[moment], subnet.slabs_of(moment), strict=True):
                    self._replace(slab, waiting, ahead.shared, unloaded[moment])
                wait_all(unloaded[moment])
            subnet.load_state(clock)
            self._coming["moments"] = Event(self._device, timed=True)
        self._last = begin, self._coming["moments"]
        subnet.plan, reference.plan = ahead.next_plan, ahead.after_next
        if self._in_place:
            self.hold("weights")

    def _replace(
        self, old: Slab, waiting: Slab, places: Places, unloaded: Mapping[str, Event], after: Slab | None = None
    ) -> None:
        """Old values ← what waits in staging, some tensors after others, once the old ones have left the device.

        after: given where tensors stay in place: old ← after, and after ← what waits.
        """
        for part in waiting.parts(ARRIVING * waiting.flat.element_size() // old.flat.element_size()):
            self._replace_part(old, part, places, unloaded, after)

    def _replace_part(  # apart: the memory of one part is free before that of the next is taken
        self, old: Slab, part: Part, places: Places, unloaded: Mapping[str, Event], after: Slab | None
    ) -> None:
        arrived = self._transfer.arrived(part, old.flat.dtype)
        for name, new in arrived.items():
            patch(new, old[name], places[name])
        wait_all({name: unloaded[name] for name in arrived})
        if after is not None:
            copy_all(old, {name: after[name] for name in arrived})
        copy_all(old if after is None else after, arrived)

    def hold(self, *what: str) -> None:
        """Training waits for "weights" or "moments" that are under way. The host does not."""
        for one in what:
            event = self._coming.pop(one, None)
            if event is not None:
                self._transfer.hold(event)
