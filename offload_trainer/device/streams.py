"""What a GPU does beside training, on other streams. A CPU does at once what it is given.

As in torch, an event's `wait` holds up the current stream, its `synchronize` the host.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Event:
    """A place in the work that the device's current stream has been given so far. timed: it can tell the time."""

    def __init__(self, device: torch.device, *, timed: bool = False):
        self._device, self._event = device, None
        if device.type == "cuda":
            # The host's cores have something better to do than to ask the device whether it is done.
            self._event = torch.cuda.Event(blocking=True, enable_timing=timed)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """What the current stream is given from now on waits until then. The host does not."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        """The host waits until then."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, before: "Event") -> float:
        """Between two timed events that the host has waited for; 0 on a CPU."""
        if self._event is None or before._event is None:
            return 0.0
        return before._event.elapsed_time(self._event) / 1e3


class HostCopy:
    """Values on their way from the device to the host, after all that its current stream has been given so far."""

    def __init__(self, values: Mapping[str, Tensor], device: torch.device):
        # From a GPU into pinned memory: so the copy goes on by itself.
        self._values = {name: value.detach().to("cpu", non_blocking=True) for name, value in values.items()}
        self._there = Event(device)

    def result(self) -> Mapping[str, Tensor]:
        """The host waits until they are there."""
        self._there.synchronize()
        return self._values


def wait_all(events: Mapping[str, Event]) -> None:
    """The current stream waits for all of these."""
    for event in set(events.values()):
        event.wait()


class SideStream:
    """A stream beside the one that trains."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def open(self) -> AbstractContextManager[object]:
        """Within it the device is given work on this stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def after(self, event: Event) -> AbstractContextManager[object]:
        """The same, for work that waits for `event`."""
        with self.open():
            event.wait()
        return self.open()
