"""Records of a benchmark: what was measured against what, on which machine, and the file that collects them."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from rich.table import Table

from offload_trainer.errors import UserError
from offload_trainer.files.writing import replace_text

KEY = ("name", "case", "device")
"""What tells two records apart."""


@dataclass(frozen=True)
class Record:
    """One measurement."""

    name: str
    """The benchmark."""
    case: str
    value: float
    """Median over the repeats, in `unit`."""
    unit: str
    ratio: float
    """To `against`. Of speeds, how many times as good, the median over neighbouring repeats; of losses, seconds and
    bytes, this one's divided by the other's."""
    against: str
    device: str
    versions: dict[str, str]
    details: dict[str, Any] = field(default_factory=dict)
    """Numbers behind the ratio, `repeats` among them; `aim`, where there is one, is the ratio to reach."""


@dataclass(frozen=True)
class Setting:
    """Where a benchmark runs, and how large."""

    accelerator: Accelerator
    quick: bool = False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def size(self) -> Literal["quick", "cpu", "cuda"]:
        """Which of a benchmark's sizes: each device gets one on which its matmuls dominate."""
        if self.quick:
            return "quick"
        return "cuda" if self.device.type == "cuda" else "cpu"

    @cached_property
    def machine(self) -> tuple[str, dict[str, str]]:
        """Name of the device, and the versions that made the numbers."""
        precision = self.accelerator.mixed_precision
        name = _device_name(self.device) + ("" if precision == "no" else f", {precision}")
        versions = {"python": platform.python_version(), "torch": torch.__version__, "offload_trainer": _own_version()}
        return name, versions

    def record(
        self,
        name: str,
        case: str,
        value: float,
        unit: str,
        ratio: float,
        against: str,
        *,
        aim: float | None = None,
        **details: Any,
    ) -> Record:
        """A record of this machine. A quick run has a case of its own, and no aim."""
        device, versions = self.machine
        if self.quick:
            case = f"{case} quick"
        elif aim is not None:
            details["aim"] = aim
        return Record(name, case, value, unit, ratio, against, device, versions, details)


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records in a file, none if it does not exist. Raises `UserError` when it cannot be added to."""
    try:
        found = json.loads(file.read_text()) if file.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"--json {file} cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(r, dict) and set(KEY) <= r.keys() for r in found):
        raise UserError(f"--json {file} holds something other than a list of records with {', '.join(KEY)}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"--json {file} cannot be written: its folder must be there, and both writable")
    return found


def merge(file: Path, records: Iterable[Record]) -> None:
    """Add records to a file in place of those of the same name, case and device; it is replaced whole or not at all."""
    new = {tuple(getattr(record, key) for key in KEY): asdict(record) for record in records}
    kept = {tuple(record[key] for key in KEY): record for record in read_records(file)}
    replace_text(file, json.dumps([*(kept | new).values()], indent=1, allow_nan=False) + "\n")


def table(records: Iterable[Record]) -> Table:
    """A table for a terminal."""
    shown = Table("benchmark", "case", "value", "ratio", "aim", "against", box=None)
    for record in records:
        aim = record.details.get("aim")
        value = f"{record.value:.4g} {record.unit}"
        shown.add_row(
            record.name, record.case, value, f"{record.ratio:.3g}", f"{aim:.3g}" if aim else "", record.against
        )
    return shown


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores, threads = os.cpu_count(), torch.get_num_threads()
    used = f"{cores} cores" if threads == cores else f"{threads} of {cores} cores"
    return f"{_cpu_model()}, {used}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _own_version() -> str:
    """With the commit, where this is a checkout: what was measured is the code of then."""
    try:
        version = metadata.version("offload-trainer")
    except metadata.PackageNotFoundError:
        version = "source"  # on the path, but not installed
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return f"{version}+{subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return version
