"""The public object: owns the rounds. Between two samplings it is a small model with an optimizer, nothing more."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offload_trainer.device import memory, ranks
from offload_trainer.device.subnet import Subnet, TrainedSubnet
from offload_trainer.device.transfer import Transfer
from offload_trainer.errors import UserError
from offload_trainer.groups import Groups, Plan, slice_module
from offload_trainer.master import Master, StateLayout, probe_optimizer
from offload_trainer.rounds import RoundReport, Spent
from offload_trainer.structure import Structure

LossFn = Callable[[nn.Module, Any], Tensor]


class Offloader:
    """Trains `model`, which stays in host memory, one sliced subnetwork at a time.

    model: taken over; its tensors move into the master's slabs. On the meta device it needs `materialise`, which
        fills the (by then real) tensors in place.
    loss_fn: `loss_fn(module, batch)` → scalar tensor, the mean over the batch.
    optimizer: makes the optimizer of a list of parameters.
    sync_every: K, optimizer steps between two samplings.
    state: "carry" keeps the optimizer's moments of every entry in the master; "reset" starts them anew each round
        and saves their host memory.
    clip_norm: gradients are scaled down to this norm; None: never.
    compile: `torch.compile` the subnet; needs plans of constant widths.

    A round in which the loss or a weight was not finite raises at its end, before anything reaches the master. Use it as a context manager. A run's last, unfinished round is written back on a clean exit.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        loss_fn: LossFn,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        structure: Structure,
        sync_every: int = 50,
        accelerator: Accelerator | None = None,
        state: Literal["carry", "reset"] = "carry",
        clip_norm: float | None = None,
        compile: bool = False,
        materialise: Callable[[nn.Module], None] | None = None,
    ):
        if sync_every < 1:
            raise UserError(f"sync_every ({sync_every}) must be at least 1")
        if compile and not structure.constant_widths:
            raise UserError(
                "memory.compile needs plans of constant widths: structure.sampler fixed, budget per_group"
            )
        self.accelerator = accelerator or Accelerator()
        self.device = self.accelerator.device
        self.groups, self.structure, self.loss_fn = groups, structure, loss_fn
        self.sync_every, self.clip_norm = sync_every, clip_norm
        self._factory, self._carry, self._compile = optimizer, state == "carry", compile
        dtype = next(model.parameters()).dtype
        self.layout = (
            probe_optimizer(optimizer, dtype, self.device) if self._carry else StateLayout({}, {}, None)
        )
        self._sampled = frozenset(s.tensor for name in structure.names for s in groups.slots(name))
        self.steps = 0
        """Optimizer steps taken."""
        self.rounds = 0
        """Rounds finished, that is, written back."""
        self.settled = False
        self.report = RoundReport()
        self.spent = Spent()
        self._clock = 0
        self._round_steps: int | None = None  # None between two rounds
        self._subnet: TrainedSubnet | None = None
        self._reference: Subnet | None = None
        self._differences: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._trained_plan = ""  # digest: moments go on where a plan is trained twice running
        self._transfer = Transfer(self.device)
        self._master = Master(model, self.layout, materialise=materialise, pin=self.device.type == "cuda")

    # What a training loop calls

    def loss(self, batch: Any) -> Tensor:
        """Loss of the subnet on a batch; on the round's paired batches the reference is evaluated as well."""
        if self._round_steps is None:
            self._begin_round()
        if self._reference is not None and len(self._differences) < self.structure.paired_batches:
            with self.spent.on("reference"):
                other = self._reference_loss(batch)
            with self.accelerator.autocast():
                loss = self.loss_fn(self._forward, batch)
            self._differences.append(loss.detach() - other)
            if len(self._differences) == self.structure.paired_batches:
                self._end_pairs()
        else:
            with self.accelerator.autocast():
                loss = self.loss_fn(self._forward, batch)
        self._losses.append(loss.detach())
        return loss

    def step(self) -> None:
        """Optimizer step on the subnet, with gradients averaged over the ranks; every K-th call ends the round."""
        subnet = self._running()
        ranks.average_gradients(self.accelerator, subnet.parameters)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(subnet.parameters.values()), self.clip_norm)
        subnet.optimizer.step()
        subnet.optimizer.zero_grad()
        self.steps += 1
        assert self._round_steps is not None
        self._round_steps += 1
        if self._round_steps == self.sync_every:
            self._end_round()

    def finish_round(self) -> None:
        """End the running round now, however few steps it had; afterwards the master is complete."""
        if self._round_steps:
            self._end_round()
        self._round_steps = None

    def settle(self) -> None:
        """From the next round on train the units of the largest s only, and leave s as it is."""
        self.settled = True

    def export(self, plan: Plan | None = None) -> nn.Module:
        """A small dense module on the CPU: the sliced module of `plan`, by default of the largest s."""
        self.finish_round()
        return slice_module(self._master.model, plan or self.top_plan(), self.groups)

    # What can be looked at

    @property
    def master(self):
        """Parameter and buffer names → full-size tensor views, host."""
        return self._master.tensors

    @property
    def model(self) -> nn.Module:
        """The full model; its tensors are the master's."""
        return self._master.model

    @property
    def plan(self) -> Plan:
        """The kept indices of the running round, by group name."""
        return self._running().plan

    @property
    def subnet(self) -> nn.Module:
        """The sliced module on the device."""
        return self._running().module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the running round; a learning rate schedule sets its `param_groups`."""
        return self._running().optimizer

    def top_plan(self) -> Plan:
        return Plan(self.groups, self.structure.top())

    def __enter__(self) -> "Offloader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish_round()
        self._subnet = self._reference = None
        self._transfer.close()
        self._master.close()

    # The round

    def begin_round(self) -> None:
        """Sample and gather now rather than at the next `loss`."""
        if self._round_steps is None:
            self._begin_round()

    def _begin_round(self) -> None:
        self.structure.set_step(self.steps)
        reference: Plan | None = None
        if self.settled or not self.structure.names:
            plan = self.top_plan() if self.structure.names else Plan.whole(self.groups)
        else:
            kept, other = self.structure.pair()
            plan, reference = Plan(self.groups, kept), Plan(self.groups, other)
        ranks.require_same(self.accelerator, f"the plan of round {self.rounds}", plan.digest)
        moved = self._transfer.bytes_moved
        with self.spent.on("gather"):
            start = time.perf_counter()
            self._take(plan)
            self._take_reference(reference)
            self.report = replace(self.report, round=self.rounds, gather_ms=1e3 * (time.perf_counter() - start))
        self.report.bytes_moved = self._transfer.bytes_moved - moved
        self._round_steps, self._differences, self._losses = 0, [], []

    def _take(self, plan: Plan) -> None:
        """Make the trained subnet that of `plan`, in place where its shapes allow it."""
        same = plan.digest == self._trained_plan
        self._trained_plan = plan.digest
        if not same:
            self._clock = min(self.steps, self.layout.horizon)
        if self._subnet is not None and self._subnet.fits(plan):
            if not same:
                self._subnet.load(plan)
            self._subnet.load_moments(self._clock, gather=not same)
            return
        self._subnet = None  # before the next one is made: never two
        self._subnet = TrainedSubnet(
            self._master,
            plan,
            self._transfer,
            self.device,
            self._factory,
            self.layout,
            carry=self._carry,
            sampled=self._sampled,
            clock=self._clock,
        )
        self._forward: Any = torch.compile(self._subnet.module) if self._compile else self._subnet.module

    def _take_reference(self, plan: Plan | None) -> None:
        if plan is None:
            self._reference = None
        elif self._reference is not None and self._reference.fits(plan):
            self._reference.load(plan)
        else:
            self._reference = None
            self._reference = Subnet(self._master, plan, self._transfer, self.device)

    @torch.no_grad()
    def _reference_loss(self, batch: Any) -> Tensor:
        """L(m′), leaving no trace: its BatchNorm statistics are its own, and dropout draws what the subnet will draw."""
        assert self._reference is not None
        before = memory.random_state(self.device)
        with self.accelerator.autocast():
            loss = self.loss_fn(self._reference.module, batch)
        memory.set_random_state(self.device, before)
        return loss

    def _end_pairs(self) -> None:
        if not self.structure.constant_widths:
            self._reference = None  # of other widths next time; its memory is free for the rest of the round

    def _end_round(self) -> None:
        subnet = self._running()
        difference = None
        if self._differences:
            difference = ranks.mean(self.accelerator, torch.stack(self._differences).mean())
        self._require_finite(subnet)
        moved = self._transfer.bytes_moved
        with self.spent.on("writeback"):
            start = time.perf_counter()
            ranks.average_buffers(self.accelerator, subnet.module)
            self.report.delta_norm = subnet.write_back(delta=True) ** 0.5
            subnet.write_back_moments()
            self.report.writeback_ms = 1e3 * (time.perf_counter() - start)
        self.report.bytes_moved += self._transfer.bytes_moved - moved
        self._clock += self._round_steps or 0
        self.report.difference = difference
        if difference is not None:
            self.structure.update(difference)
        self.rounds += 1
        self._round_steps, self._differences, self._losses = None, [], []

    def _require_finite(self, subnet: TrainedSubnet) -> None:
        """The host waits here for the round's last kernels."""
        losses = torch.stack(self._losses)
        ranks.average_(self.accelerator, [losses])
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if not bad and subnet.is_finite():
            return
        steps = self._round_steps or 1
        first = self.steps - steps + 1 + (bad[0] * steps // len(losses) if bad else steps - 1)
        what = f"the loss is {losses[bad[0]].item()}" if bad else "a weight is not finite"
        raise UserError(
            f"{what} at step {first}, round {self.rounds}: the master and the last checkpoint keep the values from before "
            "this round; lower optimizer.lr, set optimizer.clip_norm or turn memory.autocast off"
        )

    def probabilities(self) -> Tensor:
        """s of every sampled unit, flat; a single 1 when no group is sampled."""
        return torch.cat(list(self.structure.s.values())) if self.structure.names else torch.ones(1)

    @property
    def device_bytes(self) -> int:
        """Bytes of the tensors that the rounds keep on the device, activations aside."""
        parts = [part for part in (self._subnet, self._reference) if part is not None]
        held = sum(part.nbytes for part in parts)
        if self._subnet is not None:
            gradients = sum(p.numel() * p.element_size() for p in self._subnet.parameters.values())
            held += self._subnet.moment_bytes + gradients
        return held

    def measured(self) -> dict[str, Any]:
        """Numbers of the running (or last) round, for a log."""
        return {
            "keep": self.structure.keep,
            "gather_ms": self.report.gather_ms,
            "writeback_ms": self.report.writeback_ms,
            "delta_norm": self.report.delta_norm,
            "difference": self.report.difference,
            "bytes_moved": self.report.bytes_moved,
            "transfer_share": self.spent.share(),
            "host_bytes": memory.host_bytes(),
            "device_bytes": memory.device_bytes(self.device) or self.device_bytes,
        }

    # Between two rounds: what a checkpoint needs beside the tensors

    @property
    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The optimizer's names (`exp_avg`) → parameter names → full-size tensor views, host."""
        return self._master.moments

    def state(self) -> dict[str, Any]:
        """Numbers that, with the master, the moments and the structure, say where the run is. Between rounds only."""
        if self._round_steps is not None:
            raise RuntimeError("a checkpoint is taken between two rounds: call finish_round() first")
        if not self._carry:
            self._trained_plan = ""  # moments are on the device alone: start them anew, as a resumed run must
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "settled": self.settled,
            "clock": self._clock,
            "trained_plan": self._trained_plan,
            "scalars": self._master.scalars,
            "report": asdict(self.report),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps, self.rounds, self.settled = state["steps"], state["rounds"], state["settled"]
        self._clock, self._trained_plan = state["clock"], state["trained_plan"]
        self.report = RoundReport(**state["report"])
        self._master.scalars = {name: dict(scalars) for name, scalars in state["scalars"].items()}
        self._subnet = self._reference = None

    def _running(self) -> TrainedSubnet:
        if self._round_steps is None:
            self._begin_round()
        assert self._subnet is not None
        return self._subnet
