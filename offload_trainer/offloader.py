"""The public object: owns the rounds. Between two samplings it is a small model with an optimizer, nothing more."""

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offload_trainer import memory
from offload_trainer.agenda import Agenda, Reference
from offload_trainer.batches import shallow_copy
from offload_trainer.device import ranks
from offload_trainer.device.credit_sums import LAST, CreditSums
from offload_trainer.device.movers import Choice, choose_mover
from offload_trainer.device.processes import require_supported, transfer_threads
from offload_trainer.device.subnet import TrainedSubnet
from offload_trainer.device.workbench import Compile, Workbench
from offload_trainer.groups import Groups, Plan, require_of
from offload_trainer.master import FP32, Master, Precision, probe_optimizer, trained_dtype
from offload_trainer.round import Boundary, Round, require_arguments
from offload_trainer.rounds import Rounds
from offload_trainer.structure import Structure
from offload_trainer.timing import RoundReport, Spent, Transfers

LossFn = Callable[[nn.Module, Any], Tensor]


class Offloader:
    """Trains `model`, which stays in host memory, one sliced subnetwork at a time.

    model: taken over; its tensors move into the master's slabs. On meta it needs `materialise`, to fill them in place.
    loss_fn: `loss_fn(module, batch)` → scalar tensor, the mean over the batch.
    optimizer: makes the optimizer of a list of parameters. sync_every: K, optimizer steps between two samplings.
    state: "carry" keeps the optimizer's moments in the master; "reset" starts them anew with every round.
    clip_norm: of gradients, at most. compile: `torch.compile` the subnet (constant widths); "graphs": as CUDA graphs.
    reference: what a subnet is compared with: the one trained "next", or a "fresh" one (agenda.py).
    overlap: transfers go on in the background, with the same results, where widths are constant and reference "next".
    folder: of a local disk, for a master larger than the memory: it is mapped from files there.
    transfer: who moves elements on the host: torch ("plain"), compiled kernels ("native"), or the faster.
    precision: types in which the master stores large tensors; subnet and export have those that `model` came in.

    A round in which the loss or a weight was not finite raises at its end or, where rounds overlap, in the next one's
    first step, before anything of it reaches the master. A clean exit from its context writes back a last, unfinished
    round.
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
        compile: Compile = False,
        materialise: Callable[[nn.Module], None] | None = None,
        precision: Precision = FP32,
        reference: Reference = "next",
        overlap: bool = True,
        folder: Path | None = None,
        transfer: Choice = "auto",
    ):
        self.accelerator = accelerator or Accelerator()
        require_supported(self.accelerator)
        require_arguments(sync_every, state, clip_norm, compile, fits=structure.constant_widths or not compile)
        self.groups, self._structure, self.loss_fn, self.device = groups, structure, loss_fn, self.accelerator.device
        self.sync_every, self.clip_norm, self.precision = sync_every, clip_norm, precision
        require_of(model, groups)
        state_spec = probe_optimizer(optimizer, trained_dtype(model), self.device, carry=state == "carry")
        self.agenda, self._closed = Agenda(groups, structure, reference), False
        pin, sampled = self.device.type == "cuda", groups.sliced_by(structure.names)
        self._credit_sums = CreditSums(model, groups, structure.credited, magnitude=structure.estimator == "magnitude")
        self.mover = mover = choose_mover(transfer, transfer_threads(self.device, overlap=overlap))
        self._master = Master(model, state_spec, materialise=materialise, pin=pin, precision=precision, folder=folder)
        self._bench = Workbench(
            self._master,
            self.device,
            optimizer,
            state_spec,
            sampled=sampled,
            compile=compile,
            overlap=overlap,
            mover=mover,
        )
        self._rounds = Rounds(self.accelerator, self.agenda, structure, self._credit_sums, self._master, self._bench)

    # What a training loop calls

    def loss(self, batch: Any) -> Tensor:
        """Loss of the subnet on a batch; on the round's paired batches the reference is evaluated as well.

        A step's batch may come in parts, each with a `loss` and a backward pass: divide each loss by their number.
        """
        running = self._running()
        paired = running.paired and running.steps < self._structure.paired_batches
        if paired:
            with self._rounds.spent.on("reference"), self.accelerator.autocast():
                against = self._bench.reference_loss(self.loss_fn, shallow_copy(batch))
        with self.accelerator.autocast():  # not the same: its cache would keep the reference's narrow weights
            loss = self.loss_fn(self._bench.forward, batch)
        running.add_loss(loss)
        if paired:
            running.differences.append(loss.detach() - against)
        return loss

    def step(self) -> None:
        """Optimizer step on the subnet, with gradients averaged over the ranks; every K-th call ends the round."""
        running = self._rounds.under_way
        if running is None or not running.losses:
            raise RuntimeError("step() follows loss() and a backward pass: this round has seen no loss yet")
        subnet = self._bench.subnet
        if not running.steps:
            ranks.require_same(self.accelerator, f"the plan of round {self.rounds}", subnet.plan.digest)
        ranks.average_gradients(self.accelerator, subnet.parameters)
        running.require_gradients(subnet.parameters, self._master.model)
        if running.learns and running.steps >= self.sync_every - LAST:
            self._credit_sums.add(subnet.plan, subnet.parameters)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(subnet.parameters.values()), self.clip_norm)
        self._bench.step()
        self._rounds.steps, running.steps = self._rounds.steps + 1, running.steps + 1
        if running.steps == 1:
            self._rounds.first_step_taken()
        if running.steps >= self.sync_every:
            self._rounds.end()
        elif running.steps == self._structure.paired_batches and not self._structure.constant_widths:
            self._bench.drop_reference()  # of other widths next time; free its memory for the rest of the round

    def begin_round(self) -> None:
        """Sample and gather now rather than at the next `loss`."""
        self._running()

    def finish_round(self) -> None:
        """End the running round now, however few steps it had; afterwards the master is complete."""
        self._rounds.finish()

    @property
    def between_rounds(self) -> bool:
        return self._rounds.under_way is None

    def settle(self) -> None:
        """From the next round on train the units of the largest s only, and leave s as it is."""
        self.agenda.settled = True

    def export(self, plan: Plan | None = None) -> nn.Module:
        """A small dense module on the CPU: the sliced module of `plan`, by default of the largest s."""
        self.finish_round()
        return self._master.sliced(plan or self.agenda.top(), self.groups)

    def start_from(self, scores: Mapping[str, Tensor], explore: float) -> None:
        """Begin the run with s by importance (see `Structure.start_from`); the first round trains the top plan."""
        if self.steps or not self.between_rounds:
            raise RuntimeError("start_from() belongs before the first round")
        self._structure.start_from(scores, explore)
        self.agenda.starts_from_top = True
        self._rounds.set_boundary()

    def __enter__(self) -> "Offloader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._closed = True
        with closing(self._master), closing(self._bench):
            if kind is None:
                self.finish_round()
            else:
                with suppress(Exception):  # one is on its way already
                    self._rounds.conclude()

    # What can be looked at

    @property
    def master(self) -> Mapping[str, Tensor]:
        """Parameter and buffer names → full-size tensor views, host, in the types they are stored in."""
        self._rounds.wait()
        return self._master.tensors

    @property
    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The optimizer's names (`exp_avg`) → parameter names → full-size tensor views, host."""
        self._rounds.wait()
        return self._master.moments

    @property
    def model(self) -> nn.Module:
        """The full model; its tensors are the master's."""
        self._rounds.wait()
        return self._master.model

    @property
    def structure(self) -> Structure:
        """s, and what learns it. The next plan is drawn from it in the background."""
        self._rounds.wait()
        return self._structure

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return self._rounds.steps

    @property
    def rounds(self) -> int:
        """Finished."""
        return self._rounds.finished

    @property
    def spent(self) -> Spent:
        """Wall time that was not training."""
        return self._rounds.spent

    @property
    def transfers(self) -> Transfers:
        """What they took, round by round and in all."""
        return self._rounds.transfers

    @property
    def report(self) -> RoundReport:
        """Of the last finished round."""
        return self._rounds.report

    @property
    def plan(self) -> Plan:
        """The kept indices of the running round, by group name."""
        return self._running_subnet().plan

    @property
    def subnet(self) -> nn.Module:
        """The sliced module on the device."""
        return self._running_subnet().module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the running round: another one where widths vary. A learning rate schedule sets its `param_groups`."""
        return self._running_subnet().optimizer

    def measured(self) -> dict[str, Any]:
        """Numbers of the running round, once it has taken a step, and of the last finished one, for a log. The host
        waits for the end of that."""
        report, under_way = self.report.as_dict(), self._rounds.under_way
        return {
            "round": self.rounds if under_way and under_way.steps else max(0, self.rounds - 1),
            "keep": self._structure.keep,
            **report,
            "transfer_share": self.spent.share(),
            "host_bytes": memory.host_bytes(),
            "device_bytes": memory.device_bytes(self.device) or self._bench.nbytes,
        }

    # What a checkpoint needs beside the master and its moments

    def boundary(self) -> Boundary:
        """The run as it was when the last round ended. The master is still as it was then, so this is a checkpoint.

        Raises `NotFinite` if that round turns out to be so: the next call returns the end of the one before. Raises
        `RuntimeError` if a write-back was broken off: the master is then between two rounds for good.
        """
        return self._rounds.boundary()

    def at_boundary(self, work: Callable[[Boundary], object]) -> None:
        """Between two rounds: do what needs the master as it is. Where rounds overlap, it goes on while the next one
        trains, whose end waits for it and raises what it raised."""
        self._rounds.at_boundary(work)

    def load_boundary(self, boundary: Boundary) -> None:
        """Go on from a boundary; the master and its moments must hold what they held then."""
        self._rounds.load(boundary)

    def _running(self) -> Round:
        if self._closed:
            raise RuntimeError("the offloader is closed: train within its `with` block")
        return self._rounds.under_way or self._rounds.begin()

    def _running_subnet(self) -> TrainedSubnet:
        self._running()
        return self._bench.subnet
