"""Whether a run fits host, device and disk, and which keep ratio makes it fit: told before anything is allocated."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from offload_trainer import memory
from offload_trainer.device.processes import local_processes
from offload_trainer.errors import UserError
from offload_trainer.files.format import readable
from offload_trainer.forecast.ledger import Bytes, Ledger, largest
from offload_trainer.master.checkpoint import followed

GRID = 100
"""Keep ratios that are chosen are whole multiples of a hundredth."""

USABLE = 0.92
"""Share of the free memory that `memory.device: auto` takes: forecasts may be 5% too low, and an allocator has gaps."""

LedgerAt = Callable[[float], Ledger]
"""Keep ratio → the ledger of a run at it."""


@dataclass(frozen=True)
class DeviceRoom:
    """Device memory that the run may take."""

    size: int
    said: str
    """How the user knows it: `memory.device (8GiB)`."""
    with_host: bool = False
    """The device is the CPU and may take what there is: what the host side takes comes out of it as well."""

    def need(self, ledger: Ledger) -> int:
        return ledger.host_peak_bytes if self.with_host else ledger.device_peak_bytes

    def holders(self, ledger: Ledger) -> Bytes:
        """What makes up the need."""
        if not self.with_host:
            return ledger.device_peak.device
        return {**ledger.host_peak.host, **ledger.host_peak.device}

    def fits(self, ledger: Ledger) -> bool:
        return self.need(ledger) <= self.size


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits one place."""

    place: str
    fits: bool
    text: str
    """One line; where it does not fit, a whole error message."""


@dataclass(frozen=True)
class Decision:
    """The keep ratio of a run, and what it takes."""

    keep: float
    ledger: Ledger
    verdict: Verdict | None
    """Of the device; None where its memory is not limited."""
    reason: str | None = None
    """Why this ratio, in one line, where it was chosen here."""


def choose_keep(ledger_at: LedgerAt, room: DeviceRoom) -> Decision:
    """The largest keep ratio that fits the device's room; where none does, the smallest and a verdict that says so."""
    at = cache(ledger_at)
    keep = largest_keep(lambda ratio: room.fits(at(ratio)))
    if keep is None:
        return Decision(1 / GRID, at(1 / GRID), Verdict("device", False, _too_small(room, at)))
    need, holders = room.need(at(keep)), largest(room.holders(at(keep)))
    reason = f"structure.keep is {keep:g}, the largest that fits {room.said}: it takes {readable(need)}"
    if keep < 1:
        above = round(keep + 1 / GRID, 2)
        reason += f", {above:g} would take {readable(room.need(at(above)))}"
    return Decision(keep, at(keep), _fitting(room, at(keep)), f"{reason}; most of it: {holders}")


def check_keep(ledger_at: LedgerAt, keep: float, room: DeviceRoom | None, *, adjustable: bool) -> Decision:
    """A run at a given keep ratio. `adjustable`: some group follows `structure.keep`, so that another could help."""
    at = cache(ledger_at)
    ledger = at(keep)
    if room is None or room.fits(ledger):
        return Decision(keep, ledger, room and _fitting(room, ledger))
    best = largest_keep(lambda ratio: room.fits(at(ratio))) if adjustable else None
    if adjustable and best is None:
        return Decision(keep, ledger, Verdict("device", False, _too_small(room, at)))
    need = room.need(ledger)
    what, help = (
        (f"structure.keep ({keep:g})", f"at most {best:g} fits")
        if adjustable
        else ("structure.groups", "lower its ratios")
    )
    text = (
        f"{what} takes {readable(need)} of device memory ({largest(room.holders(ledger))}), "
        f"{readable(need - room.size)} more than {room.said}: {help}"
    )
    return Decision(keep, ledger, Verdict("device", False, text))


def largest_keep(fits: Callable[[float], bool]) -> float | None:
    """The largest ratio of the grid that fits; None if even the smallest does not.

    1 is asked apart: nothing is sampled then, so there is no reference, and it may take less than the ratio below it.
    """
    if fits(1.0):
        return 1.0
    low, high = 0, GRID  # low fits (or is none), high does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle / GRID):
            low = middle
        else:
            high = middle
    return low / GRID if low else None


def host_room() -> int:
    """Bytes of host memory that this process may take in all, what it holds already included.

    What is available is shared with the other processes of the run on this machine.
    """
    return memory.host_bytes() + memory.host_available() // local_processes()


def device_room(
    device: torch.device, asked: str | None, size: int | None, *, elsewhere: bool = False
) -> DeviceRoom | None:
    """What the device may hold.

    asked: `memory.device` as the config says it, and its `size` in bytes unless that is auto or null. Null means what
    is free, or no limit on a CPU, where the host's room is the limit. elsewhere: a size is of a device that may not be
    this one, as in a dry run; else what is free here is the limit where it is less.
    """
    free = memory.device_available(device)
    if size is not None:
        if elsewhere or free is None or free >= size:
            return DeviceRoom(size, f"memory.device ({asked})")
        return DeviceRoom(free, f"the {readable(free)} that the device has free, less than memory.device ({asked})")
    if asked == "auto":
        there = host_room() if free is None else free
        said = f"memory.device (auto, {USABLE:.0%} of the {readable(there)} available)"
        return DeviceRoom(int(USABLE * there), said, with_host=free is None)
    return None if free is None else DeviceRoom(free, f"the {readable(free)} that the device has free")


def host_verdict(ledger: Ledger, size: int, savings: Mapping[str, int]) -> Verdict:
    """`size`: bytes that this process may take in all. `savings`: option → bytes that it would save."""
    need, phase = ledger.host_peak_bytes, ledger.host_peak.name
    if need <= size:
        return Verdict("host", True, f"{readable(need)} of {readable(size)} available, most in: {phase}")
    processes = local_processes()
    each = f"each of {processes} processes needs" if processes > 1 else "the run needs"
    options = [f"{option} saves {readable(saved)}" for option, saved in savings.items()]
    options += ["a smaller structure.keep saves what the device's side holds"] if ledger.on_host else []
    return Verdict(
        "host",
        False,
        f"host memory: {each} {readable(need)} ({largest(ledger.host_peak.host)}), {readable(need - size)} more than "
        f"the {readable(size)} available: {', '.join(options) or 'no option is left that saves any'}",
    )


def disk_verdicts(ledger: Ledger, there: Path, out: str, mapped: Path | None) -> Iterator[Verdict]:
    """Of the disk of the output folder (`there`: that, or the part of its path that exists), and of the one that the
    master is `mapped` from, which may be the same."""
    need = dict(ledger.disk)
    apart = mapped is not None and mapped.exists() and mapped.stat().st_dev != there.stat().st_dev
    if mapped is not None and apart:
        own = {"mapped master": need.pop("mapped master")}
        yield _disk_verdict(own, mapped, f"memory.folder ({mapped})", "make room, or choose another disk")
    yield _disk_verdict(need, there, f"out ({out})", "make room, or lower checkpoint.keep_last")


def _disk_verdict(needs: Mapping[str, int], folder: Path, key: str, advice: str) -> Verdict:
    need, free = sum(needs.values()), shutil.disk_usage(folder).free
    if need <= free:
        return Verdict("disk", True, f"{readable(need)} of {readable(free)} free")
    return Verdict(
        "disk",
        False,
        f"{key}: the run writes {readable(need)} ({largest(needs)}), {readable(need - free)} more than the "
        f"{readable(free)} free: {advice}",
    )


def require(verdicts: Iterable[Verdict]) -> None:
    """Raise `UserError` with the first that says no."""
    for verdict in verdicts:
        if not verdict.fits:
            raise UserError(verdict.text)


def require_writable(out: Path, *, make: bool) -> None:
    """Raise unless files can be made in `out`. make: try it, in a new folder if need be; else nothing is touched."""
    try:
        if make:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"out ({out}) must be a folder that can be written: {there} is none")
        for name in ("checkpoints", "export", "full"):
            if (out / name).exists() and not (out / name).is_dir():
                raise UserError(f"out ({out}): {name} in it must be a folder, it is a file")
        if (out / "checkpoints").is_symlink() and not (out / "checkpoints").exists():
            raise UserError(f"out ({out}): checkpoints in it must be a folder, it is a link to nothing")
        for name in ("export", "full"):
            place = followed(out / name)
            if os.path.ismount(place) or (out.exists() and not os.access(place.parent, os.W_OK)):
                raise UserError(
                    f"out ({out}): {name} in it, which is replaced as a whole, must be a folder within one that can be"
                    f" written; it is {place}"
                )
        for name in ("metrics.jsonl", "summary.json"):
            if (out / name).is_dir():
                raise UserError(f"out ({out}): {name} in it must be a file, it is a folder")
    except OSError as error:
        raise UserError(f"out ({out}) must be a folder that can be written: {error.strerror or error}") from error


def require_disk(folder: Path) -> None:
    """Raise unless a master can be mapped from files in a folder: it can be written, and is no memory itself."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"memory.folder ({folder}) must be a folder that can be written: {error.strerror or error}"
        ) from error
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[at] for at in (folder.resolve(), *folder.resolve().parents) if at in mounts), "")
    if kind in ("tmpfs", "ramfs"):
        raise UserError(f"memory.folder ({folder}) must be on a disk: it is on a {kind}, which is memory itself")


def _fitting(room: DeviceRoom, ledger: Ledger) -> Verdict:
    return Verdict("device", True, f"{readable(room.need(ledger))} of {readable(room.size)}, {room.said}")


def _too_small(room: DeviceRoom, at: LedgerAt) -> str:
    smallest = at(1 / GRID)
    return (
        f"{room.said} is too small: the smallest plan (structure.keep {1 / GRID:g}) takes "
        f"{readable(room.need(smallest))} ({largest(room.holders(smallest))})"
    )
