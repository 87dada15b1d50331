"""Seconds from launch to the first optimizer step, and where they go.

A run is started as a user starts it, by `accelerate launch`, but as `-m benchmarks.start`, which calls the same `main`
with clocks around what it goes through, and ends it after its first step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

from benchmarks.peers.sizes import SIZES
from benchmarks.records import Record, Setting
from benchmarks.timing import times_faster
from offload_trainer import memory, prepare, run, tasks, train
from offload_trainer.errors import UserError

TOOLS = Path(__file__).parents[1]
REPEATS = {"tiny": 1, "small": 3, "1B": 1, "3B": 1}
KEEP = 0.25
PHASES: tuple[tuple[str, Any, str], ...] = (
    ("reading the config", run, "parse"),
    ("accelerator", prepare, "make_accelerator"),
    ("model on meta, text", tasks, "build_task"),
    ("tracing", prepare, "find_groups"),
    ("optimizer's layout", prepare, "probe_optimizer"),
    ("ledger", prepare, "make_predictor"),
    ("ledger", prepare, "decide_keep"),
    ("ledger", prepare, "make_forecast"),
    ("proof", prepare, "verify_groups"),
    ("master", train, "Offloader"),
)
"""(name, module, the function in it that is timed)."""


def measure(setting: Setting, size: str | None = None) -> Iterator[Record]:
    """size: of `SIZES`."""
    size = size or ("tiny" if setting.quick else "1B")
    seconds: dict[str, list[float]] = {"run": [], "transformers": []}
    splits: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config(size, setting.device.type == "cuda", Path(folder) / "out")))
        for _ in range(REPEATS[size]):
            splits.append(launched(file))
            seconds["run"].append(sum(splits[-1].values()))
            seconds["transformers"].append(built_by_transformers(size, setting.device.type == "cuda"))
    yield setting.record(
        "start",
        f"llama {size}",
        median(seconds["run"]),
        "s to the first step",
        times_faster(seconds, "run", "transformers"),
        "importing transformers and building the model",
        repeats=REPEATS[size],
        against_value=median(seconds["transformers"]),
        parts={part: median(split[part] for split in splits) for part in splits[0]},
        memory=config(size, setting.device.type == "cuda", Path())["memory"],
    )


def config(size: str, cuda: bool, out: Path) -> dict[str, Any]:
    """On a CPU, whose memory holds the subnet as well, the master is bf16 without moments: 2 bytes a parameter."""
    chosen = replace(SIZES[size], vocabulary=256)  # bytes
    return {
        "steps": 1000,
        "sync_every": 50,
        "out": str(out),
        "task": {
            "kind": "causal_lm",
            "model": {"model_type": "llama", **chosen.as_config()},
            "data": "stdlib",
            "sequence": chosen.sequence,
            "batch_size": chosen.batch if cuda else 1,
            "val_batches": 1,
        },
        "structure": {"keep": KEEP},
        "optimizer": {"kind": "adamw", "lr": 3e-4, "state": "carry" if cuda else "reset"},
        "memory": {"weights": "fp32", "autocast": "bf16"} if cuda else {"weights": "bf16"},
        "track": {"display": "plain"},
    }


def launched(file: Path) -> dict[str, float]:
    """Seconds of the run of a config file by what they went into, in order; the first are the launcher's."""
    parts = file.with_name("parts.json")
    parts.unlink(missing_ok=True)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    began = time.time()
    done = process([*launch, "-m", "benchmarks.start", str(file), str(parts)])
    if not parts.exists():
        raise UserError(f"bench.py start: a run failed: {last_line(done)}")
    found = json.loads(parts.read_text())
    return {"launcher": found.pop("process began") - began, **found}


def built_by_transformers(size: str, cuda: bool) -> float:
    """Seconds until transformers alone is imported and has made the model, in the type of our master."""
    tree = config(size, cuda, Path())
    model = {key: value for key, value in tree["task"]["model"].items() if key != "model_type"}
    dtype = "bfloat16" if tree["memory"]["weights"] == "bf16" else "float32"
    began = time.time()
    done = process([sys.executable, "-m", "benchmarks.start_plain", json.dumps(model), dtype])
    if done.returncode:
        raise UserError(f"bench.py start: transformers could not make the model: {last_line(done)}")
    return time.time() - began


def process(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that finds these benchmarks and this project."""
    paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, cwd=TOOLS, env=environment, capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or ["without a word"])[-1]


class Clock:
    """Seconds of this process by part. What no part claims is `other`."""

    def __init__(self) -> None:
        self.began = psutil.Process().create_time()
        self.parts = {"imports": time.time() - self.began, **dict.fromkeys((part for part, *_ in PHASES), 0.0)}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - start

        return timed

    def write(self, file: Path) -> None:
        other = time.time() - self.began - sum(self.parts.values())
        file.write_text(json.dumps({"process began": self.began, **self.parts, "other": other}))


def train_one_step(clock: Clock, config: str, file: str) -> None:
    """A run as its command does it, up to the end of the first step; the parts go into `file`, as JSON."""
    for part, module, name in PHASES:
        setattr(module, name, clock.around(part, getattr(module, name)))
    make = train.Offloader

    def offloader_of_one_step(*args: Any, **kwargs: Any) -> Any:
        offloader = make(*args, **kwargs)
        step, made = offloader.step, time.perf_counter()

        def last_step() -> None:
            step()
            memory.synchronize(offloader.device)
            gather = offloader.spent.gather
            clock.parts |= {"first gather": gather, "first step": time.perf_counter() - made - gather}
            clock.write(Path(file))
            raise KeyboardInterrupt  # as a user breaks a run off; of its first round nothing is kept

        offloader.step = last_step
        return offloader

    train.Offloader = offloader_of_one_step  # type: ignore[misc]
    run.main(["--config", config])


if __name__ == "__main__":
    train_one_step(Clock(), *sys.argv[1:])
