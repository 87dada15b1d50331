"""The sliced network of one plan, on the device: its module, optimizer and moments, as views of a few slabs."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offload_trainer.device.transfer import Transfer
from offload_trainer.errors import UserError
from offload_trainer.groups.plan import Plan
from offload_trainer.groups.slicing import rebuild
from offload_trainer.master.master import Master
from offload_trainer.master.moments import OptimizerFactory, StateLayout, read_scalars, set_scalars
from offload_trainer.master.slab import Slab


class Subnet:
    """Weights and buffers of a plan, gathered; `load` moves it to another plan of the same widths, in place.

    It is of the types the model came in, however narrow the master is.
    """

    def __init__(self, master: Master, plan: Plan, transfer: Transfer, device: torch.device):
        self._master, self._transfer, self._device = master, transfer, device
        entries = {name: (dtype, plan.shape(name)) for name, dtype in master.computes.items()}
        self.slabs = make_slabs(entries, master.tensors, device)
        # `data`: else all would share one version counter, and a buffer that a forward writes in place would look to
        # the backward like a change of every weight.
        views = {name: view.data for slab in self.slabs for name, view in slab.items()}
        self.module: nn.Module = rebuild(master.model, views, plan, plan.groups).train()
        self.load(plan)

    def load(self, plan: Plan) -> None:
        """Take the values of a plan from the master. Its shapes must be those this subnet was made with."""
        self.plan = plan
        for slab in self.slabs:
            self._transfer.gather(self._master.tensors, slab, plan)

    def fits(self, plan: Plan) -> bool:
        """Whether a plan has this subnet's shapes, so that `load` may be used."""
        return all(len(plan[name]) == len(self.plan[name]) for name in plan)

    def write_back(self, *, delta: bool, round: int = 0) -> float:
        """Values → master; with `delta`, the squared norm of the change of all floating-point tensors.

        `round`: its number, from which a narrower master's random rounding follows.
        """
        rounding = self._master.precision.rounding(round, "weights")
        return sum(
            self._transfer.write_back(slab, self._master.tensors, self.plan, delta=delta, rounding=rounding)
            for slab in self.slabs
        )

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)


class TrainedSubnet(Subnet):
    """The subnet that is trained: a `Subnet` with an optimizer.

    `carry=True` takes the optimizer's moments from the master with the weights and puts them back; otherwise they
    start anew with every round. `sampled` names the tensors that some plan slices; `clock`: see `load_moments`.
    """

    def __init__(
        self,
        master: Master,
        plan: Plan,
        transfer: Transfer,
        device: torch.device,
        factory: OptimizerFactory,
        layout: StateLayout,
        *,
        carry: bool,
        sampled: frozenset[str],
        clock: int,
    ):
        super().__init__(master, plan, transfer, device)
        self._layout, self._carry, self._sampled = layout, carry, sampled
        named = dict(self.module.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in named.items() if p.requires_grad}
        self.optimizer = factory(list(self.parameters.values()))
        if layout.corrected and len({tuple(group["betas"]) for group in self.optimizer.param_groups}) > 1:
            raise UserError("the optimizer's parameter groups differ in betas: use one pair, or optimizer.state: reset")
        self._moments: dict[str, list[Slab]] = {}
        """By name; none in the first round, in which the optimizer makes its state as it would in plain training."""
        self.load_moments(clock)

    def load_moments(self, clock: int, *, gather: bool = True) -> None:
        """Begin a round: this plan's moments, as of step `clock` for parameters whose entries differ in age.

        `gather=False` when the last write-back left here what the master holds of this plan.
        """
        if not self._carry:
            self.optimizer.state.clear()
            return
        if not self._master.scalars:
            return  # the first round
        views: dict[str, dict[str, Tensor]] = {}
        for moment in self._layout.moments:
            for slab in self._moment_slabs(moment):
                if gather:
                    self._transfer.gather(self._master.moments[moment], slab, self.plan)
                for name in slab:
                    if self._mixed(name):
                        slab[name].mul_(self._layout.correction(moment, clock))
                    views.setdefault(name, {})[moment] = slab[name]
        for name, parameter in self.parameters.items():
            scalars = self._master.scalars.get(name)
            if scalars is None:  # it has never had a gradient
                self.optimizer.state.pop(parameter, None)
                continue
            state = self.optimizer.state[parameter]
            state.update(views.get(name, {}))
            set_scalars(state, self._layout, {**scalars, "step": clock} if self._mixed(name) else scalars)

    def write_back_moments(self, round: int) -> None:
        """End a round: moments and scalars → master. The live moments of mixed-age parameters are used up by it."""
        if not self._carry:
            return
        states = {name: self.optimizer.state[p] for name, p in self.parameters.items() if self.optimizer.state[p]}
        self._master.scalars.update(read_scalars(states.items(), self._layout))
        for moment in self._layout.moments:
            rounding = self._master.precision.rounding(round, moment)
            for slab in self._moment_slabs(moment):
                for name in slab.keys() & states.keys():
                    live: Tensor = states[name][moment]
                    if live.data_ptr() != slab[name].data_ptr():  # the optimizer's own, freed before the next
                        slab[name].copy_(live)
                        states[name][moment] = slab[name]
                    if self._mixed(name):
                        slab[name].div_(self._layout.correction(moment, float(states[name].get("step", 0))))
                self._transfer.write_back(slab, self._master.moments[moment], self.plan, rounding=rounding)

    def is_finite(self) -> bool:
        """Whether every parameter and every moment is finite. The host waits for the device here."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        moments = [value for value in states if isinstance(value, Tensor) and value.ndim]
        return bool(torch.stack([tensor.isfinite().all() for tensor in [*self.parameters.values(), *moments]]).all())

    def _mixed(self, name: str) -> bool:
        """Whether the parameter's entries may have been trained for different numbers of steps."""
        return self._layout.corrected and name in self._sampled

    def _moment_slabs(self, moment: str) -> list[Slab]:
        if moment not in self._moments:
            entries = {name: (parameter.dtype, parameter.shape) for name, parameter in self.parameters.items()}
            entries, stored = self._layout.entries(moment, entries), self._master.moments[moment]
            # Zeros, since a parameter that gets no gradient is written back as well.
            self._moments[moment] = make_slabs(entries, stored, self._device, zeros=True)
        return self._moments[moment]

    @property
    def moment_bytes(self) -> int:
        """Of the optimizer's state, whoever made it."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim)


def make_slabs(
    entries: Mapping[str, tuple[torch.dtype, torch.Size]],
    stored: Mapping[str, Tensor],
    device: torch.device,
    *,
    zeros: bool = False,
) -> list[Slab]:
    """Slabs on the device of the given types and shapes: one for each type, and of it for each stored type, so that
    a slab crosses the link as a whole."""
    table: dict[tuple[torch.dtype, torch.dtype], dict[str, torch.Size]] = {}
    for name, (dtype, shape) in entries.items():
        table.setdefault((dtype, stored[name].dtype), {})[name] = shape
    return [Slab(shapes, dtype, device, zeros=zeros) for (dtype, _), shapes in table.items()]
