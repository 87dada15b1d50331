"""The end of a run of several ranks that is broken off: all of them end, after the same step.

One that stopped by itself would leave the others in an exchange of gradients that never comes to its end; and one that
has ended has a launcher kill the others, of which the first may be writing a checkpoint.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from offload_trainer.device import ranks
from offload_trainer.device.streams import HostCopy
from offload_trainer.errors import NotFinite


@contextmanager
def stopping_together(accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Yields what every rank calls once a step; it raises KeyboardInterrupt on all if any was interrupted a step ago:
    so the host waits for the device's step before, not for this one. What was asked in the last is answered at the end.

    Until the block is left nothing else is made of an interrupt. What all ranks raise, that or `NotFinite`, leaves it
    when it has come to the end of the block on all of them. One rank alone is interrupted as ever.
    """
    if accelerator.num_processes == 1:
        yield lambda: None
        return
    asked = agreed = False
    last: HostCopy | None = None

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    def stop_if_agreed() -> None:
        nonlocal agreed
        agreed = last is not None and bool(last.result()["count"])
        if agreed:
            raise KeyboardInterrupt

    def stop_if_asked() -> None:
        nonlocal last
        stop_if_agreed()
        last = ranks.count(accelerator, asked)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_if_asked
        stop_if_agreed()
    except NotFinite:
        agreed = True
        raise
    finally:
        if agreed:
            accelerator.wait_for_everyone()
        for number, handler in before.items():
            signal.signal(number, handler)
