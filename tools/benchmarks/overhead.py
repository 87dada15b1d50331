"""What offloading costs: a run whose network stays in host memory, against its small network trained alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median

from torch import Tensor

from benchmarks.peers.sizes import fill
from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import Workload, llama, on_device, training_step, vision
from offload_trainer import Offloader, Structure, UserError
from offload_trainer.groups import slice_module

KEEP = 0.5  # of every group, so a quarter of the weights
TURNS = {  # K → timed turns of each contender, rounds in a turn
    "quick": {50: (2, 1)},
    "cpu": {50: (3, 2), 10: (4, 4), 200: (2, 1)},
    "cuda": {50: (4, 2), 10: (3, 3), 200: (1, 1)},
}
AIM = {"cpu": 0.93, "cuda": 0.97}  # overlapping, at K = 50


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
                llama(hidden=4096, intermediate=14336, heads=32, layers=4, batch=4, sequence=1024),
                replace(
                    llama(hidden=4096, intermediate=14336, heads=32, layers=4, batch=16, sequence=1024),
                    name="llama of 16,384 tokens a step",
                ),
                vision("resnet32", width=8, batch=128),
            ]


def measure(setting: Setting, intervals: Sequence[int] | None = None) -> Iterator[Record]:
    """intervals: those of K, of the ones in `TURNS`, that are measured (None: all). Raises `UserError` for another."""
    all_turns = TURNS[setting.size]
    if unknown := set(intervals or ()) - set(all_turns):
        raise UserError(f"--intervals ({min(unknown)}) must be of {', '.join(map(str, all_turns))}")
    wanted = {every: turns for every, turns in all_turns.items() if intervals is None or every in intervals}
    for workload in workloads(setting.size):
        batches = on_device(workload, 4, setting.device)
        with ExitStack() as stack:
            runs = {
                name: stack.enter_context(make_offloader(setting, workload, overlap))
                for name, overlap in (("overlapped", True), ("offloaded", False))
            }
            any_run = runs["offloaded"]
            small = slice_module(any_run.model, any_run.agenda.top(), any_run.groups).to(setting.device).train()
            resident = training_step(small, workload, batches, setting.accelerator)
            steps = {name: offloaded(run, batches) for name, run in runs.items()}
            for run, step in zip(runs.values(), steps.values(), strict=True):
                # Short rounds first: subnet, reference, moments and staging are made in them.
                for _ in range(4):
                    for _ in range(run.structure.paired_batches + 1):
                        step()
                        resident()
                    run.finish_round()
            for sync_every, (turns, rounds) in wanted.items():
                for way, run in runs.items():
                    run.finish_round()
                    run.sync_every = sync_every
                    for _ in range(sync_every // 2):
                        steps[way]()
                yield from compare(setting, workload.name, runs, {**steps, "resident": resident}, turns, rounds)


def compare(
    setting: Setting,
    name: str,
    runs: Mapping[str, Offloader],
    step: Mapping[str, Callable[[], None]],
    turns: int,
    rounds: int,
) -> Iterator[Record]:
    """Rounds, overlapping and not, take turns with as many steps of the small network, which has the shapes of every
    round's subnet. A turn goes from the middle of a round to the middle of another, and until what went on in the
    background is done: so as much is begun in it as ended.

    The shares are of the host's time; on a GPU the reference's kernels run after the host has queued them.
    """
    run = runs["offloaded"]
    steps = run.sync_every * rounds
    spent: dict[str, list[dict[str, float]]] = {way: [] for way in runs}

    def turn(way: str) -> None:
        before = {part: getattr(runs[way].spent, part) for part in ("gather", "writeback", "reference")}
        for _ in range(steps):
            step[way]()
        runs[way].master  # noqa: B018  waits for the background
        spent[way].append({part: getattr(runs[way].spent, part) - then for part, then in before.items()})

    def resident() -> None:
        for _ in range(steps):
            step["resident"]()

    contenders = {way: partial(turn, way) for way in runs}
    seconds = take_turns({**contenders, "resident": resident}, turns, setting.device, warmup=0)
    for way, parts in spent.items():
        shares = {
            f"{part}_share": median(one[part] / total for one, total in zip(parts, seconds[way], strict=True))
            for part in parts[0]
        }
        yield setting.record(
            "overhead",
            f"{name} K={run.sync_every}" + (", overlapped" if way == "overlapped" else ""),
            steps / median(seconds[way]),
            "steps/s",
            times_faster(seconds, way, "resident"),
            "same-shaped network trained alone",
            repeats=turns,
            against_value=steps / median(seconds["resident"]),
            keep=KEEP,
            paired_batches=run.structure.paired_batches,
            **shares,
            aim=AIM[setting.device.type] if way == "overlapped" and run.sync_every == 50 else None,
        )


def make_offloader(setting: Setting, workload: Workload, overlap: bool) -> Offloader:
    model = workload.build_empty()
    groups = workload.groups(model)
    return Offloader(
        model,
        groups,
        workload.loss_fn,
        optimizer=workload.optimizer,
        structure=Structure(groups, KEEP, seed=0),
        accelerator=setting.accelerator,
        materialise=lambda model: fill(model.parameters(), setting.device),
        overlap=overlap,
    )


def offloaded(offloader: Offloader, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """One step of a training loop as a user writes it."""

    def step() -> None:
        loss = offloader.loss(batches[offloader.steps % len(batches)])
        offloader.accelerator.backward(loss)
        offloader.step()

    return step
