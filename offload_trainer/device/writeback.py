"""The way of a finished round's values to the master: off the device, then merged in, beside the next round."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from offload_trainer.device.pipeline import Pipeline
from offload_trainer.device.streams import Event, wait_all
from offload_trainer.device.subnet import TrainedSubnet
from offload_trainer.device.transfer import Transfer, Unloading, Work
from offload_trainer.groups.plan import Plan
from offload_trainer.master import Master


class WriteBack:
    """Subnet → staging with `unload`, staging → master with `merge`: between the two a round may still be given up.

    overlap: the second goes on in the pipeline's background.
    """

    def __init__(self, master: Master, transfer: Transfer, pipeline: Pipeline, *, overlap: bool):
        self._master, self._transfer, self._pipeline, self._overlap = master, transfer, pipeline, overlap
        self.unloaded: dict[str, Mapping[str, Event]] = {}
        """When the values of the last round are off the device: of "weights" and moments, by tensor."""
        self._unloading: Iterable[tuple[str, Unloading, Plan]] = ()
        self._held: list[tuple[Event, Event]] = []
        """Where that round was held by transfers."""
        self._squared = 0.0
        """Σ (new − old)² of the weights that were merged last."""
        self.delta_norm = 0.0
        """Of what the last that came to its end changed in the master."""
        self.work = Work()
        """Of all transfers until then."""
        self.broken = False
        """One was begun and has not come to its end."""

    def unload(self, subnet: TrainedSubnet, round: int) -> None:
        """The values of a round of this number leave the device; may be under way still."""
        self.unloaded, self._held = {}, self._transfer.held()
        unloading = self._unloads(subnet, round)
        # Where nothing overlaps all share one staging, so each is unloaded when the one before is in the master.
        self._unloading = list(unloading) if self._overlap else unloading

    def _unloads(self, subnet: TrainedSubnet, round: int) -> Iterator[tuple[str, Unloading, Plan]]:
        for what in ("weights", *subnet.moments):
            slabs, layouts = subnet.slabs_of(what), subnet.layouts_of(what)
            staged = self._transfer.staging(layouts, slabs, what)
            one = self._transfer.unload(slabs, staged, self._master.precision.rounding(round, what))
            self.unloaded[what] = one.unloaded
            yield what, one, subnet.plan

    def merge(self) -> tuple[Work, float]:
        """What has left → master, where it is once the pipeline is done. For when the round's steps are done.

        Returns `work` and `delta_norm` as of this one or, where rounds overlap, of the one before.
        """
        before, self.broken = (self.work, self.delta_norm), True
        self._transfer.count(self._held)
        for what, unloading, plan in self._unloading:
            self._pipeline.do(partial(self._merge_one, what, unloading, plan))
        self._pipeline.do(self._merged)
        self._unloading = ()
        return before if self._overlap else (self.work, self.delta_norm)

    def _merge_one(self, what: str, unloading: Unloading, plan: Plan) -> None:
        if what == "weights":
            squared = self._transfer.merge(unloading.parts, self._master.tensors, plan, delta=True)
            # Of rounded values: an unbiased estimate, less what rounding adds to it in expectation.
            self._squared = max(0.0, squared - unloading.excess())
        else:
            self._transfer.merge(unloading.parts, self._master.moments[what], plan)

    def _merged(self) -> None:
        self.delta_norm, self.work, self.broken = self._squared**0.5, replace(self._transfer.work), False

    def hold(self) -> None:
        """Training waits until all has left, the host does not."""
        for events in self.unloaded.values():
            wait_all(events)
        self.unloaded = {}

    def give_up(self) -> None:
        """What has left does not reach the master."""
        self._unloading, self.unloaded = (), {}
