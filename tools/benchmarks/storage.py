"""What fewer host bytes per parameter cost: validation loss after equal steps, against a master that is all fp32."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.records import Record, Setting
from offload_trainer.errors import UserError

ROOT = Path(__file__).parents[2]
KINDS = {
    "fp32, moments fp32": [],
    "fp32, moments bf16": ["--memory.moments", "bf16"],
    "bf16, moments bf16": ["--memory.weights", "bf16", "--memory.moments", "bf16"],
    "fp32, moments reset": ["--optimizer.state", "reset"],
    "bf16, moments reset": ["--memory.weights", "bf16", "--optimizer.state", "reset"],
}
MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
STEPS, SEEDS = 2500, (0, 1)
QUICK_STEPS, QUICK_SEEDS = 4, (0,)


def measure(setting: Setting) -> Iterator[Record]:
    """The quickstart's task and recipe with a smaller model, for more steps: every kind from each seed."""
    first: list[float] = []
    for name, options in KINDS.items():
        runs = [run(setting, seed, options) for seed in (QUICK_SEEDS if setting.quick else SEEDS)]
        losses = [run["exported"]["loss"] for run in runs]
        first = first or losses
        yield setting.record(
            "storage",
            name,
            mean(losses),
            "nats per byte",
            mean(loss / base for loss, base in zip(losses, first, strict=True)),
            next(iter(KINDS)),
            repeats=len(losses),
            against_value=mean(first),
            losses=losses,
            steps=runs[0]["steps"],
            bytes_per_parameter=runs[0]["master_bytes"] / runs[0]["full_master"]["parameters"],
        )


def run(setting: Setting, seed: int, options: list[str]) -> dict[str, Any]:
    """The summary of a run in a process of its own, and `master_bytes`: weights and moments in its last checkpoint."""
    steps = QUICK_STEPS if setting.quick else STEPS
    sizes = ["--task.sequence", "128", "--task.batch_size", "8", "--task.val_batches", "40"]
    if setting.quick:
        sizes = ["--task.sequence", "16", "--task.batch_size", "2", "--task.val_batches", "1", "--sync_every", "2"]
        sizes += ["--structure.paired_batches", "1"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "offload_trainer" / "run.py")]
        command += ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--out", out, "--seed", str(seed)]
        command += ["--task.model", json.dumps(MODEL), "--steps", str(steps), *sizes, "--track.display", "plain"]
        command += ["--track.log_every", str(steps), "--checkpoint.keep_last", "1", *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"storage: a run ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        files = [*Path(out).glob("checkpoints/*/weights.*"), *Path(out).glob("checkpoints/*/moments.*")]
        summary = json.loads((Path(out) / "summary.json").read_text())
        return {**summary, "master_bytes": sum(file.stat().st_size for file in files)}
