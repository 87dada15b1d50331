"""The device's side of a round: the subnet that is trained, the reference it is compared with, and their transfers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.device import memory
from offload_trainer.device.subnet import Subnet, TrainedSubnet
from offload_trainer.device.transfer import Transfer
from offload_trainer.groups.plan import Plan
from offload_trainer.master.master import Master
from offload_trainer.master.moments import OptimizerFactory, StateLayout


class Workbench:
    """Puts plans on the device and their results back. Tensors are reused in place while plans keep their shapes.

    sampled: the tensors that some plan slices, so that their entries differ in age.
    carry: the optimizer's moments come and go with the weights; else they start anew with every round.
    """

    def __init__(
        self,
        master: Master,
        device: torch.device,
        factory: OptimizerFactory,
        layout: StateLayout,
        *,
        sampled: frozenset[str],
        carry: bool,
        compile: bool,
    ):
        self._master, self._device = master, device
        self._factory, self._layout = factory, layout
        self._sampled, self._carry, self._compile = sampled, carry, compile
        self._transfer = Transfer(device)
        self._subnet: TrainedSubnet | None = None
        self._reference: Subnet | None = None
        self.forward: Any = None
        """The subnet's module as it is called: compiled where that was asked for."""
        self.clock = 0
        """Steps of the moments of entries of mixed age (see master/moments.py)."""
        self.trained = ""
        """Digest of the plan trained last: a plan that is trained twice running keeps its clock."""

    @property
    def subnet(self) -> TrainedSubnet:
        assert self._subnet is not None
        return self._subnet

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    def take(self, plan: Plan, steps: int) -> None:
        """Make the trained subnet that of `plan`; the run has taken `steps` steps so far."""
        same = plan.digest == self.trained
        self.trained = plan.digest
        if not same:
            self.clock = min(steps, self._layout.horizon)
        if self._subnet is not None and self._subnet.fits(plan):
            # A narrower master has rounded what is still here, and a resumed run would not have it.
            there = same and self._master.exact
            if not there:
                self._subnet.load(plan)
            self._subnet.load_moments(self.clock, gather=not there)
            return
        self._subnet = None  # before the next one is made: never two
        self._subnet = TrainedSubnet(
            self._master,
            plan,
            self._transfer,
            self._device,
            self._factory,
            self._layout,
            carry=self._carry,
            sampled=self._sampled,
            clock=self.clock,
        )
        self.forward = torch.compile(self._subnet.module) if self._compile else self._subnet.module

    def take_reference(self, plan: Plan | None) -> None:
        """Make the reference that of `plan`; None: there is none in this round."""
        if plan is not None and self._reference is not None and self._reference.fits(plan):
            self._reference.load(plan)
            return
        self._reference = None  # before the next one is made: never two
        if plan is not None:
            self._reference = Subnet(self._master, plan, self._transfer, self._device)

    def drop_reference(self) -> None:
        self._reference = None

    @torch.no_grad()
    def reference_loss(self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """L(m′), leaving no trace: its BatchNorm statistics are its own, dropout draws what the subnet will draw."""
        assert self._reference is not None
        before = memory.random_state(self._device)
        loss = loss_fn(self._reference.module, batch)
        memory.set_random_state(self._device, before)
        return loss

    def write_back(self, steps: int, round: int) -> float:
        """End a round, of this number, of `steps` steps: everything → master. Returns the norm of its change."""
        norm = self.subnet.write_back(delta=True, round=round) ** 0.5
        self.subnet.write_back_moments(round)
        self.clock += steps
        return norm

    def clear(self) -> None:
        self._subnet = self._reference = self.forward = None

    def close(self) -> None:
        self.clear()
        self._transfer.close()

    @property
    def bytes_moved(self) -> int:
        return self._transfer.bytes_moved

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device from step to step: subnet, gradients, moments, reference."""
        held = self._reference.nbytes if self._reference is not None else 0
        if self._subnet is not None:
            gradients = sum(p.numel() * p.element_size() for p in self._subnet.parameters.values())
            held += self._subnet.nbytes + self._subnet.moment_bytes + gradients
        return held
