"""How fast a subnet comes and goes: gather and write-back in GB/s, against a plain copy of the same bytes."""

from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import Workload, llama
from offload_trainer.device.subnet import Subnet
from offload_trainer.device.transfer import Transfer
from offload_trainer.groups import Groups, random_plan
from offload_trainer.master import Master, Slab, StateLayout
from offload_trainer.master.precision import FP32

KEEP = (0.5, 0.25)  # of every group, so of every axis
REPEATS = {"quick": 3, "cpu": 11, "cuda": 11}


def workload(size: str) -> Workload:
    """Of its model only the weights are used: large enough, except for `quick`, that no cache holds them."""
    shape = {
        "quick": {"hidden": 256, "intermediate": 512, "heads": 4, "layers": 2},
        "cpu": {"hidden": 1024, "intermediate": 4096, "heads": 16, "layers": 8},  # 0.54 GB
        "cuda": {"hidden": 4096, "intermediate": 14336, "heads": 32, "layers": 8},  # 7.8 GB
    }[size]
    return llama(**shape, batch=1, sequence=16)


def measure(setting: Setting) -> Iterator[Record]:
    with torch.device("meta"):
        model = workload(setting.size).build()
    groups = workload(setting.size).groups(model)
    master = Master(model, StateLayout({}, {}, None), materialise=fill, pin=setting.device.type == "cuda")
    transfer = Transfer(setting.device)
    try:
        for keep in KEEP:
            yield from compare(setting, master, groups, transfer, keep)
    finally:
        transfer.close()
        master.close()


def fill(model: nn.Module) -> None:
    """Values in every tensor, so that every page is there."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().uniform_(-1, 1)


def compare(setting: Setting, master: Master, groups: Groups, transfer: Transfer, keep: float) -> Iterator[Record]:
    repeats, device = REPEATS[setting.size], setting.device
    generator = torch.Generator().manual_seed(0)
    # A new plan each time, as in a run: the indices of its elements are worked out while gathering.
    plans = [random_plan(groups, generator, keep) for _ in range(repeats + 2)]
    plan = plans.pop()
    subnet = Subnet(master, plan, device)
    staged = transfer.staging(subnet.kinds, subnet.slabs, "weights")
    numel = sum(slab.flat.numel() for slab in subnet.slabs)
    host = Slab({"copied": torch.Size([numel])}, torch.float32, pin=device.type == "cuda")
    there = Slab({"copied": torch.Size([numel])}, torch.float32, device)
    host.flat.fill_(1)
    there.flat.fill_(1)

    def gather() -> None:
        nonlocal plan
        plan = plans.pop()
        transfer.fetch(master.tensors, subnet.kinds, subnet.slabs, plan, "weights")

    def write_back(*, delta: bool) -> None:
        transfer.unload(subnet.slabs, staged, FP32.rounding(0, "weights"))
        transfer.merge(staged, master.tensors, plan, delta=delta)

    try:
        seconds = take_turns(
            {
                "copy in": lambda: there.flat.copy_(host.flat),
                "gather": gather,
                "copy out": lambda: host.flat.copy_(there.flat),  # far from the other copy, whose buffers it shares
                "writeback": lambda: write_back(delta=False),
                "writeback+delta": lambda: write_back(delta=True),
            },
            repeats,
            device,
        )
    finally:
        host.close()
    pinned = "pinned " if device.type == "cuda" else ""
    for what, copy, way in (
        ("gather", "copy in", "to the device"),
        ("writeback", "copy out", "to the host"),
        ("writeback+delta", "copy out", "to the host"),
    ):
        yield setting.record(
            "transfer",
            f"{what} rho={keep}",
            subnet.nbytes / 1e9 / median(seconds[what]),
            "GB/s",
            times_faster(seconds, what, copy),
            f"plain {pinned}copy of the same bytes" + (f" {way}" if pinned else ""),
            repeats=repeats,
            against_value=subnet.nbytes / 1e9 / median(seconds[copy]),
            subnet_bytes=subnet.nbytes,
            master_bytes=master.nbytes,
        )
