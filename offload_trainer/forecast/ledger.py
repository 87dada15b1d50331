"""The ledger: who holds how many bytes in each phase of a run, on the host and on the device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from offload_trainer.files.format import readable

Bytes = Mapping[str, int]
"""What holds memory → how many bytes."""


@dataclass(frozen=True)
class Phase:
    """A part of a run at its fullest moment."""

    name: str
    host: Bytes
    device: Bytes

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True)
class Ledger:
    """Predicted bytes of one process. Phases follow one another, so a peak is that of the largest, not their sum."""

    phases: tuple[Phase, ...]
    disk: Bytes
    """What the run leaves or needs for a while in its output folder."""
    link: Bytes
    """What crosses the link between host and device in a round."""
    on_host: bool
    """The device is the CPU: what it holds is host memory as well."""
    notes: tuple[str, ...] = ()
    """What the figures leave out."""
    rows: int | None = None
    """Rows of a batch that pass through the full master at once: as many as take no more of the device than training
    does, where some do; None: all."""

    def with_larger_process(self, growth: int) -> "Ledger":
        """The ledger of a process that holds so many bytes more by itself."""
        phases = (replace(p, host={**p.host, "process": p.host["process"] + growth}) for p in self.phases)
        return replace(self, phases=tuple(phases))

    def host_bytes(self, phase: Phase) -> int:
        """All that lies in host memory in a phase."""
        return phase.host_bytes + (phase.device_bytes if self.on_host else 0)

    @property
    def host_peak(self) -> Phase:
        return max(self.phases, key=self.host_bytes)

    @property
    def device_peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def host_peak_bytes(self) -> int:
        return self.host_bytes(self.host_peak)

    @property
    def device_peak_bytes(self) -> int:
        return self.device_peak.device_bytes

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "host_peak_bytes": self.host_peak_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "disk_bytes": self.disk_bytes,
            "link_bytes": sum(self.link.values()),
            "host_peak": {"phase": self.host_peak.name, **self.host_peak.host},
            "device_peak": {"phase": self.device_peak.name, **self.device_peak.device},
            "disk": dict(self.disk),
            "link": dict(self.link),
            "phases": {
                phase.name: {"host_bytes": self.host_bytes(phase), "device_bytes": phase.device_bytes}
                for phase in self.phases
            },
            "notes": list(self.notes),
            "rows_through_the_master": self.rows,
        }


def largest(entries: Bytes, count: int = 3) -> str:
    """The entries that hold most, in words."""
    first = sorted(entries.items(), key=lambda entry: -entry[1])[:count]
    return ", ".join(f"{name} {readable(size)}" for name, size in first)
