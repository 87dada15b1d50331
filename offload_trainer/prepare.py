"""Everything a run needs, made from its config; all that can be wrong with it is found here, before it is paid for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed

from offload_trainer import memory, tasks
from offload_trainer.batches import batch_rows, pieces, shard
from offload_trainer.config import Config, Custom
from offload_trainer.config.base import size_in_bytes
from offload_trainer.device import ranks
from offload_trainer.device.link import probe_link
from offload_trainer.device.movers import choose_mover
from offload_trainer.device.processes import transfer_threads
from offload_trainer.errors import UserError
from offload_trainer.evaluation import computing_narrow
from offload_trainer.files.format import readable
from offload_trainer.files.writing import require_savable
from offload_trainer.forecast import fitting
from offload_trainer.forecast.fitting import Decision
from offload_trainer.forecast.footprint import optimizer_cost
from offload_trainer.forecast.ledger import Ledger
from offload_trainer.forecast.passes import Passes
from offload_trainer.forecast.predictor import Predictor
from offload_trainer.forecast.show import Forecast
from offload_trainer.groups import Groups, Plan, find_groups, read_rules, slice_module, verify_groups
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.making import (
    OptimizerFactory,
    export_note,
    make_accelerator,
    make_structure,
    master_folder,
    optimizer_factory,
    recompute_activations,
    require_graphs,
    require_same_config,
    resumable,
)
from offload_trainer.master import Checkpoint, StateSpec, probe_optimizer, trained_dtype
from offload_trainer.master.precision import FP32, TYPES, Precision
from offload_trainer.randomness import preserve_random_state
from offload_trainer.resuming import checkpoint_to_resume, require_resumable
from offload_trainer.structure import Structure
from offload_trainer.structure.arguments import PAIRLESS


@dataclass(frozen=True)
class Prepared:
    """A run that may begin."""

    config: Config
    """With the keep ratio that was chosen for it."""
    accelerator: Accelerator
    task: tasks.Task
    groups: Groups
    structure: Structure
    optimizer: OptimizerFactory
    precision: Precision
    forecast: Forecast
    checkpoint: Checkpoint | None
    """To resume from."""
    rows_at_once: int | None
    """Of a batch, on this process's device; None: as many as it has."""

    def local(self, step: int) -> Any:
        """This process's share of one step's batch, on the host."""
        return shard(self.task.train[step], self.accelerator.process_index, self.accelerator.num_processes)

    def parts(self, steps: Iterable[int]) -> list[Any]:
        """This process's share of these steps' batches, in the parts in which a batch is taken, on the host."""
        return [part for batch in map(self.local, steps) for part in self.micro_batches(batch)]

    @cached_property
    def calibration(self) -> list[Any]:
        """Training batches, of steps after the last, that choose the result and give BatchNorm its statistics; kept,
        since a loader would begin an epoch anew for them, and one more for the next training batch."""
        return self.parts(range(self.config.steps, self.config.steps + self.config.structure.result_batches))

    def for_evaluation(self, batch: Any) -> list[Any]:
        """A validation batch, in parts of no more rows than a training pass has, where those are limited."""
        return pieces(batch, self.rows_at_once)

    def micro_batches(self, batch: Any) -> list[Any]:
        """The parts in which a batch is taken: one that does not divide, such as the last of a loader, whole."""
        count = self.config.micro_batches if batch_rows(batch) % self.config.micro_batches == 0 else 1
        return [shard(batch, i, count) for i in range(count)]

    def through_master(self, batch: Any) -> list[Any]:
        """A batch, in the parts in which it passes through the full master."""
        return pieces(batch, self.forecast.ledger.rows)


def prepare(config: Config) -> Prepared:
    """Raises `UserError` for whatever the user can mend, before anything full-size is allocated.

    For a dry run what does not fit is no error but the answer.
    """
    accelerator = make_accelerator(config)
    require_same_config(config, accelerator)
    require_graphs(config, accelerator)
    out = Path(config.out)
    fitting.require_writable(out, make=not config.dry_run)
    folder = master_folder(config)
    if folder is not None and (folder.exists() or config.memory.folder is not None):
        fitting.require_disk(folder)
    # Here, where nothing is allocated yet, and before the process is measured: it loads a compiler's interface.
    choose_mover(config.memory.transfer, transfer_threads(accelerator.device, overlap=config.memory.overlap))
    set_seed(config.seed)
    task = tasks.build_task(config.task, config.seed)
    require_savable(named_tensors(task.model))
    if config.memory.recompute:
        recompute_activations(task.model)
    if config.structure.rules is not None:
        groups = read_rules(config.structure.rules, task.model, task.widths)
    else:
        groups = find_groups(
            task.model, task.example_inputs, widths=task.widths, pin_unknown=config.structure.pin_unknown
        )
    checkpoint = checkpoint_to_resume(config.resume, out)
    if checkpoint is not None and config.structure.keep is None:
        config = with_keep(config, checkpoint.meta["config"].get("structure.keep"))
    optimizer = optimizer_factory(config.optimizer)
    carry = config.optimizer.state == "carry"
    state_spec = probe_optimizer(optimizer, trained_dtype(task.model), accelerator.device, carry=carry)
    precision = Precision(TYPES[config.memory.weights], TYPES[config.memory.moments], config.seed)
    predictor = make_predictor(config, accelerator, task, groups, optimizer, state_spec, precision, checkpoint)
    decision = decide_keep(config, accelerator, groups, predictor)
    config = with_keep(config, decision.keep)
    structure = make_structure(config, groups)
    if checkpoint is not None:
        require_resumable(checkpoint, resumable(config), config.steps, task.model, state_spec, structure, precision)
    export = export_note(config, task, groups)
    forecast = make_forecast(config, accelerator, predictor, decision, export)
    if not config.dry_run:
        fitting.require(forecast.verdicts)
    fits = all(verdict.fits for verdict in forecast.verdicts)
    if fits and config.structure.verify and structure.names:
        verify_groups(task.model, groups, task.example_inputs)
    if fits and predictor.rehearsal and isinstance(config.task, Custom):
        rehearse(config.task.function, accelerator, predictor, Plan(groups, structure.top()), task, precision)
    if fits:
        memory.trim_heap()
        growth = memory.host_bytes() - predictor.process  # by what a first forward and backward load and keep
        forecast = replace(forecast, ledger=forecast.ledger.with_larger_process(growth))
    rows = batch_rows(predictor.passes.batch) if config.micro_batches > 1 else None
    return Prepared(config, accelerator, task, groups, structure, optimizer, precision, forecast, checkpoint, rows)


def rehearse(
    function: str,
    accelerator: Accelerator,
    predictor: Predictor,
    plan: Plan,
    task: tasks.Task,
    precision: Precision,
) -> None:
    """Try a user's own loss and metric on a subnet and real batches."""
    module = slice_module(task.model, plan, plan.groups).to(accelerator.device)
    batches = predictor.passes.batch, predictor.passes.val_batch
    with preserve_random_state(accelerator.device):
        with accelerator.autocast():
            tasks.rehearse(task, module, *batches, function)
        if precision.weights != FP32.weights:  # the master is evaluated as it is stored, at the end
            for parameter in module.parameters():
                parameter.data = parameter.data.to(precision.weight(parameter.dtype, parameter.shape))
            with computing_narrow(module, accelerator):
                tasks.rehearse_narrow(task, module, batches[1], function)


def with_keep(config: Config, keep: float | None) -> Config:
    """The config at a keep ratio, where it has one."""
    if not config.structure.uses_keep:
        return config
    return config.model_copy(update={"structure": config.structure.model_copy(update={"keep": keep})})


def make_predictor(
    config: Config,
    accelerator: Accelerator,
    task: tasks.Task,
    groups: Groups,
    optimizer: OptimizerFactory,
    state_spec: StateSpec,
    precision: Precision,
    checkpoint: Checkpoint | None,
) -> Predictor:
    """Raises `UserError` if the batch does not divide by the number of processes."""
    device, structure = accelerator.device, config.structure
    batch = shard(task.train[0], accelerator.process_index, accelerator.num_processes)
    if config.micro_batches > 1:
        parts = accelerator.num_processes * config.micro_batches
        batch = shard(task.train[0], 0, parts, "the number of processes times micro_batches")
    val_batch = pieces(task.val[0], batch_rows(batch) if config.micro_batches > 1 else None)[0]
    batch, val_batch = send_to_device(batch, device), send_to_device(val_batch, device)
    memory.load_libraries(device)
    optimizer_cost(optimizer, torch.float32, device)  # what a first step imports and starts is there from now on
    memory.trim_heap()
    every, keep_last = config.checkpoint.every, config.checkpoint.keep_last
    passes = Passes(
        task.model,
        groups,
        precision,
        task.loss_fn,
        task.metrics_fn,
        batch,
        val_batch,
        device,
        autocast=config.memory.autocast == "bf16",
        parted=task.parted,
    )
    return Predictor(
        passes,
        state_spec,
        optimizer,
        process=memory.host_bytes(),
        processes=accelerator.num_processes,
        # Not of a model on meta, which has no values yet.
        rehearsal=isinstance(config.task, Custom) and not any(t.is_meta for t in named_tensors(task.model).values()),
        proof=structure.verify,
        calibration=structure.start == "importance" and checkpoint is None,
        stand_in=structure.stand_in and structure.settle == 1,
        candidates=2 if structure.result == "best_of" else 1,
        varying=structure.sampler == "bernoulli" or structure.budget == "global",
        mapped=config.memory.master == "file",
        overlap=config.memory.overlap,
        credits=structure.control == "linear" or structure.estimator in PAIRLESS,
        # A new one is written before the oldest is removed.
        checkpoints=min(keep_last + 1, config.steps // every + 1 if every else 1),
        exports_full=config.export.full,
    )


def decide_keep(config: Config, accelerator: Accelerator, groups: Groups, predictor: Predictor) -> Decision:
    """The keep ratio of the run: the config's, or the largest that fits `memory.device`; and what the run takes."""
    section = config.structure

    def ledger_at(keep: float) -> Ledger:
        structure = make_structure(with_keep(config, keep), groups)
        # Beside the subnet that is trained, the device holds the one it is compared with, or that waits for its turn.
        ahead = config.memory.overlap and section.reference == "next" and not predictor.varying
        reference = bool(structure.names) and section.settle < 1 and (structure.compares or ahead)
        sampled = groups.sliced_by(structure.names)
        plan = Plan(groups, structure.top())
        return predictor.ledger(plan, reference=reference, ahead=reference and ahead, sampled=sampled)

    asked = config.memory.device
    size = None if asked in (None, "auto") else size_in_bytes(asked)
    room = fitting.device_room(accelerator.device, asked, size, elsewhere=config.dry_run)
    if asked is None or section.keep is not None or not section.uses_keep:
        return fitting.check_keep(ledger_at, section.share, room, adjustable=section.uses_keep)
    if section.schedule == "cubic":
        raise UserError(
            f"structure.keep (null) must be given with structure.schedule (cubic): what memory.device ({asked}) must "
            f"hold is decided by structure.start_keep ({section.start_keep:g})"
        )
    assert room is not None
    decision = fitting.choose_keep(ledger_at, room)
    if decision.ledger.notes:
        raise UserError(f"memory.device ({asked}) cannot choose structure.keep: {decision.ledger.notes[0]}")
    # Each process looked at its own memory.
    return min(ranks.gather(accelerator, decision), key=lambda one: one.keep)


def make_forecast(
    config: Config, accelerator: Accelerator, predictor: Predictor, decision: Decision, export: str | None
) -> Forecast:
    out = Path(config.out)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    verdicts = [
        fitting.host_verdict(decision.ledger, fitting.host_room(), predictor.savings()),
        *fitting.disk_verdicts(decision.ledger, there, config.out, master_folder(config)),
    ]
    if decision.verdict is not None:
        verdicts.insert(1, decision.verdict)
    link = probe_link(accelerator.device)
    notes = []
    if predictor.varying:
        notes.append("widths vary from round to round (structure.sampler, budget): these are of plans of the mean size")
    if config.memory.compile:
        notes.append("what torch.compile itself takes (memory.compile) is not counted")
    if config.memory.master == "file":
        notes.append("pages of the mapped master are not counted: the system takes them back when it needs them")
    asked, free = config.memory.device, memory.device_available(accelerator.device)
    if asked not in (None, "auto") and free is not None and free < size_in_bytes(asked):
        notes.append(f"this device has {readable(free)} free, less than memory.device ({asked})")
    if accelerator.device.type == "cuda":
        notes.append("the CUDA context, some hundred MiB of the device, is not counted")
    return Forecast(decision.ledger, tuple(verdicts), decision.reason, link, export, tuple(notes))
