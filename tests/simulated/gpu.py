"""Streams, events, and the memory of a device, without tensors."""

import random
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Stream:
    """Work in the order in which it was given."""

    def __init__(self, gpu: "Gpu"):
        self._gpu = gpu
        self.queue: deque[Any] = deque()
        self.given = self.done = 0

    def wait_event(self, event: "Event") -> None:
        self._gpu.give(event, self)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> "Event":
        event = Event(self._gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.wait(self, self.given)


class Event:
    """A place in a stream."""

    def __init__(self, gpu: "Gpu", *, enable_timing: bool = False, **_: Any):
        self._gpu, self._timed = gpu, enable_timing
        self.stream, self.place = gpu.default, 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.given

    def wait(self, stream: Stream) -> None:
        place = Event(self._gpu)  # the event may be recorded again
        place.stream, place.place = self.stream, self.place
        stream.wait_event(place)

    def synchronize(self) -> None:
        self._gpu.wait(self.stream, self.place)

    def elapsed_time(self, end: "Event") -> float:
        if not (self._timed and end._timed):
            raise RuntimeError("an event that is not timed")
        if any(event.stream.done < event.place for event in (self, end)):
            raise RuntimeError("an event that is not there yet")
        return 1.0


class Gpu:
    """Its streams, its memory. For a while some streams rest unless somebody waits for them, while others run ahead."""

    def __init__(self, seed: int):
        self._chance, self._paces = random.Random(seed), {}
        self.late: Stream | None = None
        """If one is, it rests unless somebody waits for it, and all others do at once what they may."""
        self._lock, self._local = threading.RLock(), threading.local()
        self.streams: list[Stream] = []
        self.default = self.new_stream()
        self.generator = torch.Generator()
        self.pinned: dict[int, int] = {}
        """Address → bytes of the host's memory."""
        self._used_again: list[Tensor] = []
        self.allocated = self.peak = self.launched = 0
        """Bytes; kernels and copies."""

    def new_stream(self) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @property
    def current(self) -> Stream:
        return getattr(self._local, "stream", self.default)

    @property
    def waited(self) -> int:
        """How often this thread has waited for work that was not done."""
        return getattr(self._local, "waited", 0)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def give(self, work: Any, stream: Stream | None = None) -> None:
        """A kernel, or an event to wait for."""
        stream = stream or self.current
        with self._lock:
            stream.queue.append(work)
            stream.given += 1
            self._as_it_likes()

    def wait(self, stream: Stream, place: int) -> None:
        """The host waits until then."""
        with self._lock:
            self._local.waited = self.waited + (stream.done < place)
            self._until(stream, place)

    def _until(self, stream: Stream, place: int) -> None:
        with self._lock:
            while stream.done < place:
                head = stream.queue[0]
                if isinstance(head, Event) and head.stream.done < head.place:
                    self._until(head.stream, head.place)
                else:
                    self._run(stream)
                    self._as_it_likes()

    def synchronize(self, *_: Any) -> None:
        for stream in self.streams:
            stream.synchronize()

    def _as_it_likes(self) -> None:
        if self.late is not None:
            self._paces = {stream: float(stream is not self.late) for stream in self.streams}
        elif self._chance.random() < 0.02:
            self._paces = {stream: self._chance.choice([0.0, 0.0, 0.5, 1.0]) for stream in self.streams}
        going = True
        while going:  # again where one is late: what some have done lets others go on
            going = False
            for stream, pace in self._paces.items():
                while stream.queue and self._chance.random() < pace:
                    head = stream.queue[0]
                    if isinstance(head, Event) and head.stream.done < head.place:
                        break
                    self._run(stream)
                    going = self.late is not None

    def _run(self, stream: Stream) -> None:
        work = stream.queue.popleft()
        stream.done += 1
        if not isinstance(work, Event):
            with torch.no_grad():
                work()

    def taken(self, nbytes: int) -> None:
        """Memory."""
        with self._lock:
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)

    def freed(self, inner: Tensor, stream: Stream, streams: set[Stream]) -> None:
        """By the host. stream: that took it; streams: that were given work with it."""

        def use_again() -> None:
            spoilt(inner)
            if streams - {stream}:
                self._used_again.append(inner)

        with self._lock:
            self.allocated -= inner.nbytes
            stream.queue.append(use_again)
            stream.given += 1

    def require_order(self) -> None:
        """Raise if a stream wrote into memory that another one had again by then."""
        self.synchronize()
        for inner in self._used_again:
            same = inner.isnan() if inner.is_floating_point() else inner == 0
            assert bool(same.all()), f"{tuple(inner.shape)} {inner.dtype} was written to after it was let go"

    def is_pinned(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(at <= start and start + tensor.nbytes <= at + size for at, size in self.pinned.items())


def spoilt(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
