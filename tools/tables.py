"""Write the tables of README.md and tools/results/README.md from the results files: `python tools/tables.py`.

`--check`: only compare.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from reproduction import PARTS
from shrink import comparison, contender

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tools" / "results"

Records = list[dict[str, Any]]


def every() -> Records:
    """Of every file in tools/results/."""
    records: Records = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        records += [record for record in content if isinstance(record, dict) and {"name", "case"} <= record.keys()]
    return records


def aims(records: Records) -> Iterator[str]:
    """Every ratio that should be so large at least, whether it is or not; of `scale` that of the largest model."""
    yield "| benchmark | case | ratio to | aim | measured | reached | on |"
    yield "| --- | --- | --- | ---: | ---: | --- | --- |"
    largest = max((record["details"].get("times", 0) for record in records if record["name"] == "scale"), default=0)
    for record in records:
        aim, name = record["details"].get("aim"), record["name"]
        if aim is None or name == "ledger" or (name == "scale" and record["details"]["times"] < largest):
            continue
        reached = "yes" if record["ratio"] >= aim else "**no**"
        cells = (name, record["case"], record["against"], f"{aim:.3g}", f"{record['ratio']:.3g}", reached)
        yield f"| {' | '.join(cells)} | {record['device']} |"


def lines(records: Records) -> Iterator[str]:
    """A table for each benchmark and device."""
    for name, device in dict.fromkeys((record["name"], record["device"]) for record in records):
        chosen = [r for r in records if (r["name"], r["device"]) == (name, device)]
        tool = chosen[0]["details"].get("tool", f"tools/bench.py {name}")
        title = f"<code>{tool}</code>, {device}, torch {chosen[0]['versions']['torch']}"
        yield f"<details><summary>{title}</summary>"
        yield ""
        yield from LAYOUTS.get(name, ratios)(chosen)
        yield ""
        if name in PARTS and (RESULTS / f"{name}.svg").exists():
            yield f"![{name}]({name}.svg)"
            yield ""
        yield "</details>"
        yield ""


def ratios(records: Records) -> Iterator[str]:
    yield "| case | measured | ratio | against | aim |"
    yield "| --- | ---: | ---: | --- | ---: |"
    for record in records:
        aim = record.get("details", {}).get("aim")
        yield (
            f"| {record['case']} | {record['value']:,.4g} {record['unit']} | {record['ratio']:.3g} "
            f"| {record['against']} | {'' if aim is None else f'{aim:.3g}'} |"
        )


def peers(records: Records) -> Iterator[str]:
    """A table for each model, batch and cap; who did not run has a row that says why."""

    def setting(record: dict[str, Any]) -> str:
        return record["case"].partition(":")[0]

    ours = list(dict.fromkeys(r["details"]["work"] for r in records if r["details"]["work"] != "the full network"))
    for what, found in groupby(sorted(records, key=setting), setting):
        group = list(found)
        compared = next((r["against"] for r in group if r["value"]), "")
        notes = list(dict.fromkeys(r["details"]["note"] for r in group if "note" in r["details"]))
        yield f"{what} a step" + "".join(f" ({note})" for note in notes) + (f". Note that {ours[0]}." if ours else "")
        yield ""
        yield (
            f"| contender | tokens/s | ÷ {compared} | µs/token | parameters in a step | MFLOP/token | TFLOP/s "
            "| device peak | host peak | link per step |"
        )
        yield "| --- |" + " ---: |" * 9
        for record in group:
            yield peer(record)


def peer(record: dict[str, Any]) -> str:
    d = record["details"]
    if d["outcome"] != "measured":
        return f"| {d['contender']} | {d['outcome']} ({d['message']}) |" + " |" * 8
    link, how = d.get("link_bytes_profiled", d["link_bytes_per_step"]), d["link_source"].partition(":")[0]
    cells = [
        d["contender"],
        f"{record['value']:,.0f}",
        f"{record['ratio']:.3g}",
        f"{1e6 * d['seconds_per_token']:,.3g}",
        f"{d['parameters_in_a_step'] / 1e6:,.1f} M ({d['parameters_in_a_step'] / d['parameters']:.0%})",
        f"{d['flops_per_token'] / 1e6:,.4g}" if "flops_per_token" in d else "",
        f"{d['flops_per_second'] / 1e12:,.3g}" if "flops_per_second" in d else "",
        f"{d['device_peak_bytes'] / 2**30:.2f} GiB" if "device_peak_bytes" in d else "",
        f"{d['host_peak_bytes'] / 2**30:.2f} GiB",
        f"{link / 2**20:,.1f} MiB ({'profiled' if 'link_bytes_profiled' in d else how})",
    ]
    return "| " + " | ".join(cells) + " |"


def scale(records: Records) -> Iterator[str]:
    """A row for each full model: what it is, and in brackets how many times as good as the smallest."""
    shown = {"step": "ms", "round": "s", "gather": "ms", "writeback": "ms", "host": "MiB", "device": "MiB"}
    yield "| full model | parameters | step | round | gather | write-back | host peak | device |"
    yield "| --- |" + " ---: |" * 7
    for times in sorted({record["details"]["times"] for record in records}):
        row = {r["case"].split()[2]: r for r in records if r["details"]["times"] == times}
        cells = [f"{times}x", f"{row['step']['details']['parameters'] / 1e6:,.1f} M"]
        for what, unit in shown.items():
            ratio = "" if what == "host" else f" ({row[what]['ratio']:.3g})"
            cells.append(f"{row[what]['value']:,.4g} {unit}{ratio}")
        yield "| " + " | ".join(cells) + " |"


def start(records: Records) -> Iterator[str]:
    """The ratio, and a table of where the seconds go."""
    yield from ratios(records)
    for record in records:
        parts = record["details"]["parts"]
        yield ""
        yield f"| {record['case']} | " + " | ".join(parts) + " |"
        yield "| --- |" + " ---: |" * len(parts)
        yield "| seconds | " + " | ".join(f"{seconds:,.2f}" for seconds in parts.values()) + " |"


def larger(records: Records) -> Iterator[str]:
    """A row for each model, then how its loss fell."""
    yield "| master | parameters | trained in a step | master ÷ device | device (CPU: held) | host peak | seconds |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for record in records:
        d = record["details"]
        seconds = ", ".join(f"{what} {took:,.3g}" for what, took in d["seconds"].items())
        yield (
            f"| {record['case']} | {d['parameters'] / 1e6:,.1f} M | {d['trained'] / 1e6:,.1f} M "
            f"| {record['ratio']:.3g} | {d['against_value']:,.2f} GiB | {d['host_peak_bytes'] / 2**30:,.2f} GiB "
            f"| {seconds} |"
        )
    for record in records:
        curve = record["details"]["losses"]
        shown = [curve[i * (len(curve) - 1) // 5] for i in range(6)]
        yield ""
        yield f"{record['case']}, training loss: " + ", ".join(f"{loss:.3f} (step {step})" for step, loss in shown)


def storage(records: Records) -> Iterator[str]:
    yield "| master | host bytes per parameter | loss after equal steps | ÷ all fp32 | runs |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for record in records:
        d = record["details"]
        losses = ", ".join(f"{loss:.4f}" for loss in d["losses"])
        yield (
            f"| {record['case']} | {d['bytes_per_parameter']:.1f} | {record['value']:.4f} ({losses}) "
            f"| {record['ratio']:.4f} | {d['repeats']} of {d['steps']:,} steps |"
        )


def shrink(records: Records) -> Iterator[str]:
    """A row for each contender of a comparison: runs as long as one another, on the same held-out text."""
    yield "| compared | contender | perplexity before training | after | steps | minutes |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    by_name: dict[tuple[str, str], Records] = {}
    for record in records:
        by_name.setdefault((comparison(record), contender(record)), []).append(record)
    for (where, name), found in sorted(by_name.items(), key=lambda one: one[0][0]):
        details = [record["details"] for record in found]
        before = ", ".join(f"{math.exp(d['points'][0][2]):,.0f}" for d in details)
        after = ", ".join(f"{record['value']:,.1f}" for record in found)
        minutes = ", ".join(f"{d['wall_seconds'] / 60:.0f}" for d in details)
        yield f"| {where} | {name} | {before} | {after} | {details[0]['steps']} | {minutes} |"


LAYOUTS: dict[str, Callable[[Records], Iterator[str]]] = {
    "peers": peers,
    "scale": scale,
    "start": start,
    "storage": storage,
    "larger": larger,
    "shrink": shrink,
    **{name: part.rows for name, part in PARTS.items()},
}


def of(name: str, without: str = "") -> Callable[[Records], Iterator[str]]:
    """The table of one benchmark, of all devices. without: cases with these words are left out."""

    def chosen(records: Records) -> Iterator[str]:
        yield from LAYOUTS[name]([r for r in records if r["name"] == name and not (without and without in r["case"])])

    return chosen


PAGES: dict[Path, dict[str, Callable[[Records], Iterator[str]]]] = {
    ROOT / "README.md": {
        "aims": aims,
        "storage": of("storage"),
        "frontier": of("frontier", "at a rate of"),
        "shrink": of("shrink"),
    },
    RESULTS / "README.md": {"results": lines},
}
"""Each table stands between comments of its name."""


def main() -> int:
    records, fresh = every(), True
    for page, parts in PAGES.items():
        new = text = page.read_text()
        for name, part in parts.items():
            begin, end = f"<!-- {name}: tools/tables.py -->\n", f"<!-- /{name} -->\n"
            before, rest = new.split(begin)
            new = before + begin + "\n" + "".join(f"{line}\n" for line in part(records)) + end + rest.split(end)[1]
        fresh = fresh and new == text
        if "--check" not in sys.argv[1:]:
            page.write_text(new)
    return 0 if fresh or "--check" not in sys.argv[1:] else 1


if __name__ == "__main__":
    sys.exit(main())
