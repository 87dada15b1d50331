"""Draw the display of a finished run, from what it left: `python tools/picture.py runs/quickstart out.svg [STEP]`."""

import io
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from offload_trainer.master import find_checkpoint
from offload_trainer.monitor import Monitor


def draw(run: Path, svg: Path, step: int | None = None) -> None:
    """The frame that the display showed at `step` (None: the last), with s as of the newest checkpoint."""
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    unit = next(key for key in summary if key.endswith("_per_second")).removesuffix("_per_second")
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    monitor = Monitor(run, summary["steps"], unit, Accelerator(cpu=True), "rich", console=console)
    for record in records:
        if step is None or record["step"] <= step:
            monitor.remember(record)
    seconds = sum(summary["seconds"].values()) * monitor.latest["step"] / summary["steps"]
    monitor.started = time.monotonic() - seconds
    checkpoint = find_checkpoint(run)
    if "s" in (structure := checkpoint.read("structure")):
        monitor.show(structure["s"] if len(structure["s"]) else torch.ones(1))
    console.print(monitor.view())
    svg.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(svg), title="accelerate launch offload_trainer/run.py")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else None)
