"""Numbers of a run in words, for people: each with the unit that its key tells."""

from typing import Any


def worded(key: str, value: Any) -> str:
    """A value with its unit, which its dotted key tells."""
    if value is None:
        return "–"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if key.endswith(("_bytes", "bytes_moved")):
        return _scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"])
    if key.endswith("bytes_per_second"):
        return _scaled(value, 1000, [" B/s", " kB/s", " MB/s", " GB/s"])
    if key.endswith("_per_second"):
        unit = key.rpartition(".")[2].removesuffix("_per_second")
        return f"{_scaled(value, 1000, ['', 'k', 'M', 'G'])} {unit}/s"
    if key.endswith("_ms"):
        return f"{value:,.1f} ms"
    if "seconds" in key:
        return f"{value:,.1f} s"
    if key.endswith(("_share", "accuracy")):
        return f"{value:.1%}"
    if key.endswith("loss"):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _scaled(value: float, base: int, names: list[str]) -> str:
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return f"{value:.{1 if power else 0}f}{names[power]}"


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
