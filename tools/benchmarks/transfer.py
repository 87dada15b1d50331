"""How fast a subnet comes and goes: gather and write-back in GB/s, against a plain copy of the same bytes.

Of a Llama all of whose groups are sliced, in memory and in mapped files; and of matrices sliced on one axis alone:
whole rows, or single columns. The write-back tells the norm of its change, as in a run.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import Workload, llama
from offload_trainer.device.movers import Mover, Native, Plain
from offload_trainer.device.native import load_kernels
from offload_trainer.device.subnet import Subnet
from offload_trainer.device.transfer import Transfer
from offload_trainer.groups import Groups, random_plan, read_rules
from offload_trainer.master import Master, Slab, StateSpec
from offload_trainer.master.precision import FP32

KEEP = (0.5, 0.25)  # of every group, so of every axis
REPEATS = {"quick": 3, "cpu": 11, "cuda": 7}
AIM = {"cpu": 0.6, "cuda": 0.8}  # of gather and write-back together


def workload(size: str) -> Workload:
    """Of its model only the weights are used: large enough, except for `quick`, that no cache holds them."""
    shape = {
        "quick": {"hidden": 256, "intermediate": 512, "heads": 4, "layers": 2},
        "cpu": {"hidden": 1024, "intermediate": 4096, "heads": 16, "layers": 8},  # 0.54 GB
        "cuda": {"hidden": 4096, "intermediate": 14336, "heads": 32, "layers": 4},  # 3.9 GB
    }[size]
    return llama(**shape, batch=1, sequence=16)


def measure(setting: Setting) -> Iterator[Record]:
    with torch.device("meta"):
        model = workload(setting.size).build()
    groups = workload(setting.size).groups(model)
    yield from of_model(setting, model, groups, "", movers())
    with tempfile.TemporaryDirectory(dir=".") as folder:  # a temporary folder of the system's may be memory
        yield from of_model(setting, model, groups, ", mapped files", {", native": movers()[", native"]}, Path(folder))
    size = {"quick": 256, "cpu": 4096, "cuda": 16384}[setting.size]
    for axis, name in enumerate(("rows", "columns")):
        with torch.device("meta"):
            matrices = nn.ParameterList([torch.empty(size, size) for _ in range(4)])
        sliced = read_rules({"units": [f"{i}:{axis}" for i in range(4)]}, matrices)
        yield from of_model(setting, matrices, sliced, f", {name} alone", movers())


def of_model(
    setting: Setting,
    model: nn.Module,
    groups: Groups,
    case: str,
    movers: Mapping[str, Mover],
    folder: Path | None = None,
) -> Iterator[Record]:
    """Of a model on meta, in memory or in mapped files of a folder. case: what names of cases end with."""
    spec, pin = StateSpec({}, {}, None), setting.device.type == "cuda"
    master = Master(deepcopy(model), spec, materialise=fill, pin=pin, folder=folder)
    try:
        for keep in KEEP:
            yield from compare(setting, master, groups, keep, case, movers)
    finally:
        master.close()


def fill(model: nn.Module) -> None:
    """Values in every tensor, so that every page is there."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().uniform_(-1, 1)


def movers() -> dict[str, Mover]:
    """What a case's name ends with → who moves the elements."""
    return {"": Plain(), ", native": Native(load_kernels(), torch.get_num_threads())}


def compare(
    setting: Setting, master: Master, groups: Groups, keep: float, case: str, movers: Mapping[str, Mover]
) -> Iterator[Record]:
    repeats, device = REPEATS[setting.size], setting.device
    generator = torch.Generator().manual_seed(0)
    # A new plan each time, as in a run: the indices of its elements are worked out while gathering.
    plans = [random_plan(groups, generator, keep) for _ in range(2 * repeats + 3)]
    subnet = Subnet(master, plans.pop(), device)
    numel = sum(slab.flat.numel() for slab in subnet.slabs)
    host = Slab({"copied": torch.Size([numel])}, torch.float32, pin=device.type == "cuda")
    there = Slab({"copied": torch.Size([numel])}, torch.float32, device)
    host.flat.fill_(1)
    there.flat.fill_(1)

    def gather(transfer: Transfer) -> None:
        subnet.plan = plans.pop()
        transfer.fetch(master.tensors, subnet.layouts, subnet.slabs, subnet.plan, "weights")

    def write_back(transfer: Transfer) -> None:
        staged = transfer.staging(subnet.layouts, subnet.slabs, "weights")
        parts = transfer.unload(subnet.slabs, staged, FP32.rounding(0, "weights")).parts
        transfer.merge(parts, master.tensors, subnet.plan, delta=True)

    transfers = {way: Transfer(device, mover=mover) for way, mover in movers.items()}
    contenders: dict[str, Callable[[], object]] = {"copy in": lambda: there.flat.copy_(host.flat)}
    for way, transfer in transfers.items():
        contenders[f"gather{way}"] = partial(gather, transfer)
        contenders[f"writeback{way}"] = partial(write_back, transfer)
    contenders["copy out"] = lambda: host.flat.copy_(there.flat)  # far from the other copy, whose buffers it shares
    if device.type == "cuda":  # whose link may be faster than the memory of its host
        other = torch.zeros_like(host.flat)
        contenders["copy on the host"] = lambda: other.copy_(host.flat)
    try:
        seconds = take_turns(contenders, repeats, device)
    finally:
        host.close()
        for transfer in transfers.values():
            transfer.close()
    seconds["copy both"] = together(seconds, "copy in", "copy out")
    pinned = "pinned " if device.type == "cuda" else ""
    for way in transfers:
        seconds[f"both{way}"] = together(seconds, f"gather{way}", f"writeback{way}")
        for what, copy, times, direction in (
            ("gather", "copy in", 1, "to the device"),
            ("writeback", "copy out", 1, "to the host"),
            ("both", "copy both", 2, "both ways"),
        ):
            moved = times * subnet.nbytes
            copied = seconds.get("copy on the host")
            on_host = {"host_copy": subnet.nbytes / 1e9 / median(copied)} if copied else {}  # GB/s
            yield setting.record(
                "transfer",
                f"{what} rho={keep}{way}{case}",
                moved / 1e9 / median(seconds[what + way]),
                "GB/s",
                times_faster(seconds, what + way, copy),
                f"plain {pinned}copy of the same bytes" + (f" {direction}" if pinned else ""),
                aim=AIM[device.type] if what == "both" and way and not case else None,
                repeats=repeats,
                against_value=moved / 1e9 / median(seconds[copy]),
                subnet_bytes=subnet.nbytes,
                master_bytes=master.nbytes,
                threads=torch.get_num_threads(),
                **on_host,
            )


def together(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> list[float]:
    """Of two contenders, in each repeat."""
    return [a + b for a, b in zip(seconds[one], seconds[other], strict=True)]
