"""Ours, as a user calls it: whole rounds with pairs, gather and write-back."""

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.peers.sizes import Size, architecture, fill, loss_fn, save_activations
from benchmarks.peers.trainer import ADAMW, Trainer, data, numel
from offload_trainer import Offloader, Structure, find_groups

SYNC_EVERY = 50


def start(size: Size, device: torch.device, keep: float) -> Trainer:
    """`keep` of every axis, so about its square of the weights, in a step; fp32 master and moments on the host, bf16
    autocast, fused AdamW.

    Over the link: what the offloader counted of its last round, gathered and written back, by its steps.
    """
    model = architecture(size)
    groups = find_groups(model, {"input_ids": torch.zeros(3, 11, dtype=torch.long)})
    save_activations(model, size)
    total = numel(model)
    structure = Structure(groups, keep, seed=0)
    offloader = Offloader(
        model,
        groups,
        loss_fn,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True, **ADAMW),
        structure=structure,
        sync_every=SYNC_EVERY,
        accelerator=Accelerator(mixed_precision="bf16", cpu=device.type == "cpu"),
        materialise=lambda model: fill(model.parameters(), device),
    )
    offloader.__enter__()
    batches = data(size, device)

    def step() -> Tensor:
        loss = offloader.loss(next(batches))
        offloader.accelerator.backward(loss)
        offloader.step()
        return loss.detach()

    def warm() -> None:
        """Three short rounds: the last is the first to find subnet, reference, moments and staging already made."""
        for _ in range(3):
            for _ in range(structure.paired_batches + 1):
                step()
            offloader.finish_round()

    return Trainer(
        step,
        parameters=total,
        trained=sum(offloader.agenda.top().shape(name).numel() for name, _ in model.named_parameters()),
        link_bytes=lambda: offloader.measured()["bytes_moved"] / SYNC_EVERY,
        link_source=f"counted: gathered and written back, a round of {SYNC_EVERY} steps",
        recipe={"keep": keep, "sync_every": SYNC_EVERY, "paired_batches": structure.paired_batches},
        turn=SYNC_EVERY,
        warm=warm,
        close=lambda: offloader.__exit__(None, None, None),
    )
