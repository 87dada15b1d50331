"""A round under way, and what lasts from one to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offload_trainer.device import ranks
from offload_trainer.device.streams import HostCopy
from offload_trainer.device.workbench import Compile
from offload_trainer.errors import NotFinite, UserError
from offload_trainer.groups import Plan


def require_arguments(
    sync_every: int, state: str, clip_norm: float | None, compile: Compile = False, *, fits: bool
) -> None:
    """Raise `UserError` unless rounds can be made of them (see `Offloader`). fits: what is compiled, if anything is,
    fits every plan."""
    if not isinstance(sync_every, Integral) or isinstance(sync_every, bool) or sync_every < 1:
        raise UserError(f"sync_every ({sync_every}) must be a whole number, at least 1")
    if state not in ("carry", "reset"):
        raise UserError(f"state ({state!r}) must be carry or reset")
    if clip_norm is not None and not clip_norm > 0:  # nor NaN
        raise UserError(f"clip_norm ({clip_norm}) must be positive, or None")
    if compile not in (False, True, "graphs"):
        raise UserError(f"compile ({compile!r}) must be False, True or graphs")
    if not fits:
        raise UserError(
            "memory.compile needs constant widths: structure.sampler fixed, budget per_group, schedule constant"
        )


@dataclass
class Round:
    """A round under way: its steps so far, and what they showed (numbers that may still be on the device)."""

    paired: bool
    """Whether there is a reference to compare with."""
    learns: bool = True
    """Whether s learns from it."""
    whole_batches: bool = False
    """A step's batch may not come in parts."""
    steps: int = 0
    losses: list[Tensor] = field(default_factory=list)
    differences: list[Tensor] = field(default_factory=list)
    """L(m) − L(m′) of each paired batch."""
    _shown: HostCopy | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Of a batch, or of the next part of one. Raises `UserError` for a part where there may be none."""
        if self.whole_batches and len(self.losses) > self.steps:
            raise UserError(
                "CUDA graphs (memory.cuda_graphs) take a step's batch whole: a second backward pass before step() would"
                " overwrite the gradients of the first"
            )
        if not isinstance(loss, Tensor) or loss.ndim:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"loss_fn(module, batch) must return a scalar tensor; it returned {what}")
        self.losses.append(loss.detach().clone())  # a CUDA graph overwrites it in the next step

    def require_gradients(self, parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
        """At its first step: raise unless the subnet's parameters have gradients, and the full model's have none."""
        if self.steps:
            return
        stray = next((name for name, parameter in model.named_parameters() if parameter.grad is not None), None)
        if stray is not None:
            raise UserError(
                f"the loss reaches {stray} of the model itself, not of the subnet: loss_fn must compute with the module"
                " it is given, and no function or hook that a module keeps may refer to the model"
            )
        if all(parameter.grad is None for parameter in parameters.values()):
            raise RuntimeError("step() follows loss() and a backward pass: no parameter of the subnet has a gradient")

    def send_outcome(self, accelerator: Accelerator, finite: Tensor, credit: Tensor | None) -> None:
        """Its steps are done: what they showed leaves for the host, as means over the ranks; nobody waits for it.

        finite: (), whether all weights are. credit: (2, kept units), if that is wanted.
        """
        shown = {"losses": torch.stack(self.losses), "finite": finite}
        if self.differences:
            shown["difference"] = torch.stack(self.differences).mean().float().reshape(1)
        ranks.average_(accelerator, [value for name, value in shown.items() if name != "finite"])
        self._shown = HostCopy(shown if credit is None else shown | {"credit": credit}, accelerator.device)

    def outcome(self, steps: int, rounds: int) -> tuple[float | None, Tensor | None]:
        """d, the mean over the paired batches and the ranks of L(m) − L(m′), None if there were none; and the credit.
        After `send_outcome`; the host waits for the device here.

        Raises `NotFinite`, naming the step, unless the losses, the weights and what s learns from are finite. steps: of
        the run so far, this round's included. rounds: finished before it.
        """
        assert self._shown is not None
        shown = self._shown.result()
        losses, difference, credit = shown["losses"], shown.get("difference"), shown.get("credit")
        bad, within = (~losses.isfinite()).nonzero().flatten().tolist(), self.steps
        if bad:
            what, within = f"the loss is {losses[bad[0]].item()}", bad[0] * self.steps // len(losses) + 1
        elif any(one is not None and not bool(one.isfinite().all()) for one in (difference, credit)):
            what = "what s learns from, a loss of the reference or a gradient, is not finite"
        elif not bool(shown["finite"]):
            what = "a weight is not finite"
        else:
            return None if difference is None else float(difference), credit
        raise NotFinite(
            f"{what} at step {steps - self.steps + within}, round {rounds}: the master and the last checkpoint keep "
            "what was before this round; lower optimizer.lr, set optimizer.clip_norm or turn memory.autocast off"
        )


@dataclass(frozen=True)
class Ended:
    """A round whose steps are done and whose values have left the device; what it showed may be on its way still."""

    round: Round
    plan: Plan
    numbers: Mapping[str, Any]
    """Of the boundary at its end, as far as they do not depend on what it showed."""
    random: Mapping[str, Tensor]


@dataclass(frozen=True)
class Boundary:
    """All that changes from round to round beside the master and its moments, as it was when a round ended."""

    numbers: Mapping[str, Any]
    structure: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    """States of the generators that dropout draws from."""

    def with_numbers(self, **numbers: float) -> "Boundary":
        """With numbers that were not known yet when the round ended."""
        return replace(self, numbers={**self.numbers, **numbers})
