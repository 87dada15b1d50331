"""The rounds of a run, one after another: when each begins, when it ends, and when it is known what it showed.

A round ends in two steps. Its values leave the device (`end`); and what it showed is learned, and the values go on to
the master (`conclude`), for which the host must wait until the device has done the round's last step. Where the next
round is foreseen, that has been given its first step by then, so the device has something to do meanwhile.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from offload_trainer.agenda import Agenda, Entry
from offload_trainer.device import ranks
from offload_trainer.device.credit_sums import CreditSums
from offload_trainer.device.pipeline import in_background
from offload_trainer.device.workbench import Workbench
from offload_trainer.errors import NotFinite
from offload_trainer.master import Master
from offload_trainer.master.interrupts import defer_interrupts
from offload_trainer.randomness import random_state, set_random_state
from offload_trainer.round import Boundary, Ended, Round
from offload_trainer.structure import Structure
from offload_trainer.timing import RoundReport, Spent, Transfers


class Rounds:
    """What changes from round to round, all of it: `steps`, `finished` and the round under way, the agenda, s, the
    bench, the master's numbers."""

    def __init__(
        self,
        accelerator: Accelerator,
        agenda: Agenda,
        structure: Structure,
        credit_sums: CreditSums,
        master: Master,
        bench: Workbench,
    ):
        self._accelerator, self._device = accelerator, accelerator.device
        self._agenda, self._structure, self._credit_sums = agenda, structure, credit_sums
        self._master, self._bench = master, bench
        self.steps = 0
        """Optimizer steps taken."""
        self.finished = 0
        """Rounds."""
        self.under_way: Round | None = None
        """None between two rounds."""
        self._ended: Ended | None = None
        """The last round, until it is concluded."""
        self._report = RoundReport()
        self.spent, self.transfers = Spent(), Transfers()
        self._boundary: Boundary | None = None
        """Where the last round was concluded; None while its values go on to the master."""
        self.set_boundary()

    def begin(self) -> Round:
        """The next round: its plan on the device, and what it is compared with."""
        entry = self._foreseen()
        if entry is None:
            self.conclude()
            entry = self._agenda.begin(self.steps, self.finished)
        with self.spent.on("gather"):
            self._bench.begin(entry.plan, entry.reference, entry.next_plan, self.steps)
        self.under_way = Round(
            paired=entry.reference is not None,
            learns=not self._agenda.settled,
            whole_batches=self._bench.compile == "graphs",
        )
        return self.under_way

    def _foreseen(self) -> Entry | None:
        """The next round, if it may begin before the host knows what the last one showed: all it needs is there."""
        if self._ended is None:
            return None
        ahead = self._bench.ahead
        return None if ahead is None else self._agenda.foresee(ahead.next_plan, ahead.after_next)

    def first_step_taken(self) -> None:
        """Of the round under way: the host may wait for the last one now, and look ahead to the next two."""
        self.conclude()
        self._bench.look_ahead(self._agenda.look_ahead)

    def end(self) -> None:
        """The round under way has taken its steps. Raises `NotFinite` as `conclude` does, unless that comes later."""
        running, subnet = self.under_way, self._bench.subnet
        assert running is not None
        with self.spent.on("writeback"):
            self._bench.wait()  # for the round before, a checkpoint of it, and what was gathered meanwhile
        boundary = self._completed()
        subnet.optimizer.zero_grad()  # of a batch that was never followed by a step
        try:
            running.send_outcome(
                self._accelerator, subnet.is_finite(), self._credit_sums.take()
            )  # leaves before all else
            with self.spent.on("writeback"):
                ranks.average_buffers(self._accelerator, subnet.module)
                self._bench.unload(running.steps, self.finished)
            with defer_interrupts():
                self.finished, self.under_way = self.finished + 1, None
                self._ended = Ended(running, subnet.plan, self._numbers(), random_state(self._device))
        except BaseException:
            if self._ended is None:
                self.load(boundary)  # as if the round had never begun
            raise
        if self._foreseen() is None:
            self.conclude()

    def conclude(self) -> None:
        """If a round has ended: what it showed is learned, and its values go on to the master. The host waits for the
        device to have done its last step.

        Raises `NotFinite` if a loss or a weight was not: then all is as if the round had never begun.
        """
        ended = self._ended
        if ended is None:
            return
        boundary, steps = self._completed(), ended.numbers["steps"]
        try:
            difference, means = ended.round.outcome(steps, ended.numbers["rounds"] - 1)
        except NotFinite:
            self.load(boundary)
            raise
        credit = None if means is None else self._credit_sums.by_group(means, ended.plan)
        with defer_interrupts():  # an interrupt waits: half a write-back would be no state at all
            self._boundary = None
            with self.spent.on("writeback"):
                work, delta_norm = self._bench.writeback.merge()
            self._report = self.transfers.report(work, delta_norm, difference)
            self._agenda.learn(ended.plan, ended.round.steps, steps, difference, credit)
            self._ended, self._boundary = None, self._at(ended.numbers, ended.random)
            if self.under_way is not None:
                self._agenda.catch_up(steps)

    def wait(self) -> None:
        """Until the last round is in the master. Asked by the background thread, whose jobs are in order: at once."""
        if not in_background():
            self.conclude()
            self._bench.wait()

    def finish(self) -> None:
        """End the round under way, however few steps it had; afterwards the master is complete."""
        if self.under_way is not None and self.under_way.steps:
            self.end()
        self.wait()
        self.transfers.end(self._bench.writeback.work)

    @property
    def report(self) -> RoundReport:
        """Of the last finished round."""
        self.conclude()
        return self._report

    # What a checkpoint needs beside the master and its moments

    def boundary(self) -> Boundary:
        """See `Offloader.boundary`."""
        self.conclude()
        return self._completed()

    def at_boundary(self, work: Callable[[Boundary], object]) -> None:
        """See `Offloader.at_boundary`."""
        assert self.under_way is None
        self.conclude()
        boundary = self._boundary
        assert boundary is not None
        self._bench.pipeline.do(lambda: work(boundary.with_numbers(delta_norm=self._bench.writeback.delta_norm)))

    def set_boundary(self) -> None:
        """The state it is in now is the one to go on from."""
        self._boundary = self._at(self._numbers(), random_state(self._device))

    def load(self, boundary: Boundary) -> None:
        """See `Offloader.load_boundary`."""
        numbers = boundary.numbers
        self._bench.load_state_dict(numbers)
        self._credit_sums.clear()
        self.steps, self.finished = numbers["steps"], numbers["rounds"]
        self._agenda.load_state_dict(numbers["agenda"])
        self._report = RoundReport(**numbers["report"])
        self._master.scalars = {name: dict(scalars) for name, scalars in numbers["scalars"].items()}
        self._structure.load_state_dict(dict(boundary.structure))
        set_random_state(boundary.random, self._device)
        self.under_way, self._ended, self._boundary = None, None, boundary

    def _completed(self) -> Boundary:
        """The last one, when all of it is in the master."""
        self._bench.pipeline.drain()
        if self._boundary is None or self._bench.writeback.broken:
            raise RuntimeError("a write-back was broken off: the master is not that of any step")
        return self._boundary.with_numbers(delta_norm=self._bench.writeback.delta_norm)

    def _at(self, numbers: Mapping[str, Any], random: Mapping[str, Tensor]) -> Boundary:
        return Boundary({**numbers, "report": asdict(self._report)}, self._structure.state_dict(), random)

    def _numbers(self) -> dict[str, Any]:
        """Of a boundary, but for what the round before it showed."""
        numbers = {"steps": self.steps, "rounds": self.finished, "agenda": self._agenda.state_dict()}
        return (
            numbers
            | self._bench.state_dict()
            | {"scalars": {name: dict(scalars) for name, scalars in self._master.scalars.items()}}
        )
