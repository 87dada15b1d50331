"""Work that goes on while the device trains."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from offload_trainer import memory

NAME = "transfers"
Result = TypeVar("Result")


def in_background() -> bool:
    """Whether a `Pipeline`'s thread asks."""
    return threading.current_thread().name.startswith(NAME)


class Pipeline:
    """Does what it is given in order: on one background thread or, without `overlap`, at once.

    What a piece of work raises, with its traceback, the next `wait` raises, once; what was to follow it is left out.
    device: current in the background thread. threads: of torch's operations there.
    """

    def __init__(self, device: torch.device, *, overlap: bool, threads: int = 1):
        self._worker: ThreadPoolExecutor | None = None
        if overlap:
            self._worker = ThreadPoolExecutor(1, NAME)
            self._worker.submit(torch.set_num_threads, threads)
            self._worker.submit(memory.use, device)
        self._given: list[Future[Any]] = []
        self._failed = False

    def do(self, work: Callable[[], Result]) -> Future[Result | None]:
        """What it returns is there after `wait`; None where it was left out."""
        if self._worker is None:
            done: Future[Result | None] = Future()
            done.set_result(work())
            return done
        self._given.append(self._worker.submit(self._unless_failed, work))
        return self._given[-1]

    @torch.no_grad()
    def _unless_failed(self, work: Callable[[], Result]) -> Result | None:
        if self._failed:
            return None
        try:
            return work()
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        """Until all of it is done."""
        while self._given:
            first = self._given[0]
            try:
                first.result()  # an interrupt while it waits leaves the work where it is
            except BaseException:
                if first.done():
                    self.drain()
                    self._given.clear()
                    self._failed = False
                raise
            self._given.pop(0)

    def drain(self) -> None:
        """Until nothing is being done; errors stay for `wait`."""
        for work in self._given:
            work.exception()

    def close(self) -> None:
        """Finish what was given; an interrupt leaves out what has not begun."""
        try:
            self.drain()
        finally:
            if self._worker is not None:
                self._worker.shutdown(cancel_futures=True)
            self._given.clear()
