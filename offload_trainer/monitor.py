"""What a run tells as it goes: metrics.jsonl, trackers, a live view on a terminal or plain lines elsewhere."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload_trainer.files.writing import recording, replace_text
from offload_trainer.wording import duration, worded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

SUMMARY = "summary.json"
EIGHTHS = " ▁▂▃▄▅▆▇█"
WIDTH = 40  # of the two charts, in characters: the bins of the histogram of s
ACCENT = "cyan"
FACTS: dict[str, tuple[str, str | None]] = {  # shown of a record: key → name in the live view, in a line (None: not)
    "loss": ("loss", "loss "),
    "val_loss": ("validation loss", "val loss "),
    "val_accuracy": ("validation accuracy", "val accuracy "),
    "keep": ("keep ratio ρ", "ρ "),
    "round": ("round", "round "),
    "per_second": ("speed", ""),
    "transfer_share": ("between rounds", "between rounds "),
    "bytes_moved": ("moved in a round", "moved "),
    "bytes_per_second": ("transfers", None),
    "link_share": ("of the link's speed", None),
    "waited_ms": ("waited for", None),
    "overlapped_share": ("hidden behind training", "hidden "),
    "host_bytes": ("host memory", "host "),
    "device_bytes": ("device memory", "device "),
}
OF_TRANSFERS = ("bytes_moved", "bytes_per_second", "link_share", "waited_ms", "overlapped_share")
"""Shown once a round has moved something."""

Record = dict[str, Any]


class Monitor:
    """Writes and shows the records of a run, on the main process alone: elsewhere its methods do nothing.

    `out` must exist. With `first_step` 0 an older metrics.jsonl is replaced; else the run is resumed after
    that step, and what was logged of later ones is dropped, since it will be logged again.
    """

    def __init__(
        self,
        out: Path,
        steps: int,
        unit: str,
        accelerator: "Accelerator",
        display: Literal["auto", "rich", "plain"] = "auto",
        first_step: int = 0,
        console: Console | None = None,
    ):
        self.out, self.steps, self.unit, self.first_step = Path(out), steps, unit, first_step
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.console = console or Console(force_terminal=True if display == "rich" else None)
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.latest: Record = {"step": first_step}
        self.validated = -1  # step of the last validation on record
        self.losses: dict[int, float] = {}  # column of the chart → the last loss that falls into it
        self.histogram: list[float] = []  # units in each of WIDTH equal parts of [0, 1]
        self.started = time.monotonic()
        self.live = None
        if self.main and (display == "rich" or (display == "auto" and terminal)):
            self.live = Live(get_renderable=self.view, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self.main:
            path = self.out / "metrics.jsonl"
            with recording(path):
                (self.out / SUMMARY).unlink(missing_ok=True)  # of this run until here, or of another
                kept = list(_records(path, self.first_step)) if self.first_step else []
                replace_text(path, "".join(map(_line, kept)))
                self.file = path.open("a", encoding="utf-8")
            for record in kept:
                self.remember(record)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()  # gives the cursor back, after Ctrl-C too
        if self.main:
            with suppress(OSError):  # of what could not be written: `log` has told
                self.file.close()

    def log(self, record: Record) -> None:
        """Writes a record (it has a `step`) as one line, hands its numbers to the trackers and shows it.

        All of it is written, NaN and infinity as null. Shown is what `FACTS` names, as far as present. Raises
        `UserError` when it cannot be written.
        """
        if not self.main:
            return
        record = _plain(record)
        with recording(self.out / "metrics.jsonl"):
            self.file.write(_line(record))
            self.file.flush()
        if self.accelerator.trackers:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=record["step"])
        self.remember(record)
        if not self.live:
            words = [name + value for (_, name), value in self._facts(record) if name is not None]
            self.message("  ".join([f"step {record['step']}/{self.steps}", *words, f"left {self._left()}"]))

    def show(self, s: "Tensor") -> None:
        """Takes the probabilities s of all sampled units, (n,), for the histogram of the live view."""
        if self.live:
            self.histogram = s.detach().float().cpu().histc(WIDTH, 0, 1).tolist()

    def message(self, text: str) -> None:
        """Prints a line, above the live view if there is one."""
        if self.main:
            with suppress(OSError):  # a log on a full disk: the run goes on, and its records have files of their own
                self.console.print(Text(text), soft_wrap=True)

    def summary(self, record: Record) -> None:
        """Writes summary.json, whole or not at all; ends the live view and prints the record as a table."""
        if not self.main:
            return
        record = _plain(record)
        with recording(self.out / SUMMARY):
            replace_text(self.out / SUMMARY, json.dumps(record, indent=2, allow_nan=False) + "\n")
        if self.live:
            self.live.stop()
        table, previous = Table.grid(padding=(0, 3)), ""
        leaves = _leaves({key: value for key, value in record.items() if key != "ledger"})
        rows = [(path, worded(".".join(path), value)) for path, value in leaves]
        rows += [(("memory", name), words) for name, words in _memory(record.get("ledger") or {})]
        for path, value in sorted(rows, key=lambda row: len(row[0]) > 1):  # loose ones first
            section, name = (path[0], " ".join(path[1:])) if path[1:] else ("run", path[0])
            words = ["" if section == previous else section, name]
            table.add_row(*(Text(w.replace("_", " "), "dim") for w in words), Text(value))
            previous = section
        with suppress(OSError):
            self.console.print(_framed(table, "summary", expand=False) if self.live else table)

    def view(self) -> RenderableType:
        """One frame of the live view."""
        step = self.latest["step"]
        progress = Table.grid(expand=True, padding=(0, 2))
        progress.add_column()
        progress.add_column(ratio=1)
        progress.add_row(
            f"step {step:,} of {self.steps:,}",
            ProgressBar(self.steps, step, complete_style=ACCENT, finished_style=ACCENT),
            f"{step / self.steps:.0%}",
            f"{duration(time.monotonic() - self.started)} passed, {self._left()} left",
        )
        facts = Table.grid(padding=(0, 2))
        for (name, _), value in self._facts(self.latest):
            facts.add_row(Text(name, "dim"), Text(value))
        charts = Group(*self._charts())
        if self.console.width < 90:
            body: RenderableType = Group(facts, "", charts)
        else:
            body = Table.grid(expand=True)
            body.add_column(ratio=1)
            body.add_row(facts, charts)
        return _framed(Group(progress, "", body), f"offload-trainer · {self.out}", expand=True)

    def _charts(self) -> Iterator[Text]:
        """The loss over the whole run, and how many units have which probability."""
        if self.losses:
            low, high = min(self.losses.values()), max(self.losses.values())
            spread = (high - low) or 1.0
            shares = {column: (loss - low) / spread for column, loss in self.losses.items()}
            yield _chart([shares.get(column) for column in range(WIDTH)], 3, "0", "loss by step", f"{self.steps:,}")
        if self.histogram:
            most = max(self.histogram) or 1.0
            shares = [units / most if units else None for units in self.histogram]
            yield Text()
            yield _chart(shares, 4, "0", "units by probability s", "1")

    def _facts(self, record: Record) -> Iterator[tuple[tuple[str, str | None], str]]:
        """What is shown of a record: its two names, and its value in words."""
        for key, names in FACTS.items():
            key = f"{self.unit}_per_second" if key == "per_second" else key
            if key in record and (key not in OF_TRANSFERS or record.get("bytes_moved")):
                yield names, worded(key, record[key])

    def remember(self, record: Record) -> None:
        self.latest |= record
        self.validated = record["step"] if any(key.startswith("val_") for key in record) else self.validated
        if isinstance(record.get("loss"), int | float):
            self.losses[min(WIDTH - 1, WIDTH * record["step"] // self.steps)] = record["loss"]

    def _left(self) -> str:
        """The time that the remaining steps take, at the speed of this run so far."""
        step = self.latest["step"]
        if step == self.first_step:
            return "?"
        return duration((time.monotonic() - self.started) / (step - self.first_step) * (self.steps - step))


def _records(path: Path, last_step: int) -> Iterator[Record]:
    """The whole records of a metrics.jsonl up to a step; a line that was cut off while being written is none, nor is
    what else a crash may leave in a file."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or no text
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] <= last_step:
            yield _plain(record)


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Only what strict JSON has: numbers out of tensors, no NaN or infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _leaves(record: Record, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of nested maps with their paths, three deep at most."""
    for key, value in record.items():
        if not isinstance(value, dict):
            yield (*path, key), value
        elif len(path) < 2:
            yield from _leaves(value, *path, key)


def _memory(ledger: Record) -> Iterator[tuple[str, str]]:
    """What was measured of a ledger, in words, beside its prediction where there is one."""
    predicted = ledger.get("predicted", {})
    for key, size in ledger.get("measured", {}).items():
        words = worded(key, size)
        if predicted.get(key):
            words += f", {worded(key, predicted[key])} predicted (×{size / predicted[key]:.2f})"
        yield key.removesuffix("_bytes"), words


def _framed(content: RenderableType, title: str, expand: bool) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim", padding=(1, 2), expand=expand)


def _chart(shares: Sequence[float | None], rows: int, left: str, middle: str, right: str) -> Text:
    """A bar for each share in [0, 1] of the height, none for None, above a caption."""
    bars = [0 if share is None else max(1, round(share * 8 * rows)) for share in shares]
    lines = ["".join(EIGHTHS[min(8, max(0, bar - 8 * row))] for bar in bars) for row in range(rows)]
    caption = left + middle.center(WIDTH - len(left) - len(right)) + right
    return Text.assemble(("\n".join(reversed(lines)), ACCENT), ("\n" + caption, "dim"))
