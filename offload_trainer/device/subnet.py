"""The sliced network of one plan, on the device: its module, optimizer and moments, as views of a few slabs."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.device.transfer import SlabLayout, slab_layouts
from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Plan
from offload_trainer.groups.slicing import named_tensors, rebuild
from offload_trainer.master.master import Master
from offload_trainer.master.moments import OptimizerFactory, StateSpec, read_scalars, set_scalars
from offload_trainer.master.slab import Slab


class Subnet:
    """A module of a plan's shapes, of the types the model came in, however narrow the master is.

    `slabs` hold its weights and buffers; whoever fills them (workbench.py) says in `plan` with which plan's.
    """

    def __init__(self, master: Master, plan: Plan, device: torch.device):
        self._master, self._device = master, device
        self.plan = plan
        entries = {name: (dtype, plan.shape(name)) for name, dtype in master.computes.items()}
        self.layouts = slab_layouts(entries, {name: full.dtype for name, full in master.tensors.items()})
        self.slabs = [Slab(shapes, dtype, device) for dtype, _, shapes in self.layouts]
        # `data`: else all would share one version counter, and a buffer that a forward writes in place would look to
        # the backward like a change of every weight.
        views = {name: view.data for slab in self.slabs for name, view in slab.items()}
        self.module: nn.Module = rebuild(master.model, views, plan, plan.groups).train()

    def reattach(self, *, keep: bool = True) -> None:
        """Where a forward put another tensor in the place of a buffer, or of a parameter's data, the slabs' comes back,
        with its values (keep) or with those from before.

        Raises `UserError` for one of another shape or type.
        """
        live = named_tensors(self.module)
        for name, view in ((name, view) for slab in self.slabs for name, view in slab.items()):
            tensor = live[name]
            if tensor.data_ptr() == view.data_ptr():
                continue
            if (tensor.shape, tensor.dtype) != (view.shape, view.dtype):
                new, old = (f"{tuple(x.shape)} {x.dtype}" for x in (tensor, view))
                raise UserError(f"{name} ({new}) must keep its shape and type ({old}): a forward has put another there")
            if keep:
                view.copy_(tensor.detach())
            tensor.data = view.data

    def exchange(self, other: "Subnet") -> None:
        """Each has the other's tensors from now on, and none is copied. The plans stay as they are."""
        mine, its = named_tensors(self.module), named_tensors(other.module)
        for name in mine:
            mine[name].data, its[name].data = its[name].data, mine[name].data
        self.slabs, other.slabs = other.slabs, self.slabs

    def fits(self, plan: Plan) -> bool:
        """Whether a plan has this subnet's shapes."""
        return all(len(plan[name]) == len(self.plan[name]) for name in plan)

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)


class TrainedSubnet(Subnet):
    """The subnet that is trained: a `Subnet` with an optimizer, made once for all plans of its shapes.

    state_spec: the moments it has are those of `slabs_of`; all else of the optimizer's starts anew with every round.
    sampled: the tensors that some plan slices.
    """

    def __init__(
        self,
        master: Master,
        plan: Plan,
        device: torch.device,
        factory: OptimizerFactory,
        state_spec: StateSpec,
        *,
        sampled: frozenset[str],
    ):
        super().__init__(master, plan, device)
        self._state_spec, self._sampled = state_spec, sampled
        named = dict(self.module.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in named.items() if p.requires_grad}
        self.optimizer = factory(list(self.parameters.values()))
        if state_spec.corrected and len({tuple(group["betas"]) for group in self.optimizer.param_groups}) > 1:
            raise UserError("the optimizer's parameter groups differ in betas: use one pair, or optimizer.state: reset")
        self._steps: Counter[str] = Counter()
        """That the optimizer's state of each parameter counts: without asking the device."""
        self._moments: dict[str, list[Slab]] = {}
        """By name; none in the first round, in which the optimizer makes its state as it would in plain training."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of those that come and go with the weights."""
        return tuple(self._state_spec.moments)

    def layouts_of(self, what: str) -> list[SlabLayout]:
        """The layouts of the slabs of "weights" (with the buffers), or of a moment by its name."""
        if what == "weights":
            return self.layouts
        entries = {name: (parameter.dtype, parameter.shape) for name, parameter in self.parameters.items()}
        stored = {name: full.dtype for name, full in self._master.moments[what].items()}
        return slab_layouts(self._state_spec.entries(what, entries), stored)

    def slabs_of(self, what: str) -> list[Slab]:
        """The slabs of "weights" (with the buffers), or of a moment by its name; made where there were none."""
        if what == "weights":
            return self.slabs
        if what not in self._moments:
            # As they start, since a parameter that gets no gradient is written back as well.
            self._moments[what] = [
                Slab(shapes, dtype, self._device, zeros=True) for dtype, _, shapes in self.layouts_of(what)
            ]
            if start := self._state_spec.starts.get(what):
                for slab in self._moments[what]:
                    slab.flat.fill_(start)
        return self._moments[what]

    def load_state(self, clock: int) -> None:
        """Begin a round whose weights, and moments as the master has them, are in the slabs.

        clock: steps that the moments of parameters count whose entries differ in age.
        """
        if not self._state_spec.carried:
            self.optimizer.state.clear()
            return
        if not self._master.scalars:
            self._steps.clear()
            return  # the first round
        views: dict[str, dict[str, Tensor]] = {}
        for moment in self.moments:
            corrected: list[Tensor] = []
            for slab in self.slabs_of(moment):
                for name in slab:
                    views.setdefault(name, {})[moment] = slab[name]
                    corrected += [slab[name]] if self._mixed(name) else []
            if corrected:
                torch._foreach_mul_(corrected, self._state_spec.correction(moment, clock))
        numbers: list[tuple[dict[str, Any], Mapping[str, float]]] = []
        for name, parameter in self.parameters.items():
            scalars = self._master.scalars.get(name)
            if scalars is None:  # it has never had a gradient
                self.optimizer.state.pop(parameter, None)
                self._steps[name] = 0
                continue
            state = self.optimizer.state[parameter]
            state.update(views.get(name, {}))
            numbers.append((state, {**scalars, "step": clock} if self._mixed(name) else scalars))
            self._steps[name] = int(numbers[-1][1].get("step", 0))
        set_scalars(numbers, self._state_spec)

    def step(self) -> None:
        """An optimizer step; the gradients are gone then."""
        self._steps.update(name for name, parameter in self.parameters.items() if parameter.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_state(self) -> None:
        """End a round: moments as the master is to have them in the slabs, the optimizer's numbers in the master."""
        if not self._state_spec.carried:
            return
        states = {name: self.optimizer.state[p] for name, p in self.parameters.items() if self.optimizer.state[p]}
        self._master.scalars.update(read_scalars(states.items(), self._state_spec, self._steps))
        for moment in self.moments:
            by_correction: dict[float, list[Tensor]] = {}  # one, unless some parameters got no gradient at times
            for slab in self.slabs_of(moment):
                for name in slab.keys() & states.keys():
                    live: Tensor = states[name][moment]
                    if live.data_ptr() != slab[name].data_ptr():  # the optimizer's own, freed before the next
                        slab[name].copy_(live)
                        states[name][moment] = slab[name]
                    if self._mixed(name):
                        step = self._master.scalars[name].get("step", 0.0)
                        by_correction.setdefault(self._state_spec.correction(moment, step), []).append(slab[name])
            for correction, tensors in by_correction.items():
                torch._foreach_div_(tensors, correction)

    def is_finite(self) -> Tensor:  # (), bool, on the device
        """Whether every parameter and every moment is finite: told by the sums of their absolute values, a kernel for
        many tensors, of which one for each would keep the host busy for milliseconds."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        moments = [value for value in states if isinstance(value, Tensor) and value.ndim]
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in (*self.parameters.values(), *moments):
            by_type.setdefault(tensor.dtype, []).append(tensor.detach())
        finite: list[Tensor] = []
        for dtype, tensors in by_type.items():
            wide = {"dtype": torch.float32} if dtype == torch.float16 else {}  # where sums would overflow
            finite.append(torch.stack(torch._foreach_norm(tensors, 1, **wide)).isfinite().all())
        return torch.stack(finite).all()

    def _mixed(self, name: str) -> bool:
        """Whether the parameter's entries may have been trained for different numbers of steps."""
        return self._state_spec.corrected and name in self._sampled

    @property
    def trained_bytes(self) -> int:
        """With gradients, and the optimizer's state, whoever made it."""
        gradients = sum(p.numel() * p.element_size() for p in self.parameters.values())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return self.nbytes + gradients + sum(x.nbytes for x in states if isinstance(x, Tensor) and x.ndim)
