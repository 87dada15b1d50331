"""What no key of a config asks for, tried on a run: `python -m reproduction.variants NAME ARGUMENT …`.

Each changes what a training loop calls, as `timed` does, whose clock it has; until a run settles.

outer momentum: the master keeps going where rounds have moved it: its change is that of the round and half of the last.
faster newcomers: what was not in the round before moves twice as far in each step of its first round.
taught: half of the loss is the distance to the predictions of the last round's subnet, as that round left it (which is
    a third subnet on the device, of which device bytes that are predicted know nothing).

What they remember is in no checkpoint: a run that was interrupted begins again.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offload_trainer import Plan, run, train
from reproduction.timed import PASSES, TimedOffloader

MOMENTUM = 0.5
FASTER = 2.0
TAUGHT = 0.5


class OuterMomentum(TimedOffloader):
    """Of rounds that do not overlap: else the next one would begin before the master has changed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._moving: dict[str, Tensor] = {}
        self._was: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        if not self.steps % self.sync_every:
            self._was = {name: tensor.clone() for name, tensor in self._master.tensors.items()}
        super().step()
        if not self.between_rounds or self.agenda.settled:
            return
        for name, now in self.master.items():
            if now.dtype.is_floating_point:
                moved = now - self._was[name] + MOMENTUM * self._moving.get(name, torch.zeros_like(now))
                self._moving[name] = moved
                now.copy_(self._was[name] + moved)
        self._bench._resident = None  # what the device still holds is not the master's any more


class FasterNewcomers(TimedOffloader):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._last: Plan | None = None
        self._new: dict[str, Tensor] = {}
        self._ordinary, self._bench.step = self._bench.step, self._step

    @torch.no_grad()
    def _step(self) -> None:
        parameters, plan = self._bench.subnet.parameters, self._bench.subnet.plan
        if not self.steps % self.sync_every:
            known = self._last is None or self.agenda.settled
            self._new = {} if known else _newcomers(plan, self._last, parameters)
            self._last = plan
        before = {name: parameters[name].clone() for name in self._new}
        self._ordinary()
        for name, new in self._new.items():
            parameters[name] += (FASTER - 1) * new * (parameters[name] - before[name])


def _newcomers(plan: Plan, last: Plan, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """By parameter, 1 where an entry was not in the plan before."""
    found = {}
    for name, parameter in parameters.items():
        known = torch.ones(parameter.shape, dtype=torch.bool)
        for axis, (now, then) in enumerate(zip(plan.indices(name), last.indices(name), strict=True)):
            if now is not None and then is not None:
                known &= torch.isin(now, then).view([-1 if i == axis else 1 for i in range(parameter.ndim)])
        if not known.all():
            found[name] = (~known).to(parameter)
    return found


class Taught(TimedOffloader):
    """Of language models."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._teacher: nn.Module | None = None
        self._plain: Callable[[nn.Module, Tensor], Tensor] = self.loss_fn
        self.loss_fn = self._loss

    def _loss(self, module: nn.Module, batch: Tensor) -> Tensor:
        loss = self._plain(module, batch)
        if self._teacher is None or self.agenda.settled:
            return loss
        with torch.no_grad():
            taught = self._teacher(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        said = module(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        apart = functional.kl_div(said.flatten(0, 1), taught.flatten(0, 1), log_target=True, reduction="batchmean")
        return (1 - TAUGHT) * loss + TAUGHT * apart

    def step(self) -> None:
        last = self.steps % self.sync_every == self.sync_every - 1
        subnet = self._bench.subnet.module
        super().step()
        if last and not self.agenda.settled:
            self._teacher = copy.deepcopy(subnet).eval()


VARIANTS: dict[str, type[TimedOffloader]] = {
    "outer momentum": OuterMomentum,
    "faster newcomers": FasterNewcomers,
    "taught": Taught,
}


def main(arguments: list[str]) -> int:
    name, *words = arguments
    out = Path(words[words.index("--out") + 1])
    train.Offloader = lambda *args, **kwargs: VARIANTS[name](*args, file=out / PASSES, **kwargs)  # type: ignore
    return run.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
