"""`print(groups)`: layers that repeat are one row, as `model.layers.{0-31}.mlp`."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload_trainer.groups.plan import Group, Groups


def table(groups: "Groups") -> str:
    total = sum(shape.numel() for shape in groups.shapes.values()) or 1
    rows: list[tuple[str, str, str, str, str]] = [("group", "units", "slots", "parameters", "share of the model")]
    for members in _repeated(groups):
        tensors = {slot.tensor for group in members for slot in group.slots}
        parameters = sum(groups.shapes[tensor].numel() for tensor in tensors)
        times = f"{len(members)} × " if len(members) > 1 else ""
        rows.append(
            (
                _folded([group.name for group in members]),
                f"{times}{members[0].units:,}" + (f" (≥ {members[0].least})" if members[0].least > 1 else ""),
                f"{times}{len(members[0].slots)}",
                f"{parameters:,}",
                f"{parameters / total:.1%}",
            )
        )
    covered = {slot.tensor for group in groups for slot in group.slots}
    share = sum(groups.shapes[tensor].numel() for tensor in covered) / total
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "─" * len(lines[0]))
    lines.append(f"{len(groups)} groups over {len(covered)} tensors with {share:.1%} of {total:,} elements")
    return "\n".join(lines)


def _repeated(groups: "Groups") -> "list[list[Group]]":
    """Groups that differ only in one layer number, together, in the order of their first member."""
    families: dict[tuple, list[Group]] = {}
    for group in groups:
        pattern = re.sub(r"\d+", "#", group.name, count=1)
        shapes = tuple(groups.shapes[slot.tensor] for slot in group.slots)
        families.setdefault((pattern, group.units, group.least, shapes), []).append(group)
    return list(families.values())


def _folded(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    numbers = [int(re.search(r"\d+", name).group()) for name in names]  # type: ignore[union-attr]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        span = f"{{{numbers[0]}-{numbers[-1]}}}"
    else:
        span = "{" + ",".join(map(str, numbers)) + "}"
    return re.sub(r"\d+", span, names[0], count=1)
