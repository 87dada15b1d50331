"""Ctrl-C and SIGTERM in a run of several ranks: all stop after the same step.

One that stopped by itself would leave the others in an exchange of gradients that never comes to its end.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from offload_trainer.device import ranks


@contextmanager
def stopping_together(accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Yields what every rank calls once a step; it raises KeyboardInterrupt on all if any was interrupted since.

    Until the block is left nothing else is made of an interrupt, and it is left when all ranks leave it: the first may
    be writing a checkpoint, and a launcher kills what outlives another rank. One rank alone is interrupted as ever.
    """
    if accelerator.num_processes == 1:
        yield lambda: None
        return
    asked = agreed = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    def stop_if_asked() -> None:
        nonlocal agreed
        agreed = ranks.anywhere(accelerator, asked)
        if agreed:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_if_asked
    finally:
        if agreed:
            accelerator.wait_for_everyone()
        for number, handler in before.items():
            signal.signal(number, handler)
