"""Runs of the trainer that a comparison is made of: each in a process and a folder of its own, once."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launching import launch
from pydantic import BaseModel

from offload_trainer.config import parse
from offload_trainer.errors import UserError
from offload_trainer.files.writing import write_json
from reproduction.timed import PASSES

ROOT = Path(__file__).parents[2]
WHOLE: list[object] = [
    *("--structure.keep", "null", "--structure.groups", '{"*": 1.0}', "--structure.start", "uniform"),
    *("--structure.settle", 0, "--structure.result", "top"),
]
"""Keys of a config for an ordinary training of the whole network."""
AS_PUBLISHED: list[object] = [
    *("--structure.start", "uniform", "--structure.settle", 0, "--structure.sampler", "bernoulli"),
    *("--structure.budget", "global", "--structure.result", "best_of", "--structure.samples", 10),
]
"""Keys of a config for subnets drawn as the paper draws them: each unit by itself, under one budget for all."""
SHORT = [
    *("--task.limit", "16", "--task.batch_size", "4", "--sync_every", "2", "--structure.paired_batches", "1"),
    *("--structure.result_batches", "1", "--structure.samples", "2"),
]
"""Keys of a config that make a run on images tiny."""
ASKED, SUMMARY, METRICS = "asked.json", "summary.json", "metrics.jsonl"
ELSEWHERE = ("out", "resume")
"""Keys that say where a run is, not what."""


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    out: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    passes: dict[str, float]
    """Seconds of all its forward and all its backward passes."""
    settings: dict[str, Any]
    """Keys of its config that differ from their defaults, and their values."""

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

    @property
    def device_bytes(self) -> int:
        """The peak on a device; on a CPU, which does not tell, the ledger's prediction of it."""
        ledger = self.summary["ledger"]
        return ledger["measured"].get("device_peak_bytes") or ledger["predicted"]["device_peak_bytes"]


def finish(
    out: Path, name: str | Path, arguments: Sequence[object], *, keep_checkpoints: bool = False, variant: str = ""
) -> Run:
    """The run of a config (a shipped one by its name, any other by its file) in the folder `out`, as its command does
    it: trained now, unless that is done, and gone on with where it was interrupted. variant: see `variants`.

    Raises `UserError` if the run fails, or if another one lies in the folder.
    """
    file = ROOT / "configs" / f"{name}.yaml" if isinstance(name, str) else name
    words = ["--config", file, "--out", out, *arguments]
    config = parse([str(word) for word in words])
    whole = config.model_dump(mode="json", exclude=set(ELSEWHERE))
    begun = (out / METRICS).exists()
    if begun and (not (out / ASKED).is_file() or json.loads((out / ASKED).read_text()) != whole):
        raise UserError(
            f"{out} holds a run with other arguments, or of a config that has changed: remove it, or use another --out"
        )
    if not (out / SUMMARY).is_file():
        if variant:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / ASKED, whole)
        program = ["reproduction.variants", variant] if variant else ["reproduction.timed"]
        launch(out.name, [*words, "--resume", "auto"], ["-m", *program])
        if not keep_checkpoints:
            shutil.rmtree(out / "checkpoints")
    lines = (out / METRICS).read_text().splitlines()
    summary, passes = (json.loads((out / name).read_text()) for name in (SUMMARY, PASSES))
    scale = summary["steps"] / passes.pop("steps")  # a run that was killed timed some steps twice
    passes = {name: seconds * scale for name, seconds in passes.items()}
    return Run(out, summary, [json.loads(line) for line in lines], passes, chosen(config))


def chosen(section: BaseModel) -> dict[str, Any]:
    """Keys of a config that differ from their defaults, and their values, as JSON has them; but not where it is run."""
    values = section.model_dump(mode="json")
    found = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= {f"{name}.{key}": inner for key, inner in chosen(value).items()}
        elif name not in ELSEWHERE and value != field.get_default(call_default_factory=True):
            found[name] = values[name]
    return found
