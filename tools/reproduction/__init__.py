"""What the paper measured, measured again: see tools/reproduce.py."""

from types import ModuleType

from reproduction import cost, figure4, frontier, interval, recipe, table5, variance, wide

PARTS: dict[str, ModuleType] = {
    "table5": table5,
    "figure4": figure4,
    "interval": interval,
    "cost": cost,
    "wide": wide,
    "variance": variance,
    "frontier": frontier,
    "recipe": recipe,
}
"""Each has `add_arguments`, `measure`, `draw`, `rows`; and its quick size: `QUICK`, other defaults of its arguments,
and `QUICK_KEYS`, keys of the config of its runs."""
