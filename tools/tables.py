"""Write README's tables of measurements from the results files: `python tools/tables.py` (`--check`: only compare)."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: tools/tables.py -->\n", "<!-- /results -->\n"


def tables() -> str:
    """One table per benchmark and device, of every file in tools/results/."""
    records: list[dict[str, Any]] = []
    for path in sorted((ROOT / "tools" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        records += [record for record in content if isinstance(record, dict) and {"name", "case"} <= record.keys()]
    lines: list[str] = []
    for name, device in dict.fromkeys((record["name"], record["device"]) for record in records):
        chosen = [r for r in records if (r["name"], r["device"]) == (name, device)]
        lines += [f"`tools/bench.py {name}`, {device}, torch {chosen[0]['versions']['torch']}:", ""]
        lines += ["| case | measured | ratio | against | aim |", "| --- | ---: | ---: | --- | ---: |"]
        for record in chosen:
            aim = record.get("details", {}).get("aim")
            lines.append(
                f"| {record['case']} | {record['value']:,.4g} {record['unit']} | {record['ratio']:.3g} "
                f"| {record['against']} | {'' if aim is None else f'{aim:.3g}'} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = before + BEGIN + "\n" + tables() + END + after
    if "--check" in sys.argv[1:]:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
