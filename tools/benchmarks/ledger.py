"""How right the ledger is: peaks of real runs, each in a process of its own, against what was predicted for them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from benchmarks.records import Record, Setting
from benchmarks.workloads import CLASSES, vision
from offload_trainer import Offloader
from offload_trainer.config import parse
from offload_trainer.errors import UserError
from offload_trainer.prepare import prepare

TOOLS = Path(__file__).parent.parent
SMOLLM2 = TOOLS.parent / "data" / "smollm2"  # where configs/shrink_smollm2.yaml looks for it
ROUNDS, SYNC_EVERY, REPEATS = 2, 3, 2
FREEING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment in which glibc gives back what is freed; otherwise its heap keeps gaps, which can only be estimated."""


def cases(size: str) -> dict[str, dict[str, Any]]:
    """Name → what its config has beyond the steps: models of different kinds, whose memory goes to different things."""
    adamw, sgd = {"kind": "adamw", "lr": 3e-4}, {"kind": "sgd", "lr": 0.01}
    if size == "quick":
        return {"mlp": made_up("mlp", adamw, width=256, batch=64)}
    gpu = size == "cuda"
    llama = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 4096 if gpu else 768,
        "intermediate_size": 14336 if gpu else 2560,
        "num_hidden_layers": 8 if gpu else 12,
        "num_attention_heads": 32 if gpu else 12,
        "num_key_value_heads": 8 if gpu else 6,
        "head_dim": 128 if gpu else 64,
        "max_position_embeddings": 1024,
    }
    batch = {"sequence": 1024, "batch_size": 8} if gpu else {"sequence": 128, "batch_size": 4}
    text = {"kind": "causal_lm", "data": "stdlib", "val_batches": 2, **batch}
    found = {
        "mlp": made_up("mlp", adamw, width=16384 if gpu else 3072, batch=4096 if gpu else 512),
        "vgg19_bn": made_up("vgg19_bn", sgd, width=4 if gpu else 2, batch=256 if gpu else 32),
        "llama": {"task": {**text, "model": llama}, "optimizer": adamw},
    }
    if SMOLLM2.is_dir():
        pretrained = {**text, "model": str(SMOLLM2), "tokenizer": str(SMOLLM2)}
        found["smollm2"] = {"task": pretrained, "optimizer": {**adamw, "state": "reset"}}
    return found


def made_up(model: str, optimizer: dict[str, Any], **arguments: float) -> dict[str, Any]:
    """A custom task of this module."""
    task = {"kind": "custom", "function": f"benchmarks.ledger:{model}", "arguments": arguments}
    return {"task": task, "optimizer": optimizer}


def measure(setting: Setting) -> Iterator[Record]:
    for name, case in cases(setting.size).items():
        with tempfile.TemporaryDirectory() as folder:
            file = write_config(Path(folder), case)
            ways = {"": {}} if setting.quick else {"": {}, ", freed at once": FREEING}
            for suffix, environment in ways.items():
                runs = [run(file, Path(folder) / "out", environment) for _ in range(REPEATS)]
                yield record(setting, f"{name} host{suffix}", "host_peak_bytes", runs)
            if setting.device.type == "cuda":
                yield record(setting, f"{name} device", "device_peak_bytes", runs)
            else:
                yield record(setting, f"{name} device", "device_peak_bytes", [allocated(file) for _ in range(REPEATS)])


def record(setting: Setting, case: str, key: str, runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Record:
    """Of the run that took most."""
    predicted, measured = max(runs, key=lambda one: one[1][key] / one[0][key])
    return setting.record(
        "ledger",
        case,
        measured[key] / 2**20,
        "MiB",
        measured[key] / predicted[key],
        "predicted",
        repeats=len(runs),
        against_value=predicted[key] / 2**20,
        phase=predicted[key.removesuffix("_bytes")]["phase"],
        aim=1.0,
    )


def write_config(folder: Path, case: dict[str, Any]) -> Path:
    steps = ROUNDS * SYNC_EVERY
    structure = {"keep": 0.5, "paired_batches": 1, "result_batches": 1}
    track = {"log_every": steps, "display": "plain"}
    tree = {"steps": steps, "sync_every": SYNC_EVERY, "structure": structure, "track": track, **case}
    file = folder / "case.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def run(file: Path, out: Path, environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was predicted and measured of a whole run, evaluation and export included."""
    child(environment, str(TOOLS.parent / "offload_trainer" / "run.py"), "--config", str(file), "--out", str(out))
    ledger = json.loads((out / "summary.json").read_text())["ledger"]
    return ledger["predicted"], ledger["measured"]


def allocated(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was predicted of the device's side where that is a CPU, and what torch gave out for it."""
    return tuple(json.loads(child({}, "-m", "benchmarks.ledger", "--config", str(file)).splitlines()[-1]))


def child(environment: dict[str, str], *arguments: str) -> str:
    """Output of another Python process, which finds the tasks below."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=TOOLS, capture_output=True, text=True, env=os.environ | environment
    )
    if done.returncode:
        raise UserError(
            f"bench.py ledger: a run failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
        )
    return done.stdout


def in_this_process(arguments: list[str]) -> None:
    """Train as a run does and print what was predicted and allocated. All that torch allocates beyond the master is the
    device's side, but for the transfers' scratch."""
    prepared = prepare(parse(arguments))
    config, task = prepared.config, prepared.task
    predicted = prepared.forecast.ledger.as_dict()
    with Offloader(
        task.model,
        prepared.groups,
        task.loss_fn,
        optimizer=prepared.optimizer,
        structure=prepared.structure,
        sync_every=config.sync_every,
        accelerator=prepared.accelerator,
        state=config.optimizer.state,
        materialise=task.materialise,
        precision=prepared.precision,
        overlap=False,  # whose staging would pass for the device's
    ) as offloader:
        batches = [task.train[step] for step in range(config.sync_every)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for batch in batches * ROUNDS:
                prepared.accelerator.backward(offloader.loss(batch))
                offloader.step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    peak += predicted["device_peak"].get("batch", 0)  # made before
    print(json.dumps([predicted, {"device_peak_bytes": peak}]))


# Tasks, as `benchmarks.ledger:function`


def mlp(width: int, batch: int) -> dict[str, Any]:
    """Weights and moments decide."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [torch.nn.Linear(784, width), torch.nn.GELU()]
    for _ in range(5):
        layers += [torch.nn.Linear(width, width), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, CLASSES))
    data = [(torch.randn(batch, 784), torch.randint(CLASSES, (batch,))) for _ in range(4)]
    return {"model": model, "train": data, "val": data[:2], "loss": cross_entropy}


def cross_entropy(module: torch.nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def vgg19_bn(width: float, batch: int) -> dict[str, Any]:
    """Activations count as much as weights."""
    torch.manual_seed(0)
    workload = vision("vgg19_bn", width=width, batch=batch)

    data = [workload.batch() for _ in range(4)]
    return {
        "model": workload.build(),
        "train": data,
        "val": data[:2],
        "loss": workload.loss_fn,
        "example_inputs": tuple(workload.example_inputs.values()),
    }


if __name__ == "__main__":
    in_this_process(sys.argv[1:])
