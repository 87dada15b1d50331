"""A run as its command does it, with a clock around forward and backward: `python -m reproduction.timed ARGUMENT …`.

Leaves `passes.json` beside summary.json: seconds of all forward passes (the references' among them) and of all backward
passes, and the steps they belong to.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_trainer import Offloader, run, train

PASSES = "passes.json"


class Clock:
    """Seconds of the device's work by name, without making the host wait for it."""

    def __init__(self, device: torch.device):
        self.cuda, self.spent = device.type == "cuda", {"forward": 0.0, "backward": 0.0}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        if not self.cuda:
            start = time.perf_counter()
            yield
            self.spent[name] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Waits for the device."""
        for name, begin, end in self._events:
            end.synchronize()
            self.spent[name] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self.spent)


class TimedOffloader(Offloader):
    """Its clock reads what a training loop calls, and is written as rounds end, where a resumed run finds it."""

    def __init__(self, *args: Any, file: Path, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock, self._file, self._timed = Clock(self.device), file, 0
        self._before = json.loads(file.read_text()) if file.exists() else {}
        self._backward = self.accelerator.backward
        self.accelerator.backward = self._timed_backward  # type: ignore[method-assign]

    def loss(self, batch: Any) -> Tensor:
        self.begin_round()  # a gather is no forward pass
        with self.clock.on("forward"):
            return super().loss(batch)

    def _timed_backward(self, loss: Tensor, **options: Any) -> None:
        with self.clock.on("backward"):
            self._backward(loss, **options)

    def step(self) -> None:
        super().step()
        self._timed += 1
        if self.between_rounds:
            self._write()

    def finish_round(self) -> None:
        super().finish_round()
        self._write()

    def _write(self) -> None:
        """Whole or not at all; with what was timed before a resume."""
        found = {"steps": self._timed, **self.clock.seconds()}
        temporary = self._file.with_name(f".{self._file.name}.tmp")  # not flushed: rounds of a step would be slower
        temporary.write_text(json.dumps({key: value + self._before.get(key, 0) for key, value in found.items()}))
        os.replace(temporary, self._file)


def main(arguments: list[str]) -> int:
    out = Path(arguments[arguments.index("--out") + 1])
    train.Offloader = lambda *args, **kwargs: TimedOffloader(*args, file=out / PASSES, **kwargs)  # type: ignore
    return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
