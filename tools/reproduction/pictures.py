"""Pictures that are the same file whenever they are drawn from the same numbers."""

from pathlib import Path
from typing import Any


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.2)) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "offload-trainer"
    return plt.subplots(rows, columns, figsize=size, constrained_layout=True)


def save(figure: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
