"""How s and the weights start in a new run."""

from typing import Any

import torch

from offload_trainer.config import Config
from offload_trainer.errors import UserError
from offload_trainer.initial.importance import importance
from offload_trainer.initial.scale import match_scale
from offload_trainer.initial.standins import stand_in
from offload_trainer.master.precision import not_finite
from offload_trainer.monitor import Monitor
from offload_trainer.offloader import Offloader
from offload_trainer.prepare import Prepared


def start(config: Config, run: Prepared, offloader: Offloader, monitor: Monitor) -> None:
    """Before the first round."""
    section, initialise = config.structure, run.task.initialise
    # Of parameters: a buffer may hold an infinity on purpose, as a mask does.
    parameters = dict(offloader.model.named_parameters())
    if initialise is None and (name := not_finite(parameters)) is not None:
        raise UserError(f"{name} of the model to begin with holds a NaN or an infinity: nothing can be learned from it")
    if not run.structure.names:
        return
    if section.start != "uniform":
        _start_structure(config, run, offloader, monitor)
    if section.rescale and initialise is not None:
        changed = match_scale(offloader, initialise)
        if changed:
            monitor.message(f"initial weights: {changed} tensors scaled for the widths of the subnet")


def _start_structure(config: Config, run: Prepared, offloader: Offloader, monitor: Monitor) -> None:
    """s from the importance of the model's units or, as a baseline, from a random order of them."""
    section = config.structure
    batches: list[Any] = []
    if section.start == "random":
        generator = torch.Generator().manual_seed(config.seed)
        scores = {name: torch.rand(len(s), generator=generator) for name, s in run.structure.s.items()}
    else:
        whole = run.parts(range(config.steps, config.steps + section.calibration_batches))
        batches = [part for batch in whole for part in run.through_master(batch)]
        scores, by_weight = importance(
            offloader.model, run.groups, run.structure.names, batches, run.task.loss_fn, run.accelerator
        )
        if by_weight:
            named = ", ".join(by_weight[:3]) + (" and others" if len(by_weight) > 3 else "")
            monitor.message(f"importance of {len(by_weight)} groups judged by weights alone ({named})")
    offloader.start_from(scores, section.explore)
    if batches and section.stand_in and section.settle == 1:
        layers = stand_in(
            offloader.model, offloader.master, offloader.agenda.top(), batches, run.task.loss_fn, run.accelerator
        )
        monitor.message(f"kept units stand in for the others in {layers} layers")
