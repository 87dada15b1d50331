"""DESIGN §10, 6 and 7: whatever is done with an offloader, in whatever order, rounds that overlap change nothing."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_trainer import Offloader, UserError, snapshot
from offload_trainer.device import workbench
from offload_trainer.device.swap import Swap
from offload_trainer.master import CheckpointStore, find_checkpoint
from tests.test_pipeline import CASES, MODELS, make, result


class Session:
    """One offloader in the hands of a user, and all that it showed. place: puts a batch on the device."""

    def __init__(
        self, kind: str, case: str, folder: Path, *, overlap: bool, place: Callable[[Any], Any] = lambda batch: batch
    ):
        self.trainer: Offloader = make(kind, overlap=overlap, **CASES[case])
        self.batches, self.store = map(place, MODELS[kind][1](300)), CheckpointStore(folder)
        self.seen: list[Any] = []
        self.failing = self.interrupting = False
        loss_fn, take = self.trainer.loss_fn, self.trainer._credit_sums.take

        def failing_loss(module: Any, batch: Any) -> Any:
            loss = loss_fn(module, batch)
            if self.failing and module is not self.trainer._bench.forward:
                self.failing = False
                raise ArithmeticError
            return loss

        def interrupted_take() -> Any:
            if self.interrupting:
                raise KeyboardInterrupt
            return take()

        self.trainer.loss_fn = failing_loss
        self.trainer._credit_sums.take = interrupted_take  # type: ignore[method-assign]

    def step(self) -> None:
        loss = self.trainer.loss(next(self.batches))
        self.trainer.accelerator.backward(loss)
        self.trainer.step()
        self.seen.append(loss.item())

    def steps(self) -> None:
        for _ in range(4):
            self.step()

    def loss_without_a_step(self) -> None:
        loss = self.trainer.loss(next(self.batches))
        self.trainer.accelerator.backward(loss)
        self.seen.append(loss.item())

    def failing_reference(self) -> None:
        self.failing = True
        try:
            self.step()
        except ArithmeticError:
            self.seen.append("failed")
        self.failing = False

    def interrupt_at_the_end(self) -> None:
        """When what a round left is on its way, and not yet in the master: as if the round had never begun."""
        self.interrupting = True
        try:
            self.steps()
        except KeyboardInterrupt:
            self.seen += ["interrupted", self.trainer.steps]
        self.interrupting = False

    def not_a_number(self) -> None:
        batch = next(self.batches)
        if not isinstance(batch, tuple):  # token ids are always numbers
            return
        self.trainer.accelerator.backward(self.trainer.loss((batch[0] * float("nan"), batch[1])))
        try:
            self.trainer.step()
            self.trainer.finish_round()
        except UserError as error:
            self.seen.append(str(error))

    def look(self) -> None:
        self.seen += [self.trainer.plan.digest, *(t.clone() for t in self.trainer.master.values())]

    def ask(self) -> None:
        """At times when a round has just ended and nobody has waited for it."""
        self.seen.append(self.trainer.report.difference)

    def export(self) -> None:
        self.seen += [p.detach().clone() for p in self.trainer.export().parameters()]

    def finish(self) -> None:
        self.trainer.finish_round()

    def settle(self) -> None:
        self.trainer.settle()

    def save(self) -> None:
        snapshot.save(self.trainer, self.store)

    def save_meanwhile(self) -> None:
        if self.trainer.between_rounds:
            snapshot.save_meanwhile(self.trainer, self.store)

    def restore(self) -> None:
        self.trainer.master  # noqa: B018  the background may be writing a checkpoint
        if not self.store.is_empty():
            snapshot.restore(self.trainer, find_checkpoint(self.store.folder))


DEEDS: list[Callable[[Session], None]] = [
    *[Session.steps, Session.step] * 4,
    *(
        Session.loss_without_a_step,
        Session.failing_reference,
        Session.not_a_number,
        Session.look,
        Session.ask,
        Session.export,
    ),
    *(Session.interrupt_at_the_end, Session.finish, Session.save, Session.save_meanwhile, Session.restore),
]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_done_rounds_that_overlap_change_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(seed, tmp_path, monkeypatch)


def compare(
    seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Any], Any] = lambda b: b
) -> None:
    """What chance has somebody do, with rounds that overlap and with others."""
    chance = random.Random(seed)
    kind, case, in_place = chance.choice(list(MODELS)), chance.choice(list(CASES)), chance.random() < 0.5
    deeds = chance.choices(DEEDS, k=14)
    if chance.random() < 0.3:
        deeds.insert(chance.randrange(14), Session.settle)
    monkeypatch.setattr(workbench, "Swap", lambda *arguments, **_: Swap(*arguments, in_place=in_place))
    sessions = []
    for overlap in (False, True):
        session = Session(kind, case, folder / str(overlap), overlap=overlap, place=place)
        with session.trainer as trainer:
            torch.manual_seed(5)
            for deed in deeds:
                deed(session)
            trainer.finish_round()
            session.seen += [trainer.steps, trainer.rounds, *result(trainer).values()]
            sessions.append(session)
    one, other = (dict(enumerate(session.seen)) for session in sessions)
    what = f"{kind}, {case}, in place: {in_place}, {[deed.__name__ for deed in deeds]}"
    assert len(one) == len(other), what
    for place, value in one.items():
        same = torch.equal(value, other[place]) if isinstance(value, torch.Tensor) else value == other[place]
        assert same, f"at {place} of {len(one)}: {what}"
