"""Every contender in turn, and a record of each, of those that could not run as well."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.peers.child import Job
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.sizes import SIZES
from benchmarks.records import Record, Setting
from offload_trainer.errors import UserError

TOOLS = Path(__file__).parents[2]
START = 900
"""Seconds that a contender may take to start, compilers and all, before it is given up."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Names that a launcher sets in the environment."""
ON_A_CPU = "cpu, small: exercises the script, not a comparison of speeds"
OTHER_WORK = "ours trains another subnetwork each round: less work in a step than the others' full network"


@dataclass(frozen=True)
class Options:
    size: str | None = None
    """Of `SIZES`; by default the largest that suits the device."""
    batch: int | None = None
    """Sequences in a step; by default the size's own."""
    cap: int = 8 * 2**30
    """Bytes of device memory; CUDA only."""
    minutes: float = 0.5
    """To time each contender for."""
    contenders: tuple[str, ...] = ()
    """Which take part, beside what they are compared with; none named: all."""


def measure(setting: Setting, options: Options) -> Iterator[Record]:
    """Raises `UserError` for a cap that is more than the device has."""
    cuda = setting.device.type == "cuda"
    if cuda and options.cap > (there := torch.cuda.mem_get_info(setting.device)[1]):
        raise UserError(f"--cap ({options.cap / 2**30:g} GiB) must be at most what the device has, {there / 2**30:.4g}")
    size = options.size or {"quick": "tiny", "cpu": "small", "cuda": "3B"}[setting.size]
    batch = options.batch or SIZES[size].batch
    baseline = "resident" if cuda else "plain"
    base: tuple[str, float] | None = None  # label and tokens per second of the first that runs
    for name, contender in CONTENDERS.items():
        if options.contenders and name not in (baseline, *options.contenders):
            continue
        cap = options.cap if cuda and contender.capped else None
        job = Job(name, size, batch, cuda, cap, seconds=2.0 if setting.quick else 60 * options.minutes)
        result = cannot_run(setting, options, name) or run(job)
        speed = batch * SIZES[size].sequence / result["seconds_per_step"] if result["outcome"] == "measured" else 0.0
        if base is None and speed:
            base = contender.label, speed
        yield record(setting, job, result, speed, base)


def record(setting: Setting, job: Job, result: dict[str, Any], speed: float, base: tuple[str, float] | None) -> Record:
    """Of a contender that did not run, 0 tokens a second and why."""
    contender, tokens = CONTENDERS[job.contender], job.batch * SIZES[job.size].sequence
    details = {
        **result,
        "contender": contender.label,
        "size": job.size,
        "tokens_per_step": tokens,
        "cap_bytes": job.cap,
        "precision": contender.precision,
        "work": OTHER_WORK if job.contender.startswith("ours") else "the full network",
    }
    if not job.cuda:
        details["note"] = ON_A_CPU
    against = result["outcome"]
    if speed and base is not None:
        against, details["against_value"] = base
        details["seconds_per_token"] = 1 / speed
        if "flops_per_token" in result:
            details["flops_per_second"] = result["flops_per_token"] * speed
    ratio = speed / base[1] if base is not None else 0.0
    case = f"{job.size}, {tokens} tokens" + ("" if job.cap is None else f", {job.cap / 2**30:g} GiB")
    return setting.record("peers", f"{case}: {contender.label}", speed, "tokens/s", ratio, against, **details)


def cannot_run(setting: Setting, options: Options, name: str) -> dict[str, str] | None:
    """Why a contender is not even started."""
    contender = CONTENDERS[name]
    if contender.package is not None and find_spec(contender.package) is None:
        return {"outcome": "not installed", "message": f"pip install --no-deps {contender.package}"}
    if contender.cuda and setting.device.type != "cuda":
        return {"outcome": "not measured", "message": "runs on a GPU only"}
    if contender.compiles and setting.quick and name not in options.contenders:
        return {"outcome": "not measured", "message": "its first start compiles for minutes; name it to have it run"}
    return None


def run(job: Job) -> dict[str, Any]:
    """Of a process of its own, which is given up when it takes too long."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        arguments = [sys.executable, "-m", "benchmarks.peers.child", job.as_json(), str(file)]
        limit = START + 4 * job.seconds  # what is counted after the timing takes its time too
        with subprocess.Popen(
            arguments,
            cwd=TOOLS,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                said = process.communicate(timeout=limit)[1]
            except subprocess.TimeoutExpired:
                return {"outcome": "failed", "message": f"took more than {limit:.0f} s"}
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and the compilers that it started
        if file.exists():
            result = json.loads(file.read_text())
            if result["outcome"] == "failed":
                print(said, file=sys.stderr)
            return result
    if process.returncode == -signal.SIGKILL:
        return {"outcome": "does not fit", "message": "killed, as a host out of memory does"}
    return {"outcome": "failed", "message": (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}


def environment() -> dict[str, str]:
    """Of this process, with this project and the tools that DeepSpeed compiles with to be found; of a launcher that
    may have started this process, nothing: what a contender needs of that it sets itself."""
    paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER and "ACCELERATE" not in name}
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PATH": os.pathsep.join(programs)}
