"""How fast a checkpoint comes into the master: the streamed load in GB/s of its files, against plainly reading them."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.records import Record, Setting
from benchmarks.timing import take_turns, times_faster
from benchmarks.workloads import llama
from offload_trainer.files.writing import write_shards
from offload_trainer.master import Master, StateSpec
from offload_trainer.tasks.stored import stored_tensors
from offload_trainer.tasks.weights import Weights

REPEATS = {"quick": 3, "cpu": 11, "cuda": 11}
SHARDS = 5
DTYPES = ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
"""(in the files, in the master)."""


def measure(setting: Setting) -> Iterator[Record]:
    for stored, held in DTYPES:
        with TemporaryDirectory() as folder:
            yield compare(setting, Path(folder), stored, held)


def compare(setting: Setting, folder: Path, stored: torch.dtype, held: torch.dtype) -> Record:
    """The files have just been written, so both contenders read them from the page cache: no disk is measured."""
    quick = {"hidden": 256, "intermediate": 512, "heads": 4, "layers": 2}
    large = {"hidden": 1024, "intermediate": 4096, "heads": 16, "layers": 16}  # 268 M parameters
    workload = llama(**(quick if setting.quick else large), batch=1, sequence=16)
    with torch.device("meta"):
        model = workload.build().to(held)
    master = Master(model, StateSpec({}, {}, None), materialise=fill, pin=setting.device.type == "cuda")
    try:
        values = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
        size = sum(tensor.nbytes for tensor in values.values())
        write_shards(folder, values, -(-size // SHARDS))
        del values
        files = sorted(folder.glob("*.safetensors"))
        weights = Weights.match(stored_tensors(folder), model)
        buffer = torch.ones(sum(file.stat().st_size for file in files), dtype=torch.uint8)  # every page is there
        repeats = REPEATS[setting.size]
        contenders = {"load": lambda: weights.load(model), "read": lambda: read(files, buffer)}
        seconds = take_turns(contenders, repeats, torch.device("cpu"))
    finally:
        master.close()
    return setting.record(
        "load",
        f"{name(stored)} to {name(held)}",
        len(buffer) / 1e9 / median(seconds["load"]),
        "GB/s",
        times_faster(seconds, "load", "read"),
        "reading the same files into memory, both from the page cache",
        aim=0.5 if stored == held else None,
        repeats=repeats,
        against_value=len(buffer) / 1e9 / median(seconds["read"]),
        file_bytes=len(buffer),
        files=len(files),
    )


def fill(model: torch.nn.Module) -> None:
    """Values in every tensor, so that every page is there."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().normal_(std=0.02)


def read(files: list[Path], buffer: torch.Tensor) -> None:
    """The files one after the other into `buffer`, bytes."""
    room = buffer.numpy().data
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(room):
                room = room[count:]


def name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
