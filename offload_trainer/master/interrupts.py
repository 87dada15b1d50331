"""Blocks that an interrupt must not divide."""

import signal
import threading
from contextlib import contextmanager
from typing import Any


@contextmanager
def defer_interrupts():
    """Hold an interrupt (Ctrl-C, SIGTERM where it raises) back until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return
    held: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupting: dict[int, Any] = {number: handler for number, handler in before.items() if callable(handler)}
    holding = True

    def hold(number: int, frame: Any) -> None:
        if holding:
            held.append(number)
        else:  # it came while the handlers were put back
            interrupting[number](number, frame)

    try:
        for number in interrupting:
            signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in interrupting.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)
