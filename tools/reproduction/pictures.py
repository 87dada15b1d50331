"""Pictures that are the same file whenever they are drawn from the same numbers."""

import io
from pathlib import Path
from typing import Any

from offload_trainer.errors import UserError


def new_figure(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.2), **options: Any
) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes. options: of `plt.subplots`. Raises `UserError` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib, which is not installed: pip install matplotlib") from None

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "offload-trainer"
    return plt.subplots(rows, columns, figsize=size, constrained_layout=True, **options)


def save(figure: Any, file: Path | io.StringIO) -> None:
    """As SVG; the figure is done with."""
    import matplotlib.pyplot as plt

    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def inline(figure: Any) -> str:
    """The <svg> element, for a page of HTML."""
    text = io.StringIO()
    save(figure, text)
    return text.getvalue()[text.getvalue().index("<svg") :]
