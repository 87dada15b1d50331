"""Blocks that an interrupt does not divide."""

import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload_trainer.errors import NotFinite, UserError
from offload_trainer.master.interrupts import defer_interrupts
from offload_trainer.stopping import stopping_together


@pytest.mark.parametrize("at", [0, 1], ids=["while handlers are put in place", "while they are put back"])
def test_an_interrupt_beside_an_undivided_block_leaves_the_handlers(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    whole, calls = signal.signal, [0]

    def interrupted(number: int, handler: Any) -> Any:
        result = whole(number, handler)
        calls[0] += 1
        if calls[0] == 1 + 2 * at:  # the other signal, of which the handler is the old one
            signal.raise_signal(signal.SIGTERM if at == 0 else signal.SIGINT)
        return result

    whole(signal.SIGTERM, signal.default_int_handler)
    try:
        monkeypatch.setattr(signal, "signal", interrupted)
        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            pass
        monkeypatch.setattr(signal, "signal", whole)
        for number in before:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
                time.sleep(1)
    finally:
        for number, handler in before.items():
            whole(number, handler)


@pytest.mark.parametrize(("error", "waits"), [(NotFinite, True), (UserError, False)])
def test_ranks_that_fail_together_wait_for_one_another(error: type[UserError], waits: bool) -> None:
    """The first may be writing a checkpoint, and the end of another would have it killed; one that fails alone waits
    for nobody."""
    waited: list[bool] = []
    ranks: Any = SimpleNamespace(num_processes=2, wait_for_everyone=lambda: waited.append(True))
    with pytest.raises(error), stopping_together(ranks):
        raise error("")
    assert waited == [True] * waits


def test_an_interrupt_in_the_last_step_is_not_lost() -> None:
    alike: Any = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), reduce=lambda value, reduction: 2 * value, wait_for_everyone=list
    )
    steps = []
    with pytest.raises(KeyboardInterrupt), stopping_together(alike) as stop_if_asked:
        for step in range(3):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            stop_if_asked()
            steps.append(step)
    assert steps == [0, 1, 2]
