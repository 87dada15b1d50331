"""Runs of the trainer that a comparison is made of: each in a process and a folder of its own, once."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launching import launch

from offload_trainer.errors import UserError
from offload_trainer.master.checkpoint import write_json
from reproduction.timed import PASSES

ROOT = Path(__file__).parents[2]
WHOLE = ["--structure.keep", "null", "--structure.groups", '{"*": 1.0}', "--structure.result", "top"]
"""Keys of a config for an ordinary training of the whole network."""
SHORT = [
    *("--task.limit", "16", "--task.batch_size", "4", "--sync_every", "2", "--structure.paired_batches", "1"),
    *("--structure.result_batches", "1", "--structure.samples", "2"),
]
"""Keys of a config that make a run on images tiny."""
ASKED, SUMMARY, METRICS = "asked.json", "summary.json", "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    out: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    passes: dict[str, float]
    """Seconds of all its forward and all its backward passes."""

    @property
    def parameters(self) -> int:
        """Of the export."""
        return self.summary["exported"]["parameters"]

    @property
    def full_parameters(self) -> int:
        return self.summary["full_master"]["parameters"]

    @property
    def seconds(self) -> float:
        """Of the training loop, without evaluations."""
        return self.metrics[-1]["train_seconds"]


def finish(out: Path, config: str, arguments: Sequence[object], *, keep_checkpoints: bool = False) -> Run:
    """The run of a shipped config in the folder `out`, as its command does it: trained now, unless that is done, and
    gone on with where it was interrupted.

    Raises `UserError` if the run fails, or if another one lies in the folder.
    """
    asked = {"config": config, "arguments": [str(word) for word in arguments]}
    if (out / ASKED).is_file() and json.loads((out / ASKED).read_text()) != asked:
        raise UserError(f"{out} holds a run with other arguments: name another --out, or remove it")
    if not (out / SUMMARY).is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ASKED, asked)
        words = ["--config", ROOT / "configs" / f"{config}.yaml", "--out", out, "--resume", "auto", *arguments]
        launch(out.name, words, ["-m", "reproduction.timed"])
        if not keep_checkpoints:
            shutil.rmtree(out / "checkpoints")
    lines = (out / METRICS).read_text().splitlines()
    summary, passes = (json.loads((out / name).read_text()) for name in (SUMMARY, PASSES))
    scale = summary["steps"] / passes.pop("steps")  # a run that was killed timed some steps twice
    return Run(out, summary, [json.loads(line) for line in lines], {k: v * scale for k, v in passes.items()})
