"""Optimizer state, for any torch optimizer: what it keeps per element, and what that means once entries differ in age.

`probe_optimizer` lets the optimizer take one step on a tiny parameter and reads off its state: tensors of the
parameter's shape are moments (sliced like the weight), single numbers are scalars.

Adam divides its moments by 1 − βᵗ, with one t per parameter, but the entries of a sampled parameter have been trained
for different numbers of steps. Raw moments and a common t would give an entry that comes in late, whose moments are
still near zero, steps several times too large. So the master holds the moments of a sampled parameter *divided by*
1 − βᵗ, whose meaning no longer depends on t, and a round multiplies them by 1 − βᵗ of its own clock. That clock starts
at no more than 1/(1−β₁)² steps, up to which the first step of a new entry is at most one learning rate:
(1−β₁)/(1−β₁ᵗ) · √((1−β₂ᵗ)/(1−β₂)) ≤ 1.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.errors import UserError

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_ADAM_BETA = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""Moments that Adam and its kin correct for their start, and which of `betas` does it."""


@dataclass(frozen=True)
class StateSpec:
    """What an optimizer keeps: moments (of the parameter's shape) by name, and scalars with where they live."""

    moments: Mapping[str, torch.dtype | None]
    """Name → dtype; None: that of the parameter."""
    scalars: Mapping[str, Any]
    """Name → an example value: a tensor without dimensions, or a number."""
    betas: tuple[float, float] | None
    starts: Mapping[str, float] = field(default_factory=dict)
    """Name of a moment → what entries that were never trained hold, where that is not 0."""

    @property
    def carried(self) -> bool:
        """Whether any of it comes and goes with the weights; else it starts anew with every round."""
        return bool(self.moments or self.scalars)

    @property
    def corrected(self) -> bool:
        """Whether the moments are divided by 1 − βᵗ at every step."""
        return self.betas is not None and "step" in self.scalars and "exp_avg" in self.moments

    @property
    def horizon(self) -> int:
        """The clock, in steps, at which a round over entries of mixed age may start at most."""
        return int(1 / (1 - self.betas[0]) ** 2) if self.betas else 0

    def entries(
        self, moment: str, parameters: Mapping[str, tuple[torch.dtype, torch.Size]]
    ) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Dtype and shape of a moment of each parameter."""
        own = self.moments[moment]
        return {name: (own or dtype, shape) for name, (dtype, shape) in parameters.items()}

    def correction(self, moment: str, clock: float) -> float:
        """1 − βᵗ of a moment; 1 where the optimizer corrects nothing (or before its first step)."""
        if not self.corrected or moment not in _ADAM_BETA or clock == 0:
            return 1.0
        assert self.betas is not None
        return 1 - self.betas[_ADAM_BETA[moment]] ** clock


def trained_dtype(model: nn.Module) -> torch.dtype:
    """Of the parameters that are trained. Raises `UserError` if none is."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            return parameter.dtype
    raise UserError("no parameter of the model is trained: requires_grad is false for all of them")


def probe_optimizer(
    factory: OptimizerFactory, dtype: torch.dtype, device: torch.device, *, carry: bool = True
) -> StateSpec:
    """Learn an optimizer's state from one step on a (6, 10) parameter whose gradient is zero; without `carry` only that
    it can take one.

    Raises `UserError` when `factory` returns no optimizer, or one that cannot take a step by itself, or one whose state
    holds a tensor of another shape.
    """
    parameter = nn.Parameter(torch.zeros(6, 10, dtype=dtype, device=device))
    try:
        optimizer = factory([parameter])
    except Exception as error:
        if not carry:  # it may want the model's own parameters, as many as they are
            return StateSpec({}, {}, None)
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"optimizer(params) must take any list of parameters; of a list of one it raised {type(error).__name__}: "
            f"{why} (optimizer.state: reset asks it for the model's own alone)"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer(params) must return a torch optimizer, it returned {type(optimizer).__name__}")
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # whatever it may want: a closure, sparse gradients, another type
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{type(optimizer).__name__} cannot take a step on a parameter of {dtype}: {why}") from error
    if not carry:
        return StateSpec({}, {}, None)
    moments: dict[str, torch.dtype | None] = {}
    scalars: dict[str, Any] = {}
    starts: dict[str, float] = {}
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            moments[name] = None if value.dtype == dtype else value.dtype
            if bool((value != value.flatten()[0]).any()):
                raise UserError(
                    f"{type(optimizer).__name__} starts the entries of {name!r} at different values: it cannot be "
                    "carried between rounds, use optimizer.state: reset"
                )
            if bool(value.any()):
                starts[name] = float(value.flatten()[0])
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0):
            scalars[name] = value
        elif value is not None:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{type(optimizer).__name__} keeps {name!r} as {what}, not of the parameter's shape: "
                "it cannot be carried between rounds, use optimizer.state: reset"
            )
    state_spec = StateSpec(moments, scalars, optimizer.param_groups[0].get("betas"), starts)
    if state_spec.corrected and scalars.keys() != {"step"}:
        others = ", ".join(scalars.keys() - {"step"})
        raise UserError(
            f"{type(optimizer).__name__} corrects its moments by {others} as well, which differs between entries of "
            "different age: it cannot be carried between rounds, use optimizer.state: reset"
        )
    return state_spec


def set_scalars(states: Iterable[tuple[dict[str, Any], Mapping[str, float]]], state_spec: StateSpec) -> None:
    """Give each parameter's optimizer state its numbers, of the type and on the device the optimizer wants them."""
    alike: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for state, values in states:
        for name in state_spec.scalars:
            alike.setdefault((name, values[name]), []).append(state)
    for (name, value), those in alike.items():
        example = state_spec.scalars[name]
        if isinstance(example, Tensor):  # of one tensor: a device has one kernel to launch, not one for each
            numbers = example.new_full((len(those),), value).unbind()
        else:
            numbers = [type(example)(value)] * len(those)
        for state, number in zip(those, numbers, strict=True):
            state[name] = number


def read_scalars(
    states: Iterable[tuple[str, Mapping[str, Any]]], state_spec: StateSpec, steps: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """The numbers of every parameter's state, by its name. steps: of those that Adam and its kin count on a device; for
    any other number there the host waits."""
    numbers: dict[str, dict[str, float]] = {}
    there: list[tuple[str, str, Tensor]] = []
    for name, state in states:
        numbers[name] = {}
        for key in state_spec.scalars:
            value = state[key]
            if not isinstance(value, Tensor) or value.device.type == "cpu":
                numbers[name][key] = float(value)
            elif key == "step" and state_spec.corrected:
                numbers[name][key] = steps[name]
            else:
                there.append((name, key, value))
    values = torch.stack([value for *_, value in there]).tolist() if there else []
    for (name, key, _), value in zip(there, values, strict=True):
        numbers[name][key] = value
    return numbers
