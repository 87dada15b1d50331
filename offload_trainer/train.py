"""A run, top to bottom."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from offload_trainer import memory, snapshot
from offload_trainer.batches import pinned, shard
from offload_trainer.config import Config
from offload_trainer.config.base import size_in_bytes
from offload_trainer.device import ranks
from offload_trainer.errors import NotFinite, UserError
from offload_trainer.evaluation import evaluate, evaluate_full
from offload_trainer.files.writing import sole_writer
from offload_trainer.forecast.show import show_forecast
from offload_trainer.groups import Plan
from offload_trainer.making import changes, master_folder, of_checkpoint, set_learning_rate
from offload_trainer.master import CheckpointStore, set_aside, whole_folder
from offload_trainer.master.interrupts import defer_interrupts
from offload_trainer.monitor import Monitor
from offload_trainer.offloader import Offloader
from offload_trainer.prepare import Prepared, prepare
from offload_trainer.randomness import preserve_random_state
from offload_trainer.result import best_of, norms_of, recalibrate, recalibrate_master, save_export
from offload_trainer.starting import start
from offload_trainer.stopping import stopping_together
from offload_trainer.timing import Meter


def train(config: Config) -> None:
    """Prepare, train round by round, leave the result in `config.out`. Raises `UserError` for what a user can mend."""
    run = prepare(config)
    config, accelerator, task = run.config, run.accelerator, run.task
    if accelerator.is_main_process:
        show_forecast(run.groups, run.forecast, whole=config.dry_run)
    if config.dry_run:
        return

    first = run.checkpoint.meta["step"] if run.checkpoint else 0
    store = CheckpointStore(Path(config.out) / "checkpoints", config.checkpoint.keep_last)
    torch.manual_seed(config.seed)  # the initial weights depend on nothing that came before
    before_master = memory.host_bytes()
    with (
        sole_writer(Path(config.out)) if accelerator.is_main_process else nullcontext(),
        Offloader(
            task.model,
            run.groups,
            task.loss_fn,
            optimizer=run.optimizer,
            structure=run.structure,
            sync_every=config.sync_every,
            precision=run.precision,
            accelerator=accelerator,
            state=config.optimizer.state,
            clip_norm=config.optimizer.clip_norm,
            compile="graphs" if config.memory.cuda_graphs else config.memory.compile,
            reference=config.structure.reference,
            overlap=config.memory.overlap,
            folder=master_folder(config),
            transfer=config.memory.transfer,
            materialise=task.materialise,
        ) as offloader,
        Monitor(
            Path(config.out),
            config.steps,
            task.unit,
            accelerator,
            config.track.display,
            first_step=first,
        ) as monitor,
    ):
        aside = store.begin(first) if accelerator.is_main_process else None
        if aside is not None:
            monitor.message(f"checkpoints of an earlier run are now in {aside}")
        monitor.message(f"transfers: {offloader.mover.why}")
        if run.checkpoint is not None:
            snapshot.restore(offloader, run.checkpoint)
            monitor.message(f"resumed from {run.checkpoint.path}{changes(config, run.checkpoint.meta)}")
        if config.track.trackers:
            accelerator.init_trackers("offload-trainer")
        meter = Meter(task.unit, before_master, monitor.latest)
        if run.checkpoint is None:
            with meter.paused("start"):
                start(config, run, offloader, monitor)
        last_end = offloader.steps  # of a round
        # Before the first step, or where a validation was broken off: the main process has the records.
        missing = due(config.track.eval_every, monitor.validated, last_end) and last_end < config.steps
        if ranks.anywhere(accelerator, accelerator.is_main_process and missing):
            with meter.paused("evaluation"):
                first_look = validate(run, offloader)
            times = {key: monitor.latest.get(key, 0.0) for key in ("train_seconds", "train_cpu_seconds")}
            monitor.log({"step": last_end, **times, **first_look})

        with (
            stopping_together(accelerator) as stop_if_asked,
            kept_when_broken_off(offloader, store, config, monitor),
        ):
            begin_round(offloader, config)
            for batch in batches(run, offloader.steps, config.steps):
                set_learning_rate(offloader.optimizer, config, offloader.steps)
                parts = run.micro_batches(batch)
                losses = [train_on(part, offloader, len(parts)) for part in parts]
                unfinished: dict[str, Any] = {}  # a record that waits for its validation
                try:
                    with defer_interrupts():  # no step without its record
                        offloader.step()
                        meter.add(task.count(batch) * accelerator.num_processes, torch.stack(losses).sum())
                        step = offloader.steps
                        ended = offloader.between_rounds and step < config.steps
                        validates = ended and due(config.track.eval_every, last_end, step)
                        saves = ended and due(config.checkpoint.every, last_end, step)
                        if ended and not validates and not saves:  # before the host waits for the last one's numbers
                            begin_round(offloader, config)
                        pictured = step == config.steps or (ended and due(config.track.structure_every, last_end, step))
                        if step % config.track.log_every == 0 or validates or pictured:
                            record = {"step": step, **meter.read(accelerator), **measured(run, offloader)}
                            monitor.show(run.structure.flat if run.structure.names else torch.ones(1))
                            record |= {"structure": run.structure.portrait(step)} if pictured else {}
                            if validates:
                                unfinished = record
                            else:
                                monitor.log(record)
                    if validates:
                        with meter.paused("evaluation"):
                            unfinished |= validate(run, offloader)
                finally:
                    if unfinished:
                        with defer_interrupts():
                            monitor.log(unfinished)
                if saves:
                    with meter.paused("checkpoint"):
                        save_checkpoint(offloader, store, config)
                stop_if_asked()
                last_end = step if ended else last_end
                if offloader.between_rounds:
                    begin_round(offloader, config)  # before a loader takes its time for the next batch
            offloader.finish_round()

        meter.stop()
        save_checkpoint(offloader, store, config)
        offloader.finish_round()  # waits for the checkpoint
        monitor.summary(conclude(config, run, offloader, meter, monitor))
    accelerator.end_training()


def begin_round(offloader: Offloader, config: Config) -> None:
    if offloader.steps >= config.exploring_steps:
        offloader.settle()
    if offloader.steps < config.steps:
        offloader.begin_round()


def train_on(batch: Any, offloader: Offloader, parts: int) -> Tensor:
    """Forward and backward of one of so many parts of a step's batch; its share of the step's loss."""
    loss = offloader.loss(batch) / parts
    offloader.accelerator.backward(loss)
    return loss.detach()


def measured(run: Prepared, offloader: Offloader) -> dict[str, Any]:
    """The offloader's numbers, and how near transfers come to the probed speed of the link."""
    numbers = offloader.measured()
    return {**numbers, "link_share": numbers["bytes_per_second"] / run.forecast.link.both_ways}


def validate(run: Prepared, offloader: Offloader) -> dict[str, float]:
    """Metrics of the subnet of the largest s, as the export would have it now."""
    task, accelerator = run.task, run.accelerator
    subnet = offloader.export().to(accelerator.device)
    with preserve_random_state(accelerator.device):  # training goes on as if nobody had looked
        if norms_of(subnet):
            recalibrate(subnet, run.calibration, task.loss_fn, accelerator)
        means = evaluate(subnet, task.val, task.metrics_fn, task.count, accelerator, run.for_evaluation)
    metrics = task.report(means)
    return {f"val_{name}": value for name, value in metrics.items()}


def conclude(config: Config, run: Prepared, offloader: Offloader, meter: Meter, monitor: Monitor) -> dict[str, Any]:
    """Choose the result, evaluate it and the full master, export it; returns the content of summary.json."""
    accelerator, task, out = run.accelerator, run.task, Path(config.out)
    plan = offloader.agenda.top()
    if config.structure.result == "best_of" and run.structure.names:
        plan = best_of(offloader, config.structure.samples, run.calibration)
    small = offloader.export(plan).to(accelerator.device)
    if norms_of(small):
        recalibrate(small, run.calibration, task.loss_fn, accelerator)
        parts = [part for batch in run.calibration for part in run.through_master(batch)]
        recalibrate_master(offloader.model, parts, task.loss_fn, accelerator)
    with meter.paused("evaluation"):
        means = evaluate(small, task.val, task.metrics_fn, task.count, accelerator, run.for_evaluation)
        exported = task.report(means)
        means = evaluate_full(offloader.model, task.val, task.metrics_fn, task.count, accelerator, run.through_master)
        full = task.report(means)
    if accelerator.is_main_process:
        results: dict[str, tuple[nn.Module, Plan | None]] = {"export": (small, plan)}
        if config.export.full:
            results["full"] = (offloader.model, None)
        for name, (module, kept) in results.items():
            with whole_folder(out / name) as folder:
                save_export(module, kept, folder, size_in_bytes(config.export.shard_size))
                note = task.save_export(module, folder) if task.save_export is not None else None
                aside = set_aside(out / name, folder)
            if note is not None:
                monitor.message(f"{out / name}: {note}")
            if aside is not None:
                monitor.message(f"{out / name} held files that are not in the new one: all of it is in {aside} now")
    accelerator.wait_for_everyone()
    return {
        "steps": offloader.steps,
        "rounds": offloader.rounds,
        "exported": {**exported, "parameters": sum(p.numel() for p in small.parameters())},
        "full_master": {**full, "parameters": sum(p.numel() for p in offloader.model.parameters())},
        **meter.summary(offloader.spent),
        "transfers": transfers(run, offloader),
        "ledger": {
            "predicted": run.forecast.ledger.as_dict(),
            "measured": {
                "host_peak_bytes": memory.host_peak(),
                "host_before_master_bytes": meter.base_bytes,
                **device_memory(accelerator.device, offloader.measured()["device_bytes"]),
            },
        },
    }


def transfers(run: Prepared, offloader: Offloader) -> dict[str, Any]:
    """What they took in all, beside the probed speed of the link."""
    total, link = offloader.transfers.total().as_dict(), run.forecast.link
    total |= {f"{name.removesuffix('_ms')}_seconds": total.pop(name) / 1e3 for name in list(total) if "_ms" in name}
    return {**total, "link_bytes_per_second": link.both_ways, "link_share": total["bytes_per_second"] / link.both_ways}


def batches(run: Prepared, first: int, steps: int) -> Iterator[Any]:
    """This rank's share of the batch of every step from `first` on, on the device."""
    # Its own generator: a loader draws a seed when it starts, which must not move the state that dropout draws from.
    order: Any = range(first, steps)
    loader = DataLoader(run.task.train, batch_size=None, sampler=order, generator=torch.Generator())
    for batch in loader:
        share = shard(batch, run.accelerator.process_index, run.accelerator.num_processes)
        if run.accelerator.device.type == "cuda":  # else the copy to it would not go on by itself
            share = pinned(share)
        yield send_to_device(share, run.accelerator.device, non_blocking=True)


def device_memory(device: torch.device, held: int) -> dict[str, int]:
    """Peak of the device's memory; on a CPU, which does not tell, what the subnet held from step to step."""
    peak = memory.device_peak(device)
    return {"device_held_bytes": held} if peak is None else {"device_peak_bytes": peak}


def due(every: int, previous: int, step: int) -> bool:
    """Whether what is done every so many steps (0: never) falls due between two rounds' ends, `previous` and `step`."""
    return every > 0 and step // every > previous // every


def save_checkpoint(offloader: Offloader, store: CheckpointStore, config: Config) -> None:
    """Between two rounds: while the next one trains, or until the offloader is next waited for."""
    if offloader.accelerator.is_main_process:
        snapshot.save_meanwhile(offloader, store, of_checkpoint(config))


@contextmanager
def kept_when_broken_off(
    offloader: Offloader, store: CheckpointStore, config: Config, monitor: Monitor
) -> Iterator[None]:
    """Whatever ends the block early (Ctrl-C, SIGTERM, a loss that is not finite), keep the last whole round."""
    try:
        yield
    except BaseException:
        if offloader.accelerator.is_main_process:
            try:
                try:
                    step = offloader.boundary().numbers["steps"]
                except NotFinite:  # what had just ended
                    step = offloader.boundary().numbers["steps"]
                if step and not store.has(step):
                    snapshot.save(offloader, store, of_checkpoint(config))
                monitor.message(
                    f"broken off; --resume auto goes on from step {step}"
                    if step
                    else "broken off in the first round: there is no checkpoint"
                )
            except (RuntimeError, UserError) as error:
                monitor.message(f"broken off, and no checkpoint could be made of it: {error}")
        raise
