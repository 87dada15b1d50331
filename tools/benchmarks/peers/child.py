"""One contender in this process: `python -m benchmarks.peers.child JOB RESULT`, JOB as JSON, RESULT a file for JSON.

It says how the contender fared, and never that it did without leaving word: out of memory is an outcome too.
"""

import json
import sys
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.measuring import measured
from benchmarks.peers.sizes import SIZES
from benchmarks.peers.trainer import Trainer


@dataclass(frozen=True)
class Job:
    contender: str
    size: str
    batch: int
    """Sequences in a step."""
    cuda: bool
    cap: int | None
    """Bytes of device memory that torch may give out; None: all there is."""
    seconds: float
    """To measure for."""

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def run(job: Job) -> tuple[dict[str, Any], Trainer]:
    """Start the contender under its cap and measure it."""
    device = torch.device("cuda", 0) if job.cuda else torch.device("cpu")
    if job.cuda:
        torch.cuda.set_device(device)
        if job.cap is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap / torch.cuda.mem_get_info(device)[1]), device)
    torch.manual_seed(0)
    size = replace(SIZES[job.size], batch=job.batch)
    trainer = CONTENDERS[job.contender].start(size, device)
    return measured(trainer, size, device, job.seconds), trainer


def main(job: str, file: str) -> None:
    trainer = None
    try:
        found, trainer = run(Job(**json.loads(job)))
        result = {"outcome": "measured", **found}
    except torch.OutOfMemoryError as error:
        result = {"outcome": "does not fit", "message": first_line(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"outcome": "failed", "message": f"{type(error).__name__}: {first_line(error)}"}
    Path(file).write_text(json.dumps(result))
    if trainer is not None:
        trainer.close()  # whatever goes wrong on the way out, the result is there


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["without a word"])[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
