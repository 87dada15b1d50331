"""What `--dry-run` shows: what a run will hold in each phase, what crosses the link, and whether it fits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from offload_trainer.device.link import Link
from offload_trainer.files.format import readable
from offload_trainer.forecast.fitting import Verdict
from offload_trainer.forecast.ledger import Ledger

NAME, SIZE, BAR = 28, 10, 12
"""Characters of the columns, which fit a terminal of 80."""


@dataclass(frozen=True)
class Forecast:
    """Answers before anything is allocated; rich prints it."""

    ledger: Ledger
    verdicts: tuple[Verdict, ...]
    reason: str | None
    """Why the keep ratio is what it is, where it was chosen for the device."""
    link: Link
    """Speeds, as they were probed."""
    export: str | None = None
    """What a user must know of the export."""
    notes: tuple[str, ...] = ()
    """What else there is to know of the figures."""

    def __rich__(self) -> RenderableType:
        ledger = self.ledger
        host = dict(ledger.host_peak.host)
        if ledger.on_host and ledger.host_peak.device_bytes:
            host["what the device's side holds"] = ledger.host_peak.device_bytes
        return Group(
            *self._phases(),
            *_section("host", f"in its fullest phase, {ledger.host_peak.name}", host),
            *_section("device", f"in its fullest phase, {ledger.device_peak.name}", ledger.device_peak.device),
            *_section("disk", "at the end of the run", ledger.disk),
            *_section("link", "in each round", ledger.link),
            self._answers(),
        )

    def _phases(self) -> Iterator[RenderableType]:
        ledger = self.ledger
        peaks = ledger.host_peak_bytes, ledger.device_peak_bytes
        table = Table.grid(padding=(0, 2))
        table.add_column(width=NAME, no_wrap=True)
        for _ in peaks:
            table.add_column(width=SIZE, justify="right", no_wrap=True)
            table.add_column(width=BAR, no_wrap=True)
        table.add_row(Text("memory by phase", "bold"), Text("host", "dim"), "", Text("device", "dim"), "")
        for phase in ledger.phases:
            cells = [Text(phase.name)]
            for size, peak in zip((ledger.host_bytes(phase), phase.device_bytes), peaks, strict=True):
                cells += [Text(readable(size) if size else "–", "bold" if size == peak else ""), _bar(size, peak)]
            table.add_row(*cells)
        yield table
        yield ""

    def _answers(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for verdict in self.verdicts:
            word = Text("fits", "green") if verdict.fits else Text("does not fit", "bold red")
            table.add_row(Text(verdict.place, "bold"), Text.assemble(word, ": ", verdict.text))
        table.add_row(Text("link", "bold"), Text(self._link_time(self.link)))
        rows = self.ledger.rows
        parts = f"batches pass through it in parts of {rows} at most, for less device memory"
        for name, text in (
            ("ρ", self.reason),
            ("master", parts if rows else None),
            ("export", self.export),
            *(("note", note) for note in (*self.ledger.notes, *self.notes)),
        ):
            if text:
                table.add_row(Text(name, "bold"), Text(text))
        return table

    def _link_time(self, link: Link) -> str:
        down = sum(size for name, size in self.ledger.link.items() if name.startswith("gathered"))
        up = sum(self.ledger.link.values()) - down
        seconds = down / link.to_device + up / link.to_host
        speeds = f"{link.to_device / 1e9:.1f} GB/s to the device, {link.to_host / 1e9:.1f} GB/s back"
        return f"{1e3 * seconds:,.{0 if seconds > 0.01 else 2}f} ms a round at the speed of plain copies ({speeds})"


def show_forecast(groups: object, forecast: Forecast, *, whole: bool) -> None:
    """Print what a dry run answers; else only why the keep ratio was chosen, if it was, and what the export lacks."""
    console = Console()
    if whole:
        console.print(Text(str(groups)), soft_wrap=True)
        console.print()
        console.print(forecast)
        return
    for line in filter(None, (forecast.reason, forecast.export)):
        console.print(Text(line), soft_wrap=True)


def _section(name: str, when: str, entries: Mapping[str, int]) -> Iterator[RenderableType]:
    """A heading, who holds how much, the largest first, and all of it."""
    if not entries:
        return
    total = sum(entries.values())
    table = Table.grid(padding=(0, 2))
    table.add_column(width=NAME, no_wrap=True)
    table.add_column(width=SIZE, justify="right", no_wrap=True)
    table.add_column(width=2 * BAR, no_wrap=True)
    for entry, size in sorted(entries.items(), key=lambda entry: -entry[1]):
        table.add_row(Text(entry), Text(readable(size)), _bar(size, total, 2 * BAR))
    table.add_row(Text("together", "bold"), Text(readable(total), "bold"), "")
    yield Text.assemble((name, "bold"), (f" {when}", "dim"))
    yield table
    yield ""


def _bar(size: float, most: float, width: int = BAR) -> Text:
    whole, half = divmod(round(2 * width * size / most) if most else 0, 2)
    return Text("━" * whole + "╸" * half, "cyan")
