"""Models far larger than what the device may hold: whether they train at all, how they learn, where the seconds go.

Each is a process of its own under a cap on its device memory, `python -m benchmarks.larger JOB RESULT`, that trains a
byte-level Llama on the source of Python's standard library as a run would, without checkpoints.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
from accelerate import Accelerator

from benchmarks.peers.comparison import environment
from benchmarks.peers.sizes import SIZES, Size, fill, save_activations
from benchmarks.peers.trainer import ADAMW
from benchmarks.records import Record, Setting
from offload_trainer import Offloader, Structure, find_groups, memory
from offload_trainer.config import CausalLM
from offload_trainer.errors import UserError
from offload_trainer.master.precision import TYPES, Precision
from offload_trainer.tasks import build_task

TOOLS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    size: Size
    keep: float
    weights: Literal["fp32", "bf16"]
    state: Literal["carry", "reset"]
    rounds: int
    sync_every: int = 50
    cap: int | None = None
    """Bytes of device memory that torch may give out; None: all there is."""


LARGEST = Size(8192, 22016, 58, 64, 8, vocabulary=256, batch=8, sequence=1024, checkpointing=True)
"""40 billion parameters: 80 GB at 2 bytes each, which leave a host of 128 GiB what a run takes beside them."""
JOBS = {
    "quick": {"tiny, 2 bytes": Job(SIZES["tiny"], 0.5, "bf16", "reset", rounds=2, sync_every=8)},
    "cpu": {
        "small, 12 bytes": Job(SIZES["small"], 0.25, "fp32", "carry", rounds=3),
        "small, 2 bytes": Job(SIZES["small"], 0.25, "bf16", "reset", rounds=3),
    },
    "cuda": {
        "3B, 12 bytes": Job(replace(SIZES["3B"], batch=8), 0.25, "fp32", "carry", rounds=8),
        "40B, 2 bytes": Job(LARGEST, 0.0625, "bf16", "reset", rounds=4),
    },
}
"""By setting: model and bytes a parameter on the host."""


def measure(setting: Setting, cap: int) -> Iterator[Record]:
    """cap: bytes of device memory, on a GPU."""
    for case, job in JOBS[setting.size].items():
        found = run(replace(job, cap=cap if setting.device.type == "cuda" else None))
        held = found["device_peak_bytes"]
        yield setting.record(
            "larger",
            f"llama {case}",
            found["seconds"]["step"],
            "s per step",
            found["host_bytes_held"] / held,
            "device memory at its peak, by the bytes of the master and its moments",
            repeats=1,
            against_value=held / 2**30,
            cap=found["cap"],
            keep=job.keep,
            **{key: found[key] for key in ("parameters", "trained", "seconds", "losses", "host_peak_bytes")},
        )


def run(job: Job) -> dict[str, Any]:
    """What a process found that trains so."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.larger", json.dumps(asdict(job)), str(file)]
        done = subprocess.run(command, cwd=TOOLS, env=environment(), capture_output=True, text=True)
        if not file.exists():
            words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"bench.py larger: a run failed: {words[-1]}")
        return json.loads(file.read_text())


def train(job: Job) -> dict[str, Any]:
    """In this process."""
    started = perf_counter()
    cuda = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no", cpu=not cuda)
    device = torch.device("cuda", 0) if cuda else accelerator.device  # the cap wants an index
    if job.cap is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap / torch.cuda.mem_get_info(device)[1]), device)
    size = replace(job.size, vocabulary=256)  # bytes
    task = build_task(
        CausalLM(
            kind="causal_lm",
            model={"model_type": "llama", **size.as_config()},
            sequence=size.sequence,
            batch_size=size.batch,
        ),
        seed=0,
    )
    groups = find_groups(task.model, task.example_inputs)
    save_activations(task.model, size)  # type: ignore[arg-type]
    structure = Structure(groups, job.keep, seed=0)
    traced = perf_counter()
    with Offloader(
        task.model,
        groups,
        task.loss_fn,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True, **ADAMW),
        structure=structure,
        sync_every=job.sync_every,
        accelerator=accelerator,
        state=job.state,
        materialise=lambda model: fill(model.parameters(), device),
        precision=Precision(weights=TYPES[job.weights]),
    ) as offloader:
        built = perf_counter()
        offloader.begin_round()
        memory.synchronize(device)
        gathered = perf_counter()
        steps, losses, reports = list[float](), list[tuple[int, float]](), list[dict[str, Any]]()
        for step in range(job.rounds * job.sync_every):
            batch = task.train[step].to(device)
            memory.synchronize(device)
            start = perf_counter()
            loss = offloader.loss(batch)
            accelerator.backward(loss)
            offloader.step()
            memory.synchronize(device)
            if step % job.sync_every > structure.paired_batches and not offloader.between_rounds:
                steps.append(perf_counter() - start)
            if step % 10 == 0 or offloader.between_rounds:
                losses.append((step + 1, loss.item()))
            if offloader.between_rounds:
                reports.append(offloader.report.as_dict())
        trained = sum(p.numel() for p in offloader.subnet.parameters())
        stores = [offloader.master, *offloader.moments.values()]
        return {
            "cap": job.cap,
            "parameters": sum(p.numel() for p in offloader.model.parameters()),
            "trained": trained,
            "host_bytes_held": sum(tensor.nbytes for store in stores for tensor in store.values()),
            "host_peak_bytes": memory.host_peak(),
            "device_peak_bytes": memory.device_peak(device) or offloader.measured()["device_bytes"],
            "losses": losses,
            "seconds": {
                "model on meta, text, groups": traced - started,
                "master": built - traced,
                "first gather": gathered - built,
                "step": median(steps),
                **{
                    f"a round's {name.removesuffix('_ms')}": median(report[name] for report in reports[1:]) / 1e3
                    for name in ("gather_ms", "writeback_ms", "link_ms", "waited_ms")
                },
            },
        }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = train(Job(**{**asked, "size": Size(**asked["size"])}))
    Path(sys.argv[2]).write_text(json.dumps(found))
