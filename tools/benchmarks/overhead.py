"""What offloading costs: a run whose network stays in host memory, against its small network trained alone."""

from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor

from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import Workload, llama, on_device, training_step, vision
from offload_trainer import Offloader, Structure
from offload_trainer.groups import slice_module

KEEP = 0.5  # of every group, so a quarter of the weights
ROUNDS = {50: 7, 10: 11, 200: 3}  # K → timed rounds of each contender
QUICK_ROUNDS = {50: 2}
AIM = {50: 0.85}


def workloads(size: str) -> list[Workload]:
    match size:
        case "quick":
            return [
                llama(hidden=64, intermediate=128, heads=4, layers=2, batch=2, sequence=32),
                vision("resnet32", width=0.5, batch=2, image=8),
            ]
        case "cpu":
            return [
                llama(hidden=512, intermediate=2048, heads=8, layers=4, batch=4, sequence=128),
                vision("resnet32", width=2, batch=32),
            ]
        case _:
            return [
                llama(hidden=4096, intermediate=14336, heads=32, layers=8, batch=8, sequence=1024),
                vision("resnet32", width=16, batch=256),
            ]


def measure(setting: Setting) -> Iterator[Record]:
    for workload in workloads(setting.size):
        for sync_every, repeats in (QUICK_ROUNDS if setting.quick else ROUNDS).items():
            yield compare(setting, workload, sync_every, repeats)


def compare(setting: Setting, workload: Workload, sync_every: int, repeats: int) -> Record:
    """Whole rounds take turns with as many steps of the small network, which has the shapes of every round's subnet.

    The shares are of the host's time; on a GPU the reference's kernels run after the host has queued them.
    """
    torch.manual_seed(0)
    model = workload.build()
    groups = workload.groups(model)
    batches = on_device(workload, 4, setting.device)
    structure = Structure(groups, KEEP, seed=0)
    with Offloader(
        model,
        groups,
        workload.loss_fn,
        optimizer=workload.optimizer,
        structure=structure,
        sync_every=sync_every,
        accelerator=setting.accelerator,
    ) as offloader:
        small = slice_module(offloader.model, offloader.top_plan(), groups).to(setting.device).train()
        resident_step = training_step(small, workload, batches, setting.accelerator)
        offloaded_step = offloaded(offloader, batches)
        spent: list[dict[str, float]] = []

        def offloaded_round() -> None:
            before = {part: getattr(offloader.spent, part) for part in ("gather", "writeback", "reference")}
            for _ in range(sync_every):
                offloaded_step()
            spent.append({part: getattr(offloader.spent, part) - then for part, then in before.items()})

        def resident_round() -> None:
            for _ in range(sync_every):
                resident_step()

        # Two short rounds first: the second is the first to find subnet, reference and moments already made.
        for _ in range(2):
            for _ in range(min(sync_every, structure.paired_batches + 1)):
                offloaded_step()
                resident_step()
            offloader.finish_round()
        seconds = take_turns(
            {"offloaded": offloaded_round, "resident": resident_round}, repeats, setting.device, warmup=0
        )
    shares = {
        f"{part}_share": median(one[part] / total for one, total in zip(spent, seconds["offloaded"], strict=True))
        for part in spent[0]
    }
    return setting.record(
        "overhead",
        f"{workload.name} K={sync_every}",
        sync_every / median(seconds["offloaded"]),
        "steps/s",
        times_faster(seconds, "offloaded", "resident"),
        "same-shaped network trained alone",
        repeats=repeats,
        against_value=sync_every / median(seconds["resident"]),
        keep=KEEP,
        paired_batches=structure.paired_batches,
        **shares,
        aim=AIM.get(sync_every),
    )


def offloaded(offloader: Offloader, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """One step of a training loop as a user writes it."""

    def step() -> None:
        loss = offloader.loss(batches[offloader.steps % len(batches)])
        offloader.accelerator.backward(loss)
        offloader.step()

    return step
