"""One page of what runs did: `python tools/report.py RUN … [--html FILE]`, RUN a run's output folder.

Losses, s of every unit over time, widths, coverage, transfers and memory, from metrics.jsonl and summary.json. The page
is one file, with its pictures in it: it can be mailed, and opens without a network. A run that still goes on, or was
broken off, is shown as far as it got.
"""

import argparse
import html
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduction.pictures import inline, new_figure

from offload_trainer.errors import UserError
from offload_trainer.files.format import readable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { font-weight: 600; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left } th { color: #777; font-weight: 400 }
figure { margin: 1rem 0 } figcaption { color: #777 } svg { max-width: 100%; height: auto }
"""  # noqa: E501
GROUPS = 24
"""Heat maps of a run at most: the first of these and the last, where a model has more groups."""


@dataclass(frozen=True)
class Run:
    name: str
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    """Empty while the run goes on."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have this number."""
        points = [(r["step"], r[key]) for r in self.records if isinstance(r.get(key), int | float)]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """Records with s and coverage of the groups."""
        return [record for record in self.records if record.get("structure")]


def read(folder: Path) -> Run:
    """Raises `UserError` where there is nothing to show. A last line that a killed run has half written is left out."""
    file, summary = folder / "metrics.jsonl", folder / "summary.json"
    try:
        records = [json.loads(line) for line in file.read_text().rpartition("\n")[0].splitlines()]
        if not all(isinstance(record, dict) and type(record.get("step")) is int for record in records):
            raise ValueError("a line is no record of a step")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"report: {file} cannot be read as a run's metrics: {error}") from error
    try:
        found = json.loads(summary.read_text()) if summary.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("it is no summary of a run")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"report: {summary} cannot be read: {error}") from error
    if not records:
        raise UserError(f"report: {file} holds no record yet: the run has logged nothing")
    return Run(folder.name if folder.name not in ("", ".") else folder.resolve().name, records, found)


def page(runs: Sequence[Run]) -> str:
    """The HTML."""
    title = "Runs: " + ", ".join(run.name for run in runs)
    body = [f"<h1>{html.escape(title)}</h1>", *overview(runs), *losses(runs)]
    for run in runs:
        body += [f"<h2>{html.escape(run.name)}: structure</h2>", *structure(run)]
        body += [f"<h2>{html.escape(run.name)}: transfers</h2>", *transfers(run)]
        body += [f"<h2>{html.escape(run.name)}: memory</h2>", *memory(run)]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def overview(runs: Sequence[Run]) -> Iterator[str]:
    rows = []
    for run in runs:
        exported = run.summary.get("exported", {})
        _, loss = run.series("loss")
        metrics = ", ".join(f"{name} {number(value)}" for name, value in exported.items() if name != "parameters")
        rows.append(
            (
                run.name,
                f"{run.records[-1]['step']:,}" + ("" if run.summary else " (not finished)"),
                f"{loss[-1]:.4g}" if loss else "",
                metrics,
                f"{exported['parameters'] / 1e6:.2f} M" if exported else "",
                f"{run.summary['full_master']['parameters'] / 1e6:.2f} M" if run.summary else "",
                f"{run.records[-1].get('train_seconds', 0) / 60:.1f} min",
            )
        )
    yield table(("run", "steps", "training loss", "export", "parameters", "of the master", "training"), rows)


def number(value: float | None) -> str:
    """None: what is not finite."""
    return "–" if value is None else f"{value:.4g}"


def losses(runs: Sequence[Run]) -> Iterator[str]:
    figure, axes = new_figure(size=(9, 4))
    for i, run in enumerate(runs):
        axes.plot(*run.series("loss"), color=f"C{i}", lw=0.9, alpha=0.6, label=f"{run.name}, training")
        steps, values = run.series("val_loss")
        if steps:
            axes.plot(steps, values, color=f"C{i}", marker="o", label=f"{run.name}, validation")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend(frameon=False)
    yield picture(figure, "Loss of the subnet that trains, and of the export as it would be then.")


def structure(run: Run) -> Iterator[str]:
    """Heat maps of s, then widths and coverage as they are at the last picture."""
    if not run.pictures:
        yield "<p>No group is sampled, or no picture of them was logged (track.structure_every).</p>"
        return
    last = run.pictures[-1]["structure"]
    names = list(last)
    if len(names) > GROUPS:
        names = [*names[: GROUPS // 2], *names[-GROUPS // 2 :]]
        yield f"<p>{len(last)} groups, of which the first and the last {GROUPS // 2} are shown.</p>"
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = new_figure(lines, columns, (10, 1.7 * lines + 0.6), squeeze=False)
    steps, shown = [record["step"] for record in run.pictures], None
    for axes, name in zip(grid.flat, names, strict=False):
        columns_of_s = [record["structure"][name]["s"] for record in run.pictures]
        image = list(zip(*columns_of_s, strict=True))  # rows of units, a column for each picture
        extent = (0, len(steps), len(image), 0)
        shown = axes.imshow(
            image, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=extent, interpolation="nearest"
        )
        axes.set_title(name if len(name) < 32 else "…" + name[-30:], fontsize=8)
        axes.set_xticks([0.5, len(steps) - 0.5], [f"{steps[0]:,}", f"{steps[-1]:,}"], fontsize=7)
        axes.set_yticks([])
    for axes in list(grid.flat)[len(names) :]:
        axes.axis("off")
    figure.colorbar(shown, ax=grid, label="s", fraction=0.02)
    yield picture(figure, "s over time: a row for a unit, or a few neighbours; left to right, optimizer steps.")

    figure, (widths, coverage) = new_figure(2, 1, (10, 5.5), sharex=True)
    places = range(len(last))
    widths.bar(places, [group["width"] / group["units"] for group in last.values()])
    widths.set(ylabel="share of the units\nin the last round", ylim=(0, 1))
    trained = [group["trained"] for group in last.values()]
    coverage.vlines(places, [min(t) for t in trained], [max(t) for t in trained], color="0.7", lw=4)
    coverage.plot(places, [sum(t) / len(t) for t in trained], "o", ms=4)
    coverage.set(ylabel="share of the steps that\nunits were trained", ylim=(0, 1))
    every = max(1, len(last) // 40)
    coverage.set_xticks(places[::every], list(last)[::every], rotation=90, fontsize=7)
    yield picture(figure, "Widths and coverage by group; grey: from the least to the most trained units.")
    ages = {name: max(group["age"]) for name, group in last.items()}
    name = max(ages, key=lambda name: ages[name])
    yield f"<p>Longest untrained: a unit of {html.escape(name)}, for {ages[name]:,} steps.</p>"


def transfers(run: Run) -> Iterator[str]:
    figure, (speed, hidden, waited) = new_figure(1, 3, (10, 2.8))
    steps, values = run.series("bytes_per_second")
    speed.plot(steps, [value / 1e9 for value in values], ".-")
    speed.set(title="speed, GB/s", xlabel="step", ylim=(0, None))
    hidden.plot(*run.series("overlapped_share"), ".-")
    hidden.set(title="share hidden behind training", xlabel="step", ylim=(0, 1.05))
    waited.plot(*run.series("waited_ms"), ".-")
    waited.set(title="waited for, ms a round", xlabel="step", ylim=(0, None))
    yield picture(figure, "Gather and write-back, of the last round that had ended at each step.")
    total = run.summary.get("transfers")
    if total:
        moved, seconds = readable(total["bytes_moved"]), total["waited_seconds"]
        share = f"{total['link_share']:.0%} of the link's probed speed"
        yield f"<p>In all {moved}, at {total['bytes_per_second'] / 1e9:.2f} GB/s, {share}; waited {seconds:.2f} s.</p>"


def memory(run: Run) -> Iterator[str]:
    ledger = run.summary.get("ledger")
    if not ledger:
        host = max((record.get("host_bytes", 0) for record in run.records), default=0)
        yield f"<p>The run has not finished; host memory so far {readable(host)}.</p>"
        return
    predicted, measured = ledger["predicted"], ledger["measured"]
    device = measured.get("device_peak_bytes")
    rows = [
        ("host peak", *compared(predicted["host_peak_bytes"], measured["host_peak_bytes"])),
        ("device peak", *compared(predicted["device_peak_bytes"], device)),
    ]
    if device is None:
        rows.append(("device, held between steps", "", readable(measured["device_held_bytes"]), ""))
    yield table(("", "predicted", "measured", "measured ÷ predicted"), rows)
    phases = [
        (name, readable(phase["host_bytes"]), readable(phase["device_bytes"]))
        for name, phase in predicted["phases"].items()
    ]
    yield "<h3>Predicted by phase</h3>" + table(("phase", "host", "device"), phases)


def compared(predicted: int, measured: int | None) -> tuple[str, str, str]:
    if measured is None:
        return readable(predicted), "a CPU does not tell", ""
    return readable(predicted), readable(measured), f"{measured / predicted:.3f}" if predicted else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def picture(figure: Any, caption: str) -> str:
    return f"<figure>{inline(figure)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    options = parser.parse_args(arguments)
    file = options.html or options.runs[0] / "report.html"
    try:
        text = page([read(folder) for folder in options.runs])
        file.write_text(text)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        print(f"report: what a run left is damaged: {error!r}", file=sys.stderr)
        return 2
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
