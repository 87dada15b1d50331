"""Which keep ratio is chosen, what a person is told, and that the run is then held to it."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from offload_trainer import memory
from offload_trainer.config import parse
from offload_trainer.device.link import Link, probe_link
from offload_trainer.files.format import readable
from offload_trainer.forecast import fitting
from offload_trainer.forecast.fitting import DeviceRoom, Verdict, check_keep, choose_keep, largest_keep
from offload_trainer.forecast.ledger import Ledger, Phase
from offload_trainer.forecast.show import Forecast
from offload_trainer.prepare import prepare
from offload_trainer.run import main
from tests.runs import config, metrics

GIB = 2**30


def ledger_at(keep: float) -> Ledger:
    """100 bytes at keep 1, a hundredth of that for each hundredth below, and a reference of 30 more."""
    size = round(100 * keep) + (30 if keep < 1 else 0)
    return Ledger((Phase("training", {"process": 40}, {"subnet": size}),), {"checkpoints": 7}, {}, on_host=False)


# The keep ratio


@pytest.mark.parametrize("room", [*range(25, 140)])
def test_the_largest_ratio_that_fits(room: int) -> None:
    """Against trying every one."""
    fitting = [k / 100 for k in range(1, 101) if ledger_at(k / 100).device_peak_bytes <= room]
    found = largest_keep(lambda keep: ledger_at(keep).device_peak_bytes <= room)
    assert found == max(fitting, default=None)


def test_few_ratios_are_tried() -> None:
    tried: list[float] = []

    def at(keep: float) -> Ledger:
        tried.append(keep)
        return ledger_at(keep)

    decision = choose_keep(at, DeviceRoom(63, "memory.device (63B)"))
    assert decision.keep == 0.33 and decision.verdict is not None and decision.verdict.fits
    assert len(tried) == len(set(tried)) <= 9


def test_why_a_ratio_was_chosen() -> None:
    assert choose_keep(ledger_at, DeviceRoom(63, "memory.device (63B)")).reason == (
        "structure.keep is 0.33, the largest that fits memory.device (63B): it takes 63 B, 0.34 would take 64 B; "
        "most of it: subnet 63 B"
    )
    whole = choose_keep(ledger_at, DeviceRoom(100, "memory.device (100B)"))
    assert (whole.keep, whole.ledger.device_peak_bytes) == (1.0, 100)
    assert whole.reason is not None and "structure.keep is 1, the largest" in whole.reason


def test_what_does_not_fit_is_told_with_what_would() -> None:
    room = DeviceRoom(63, "memory.device (63B)")
    fits = check_keep(ledger_at, 0.33, room, adjustable=True)
    assert fits.reason is None and fits.verdict == Verdict("device", True, "63 B of 63 B, memory.device (63B)")
    assert check_keep(ledger_at, 0.5, None, adjustable=True).verdict is None
    assert check_keep(ledger_at, 0.5, room, adjustable=True).verdict == Verdict(
        "device",
        False,
        "structure.keep (0.5) takes 80 B of device memory (subnet 80 B), 17 B more than memory.device (63B): "
        "at most 0.33 fits",
    )
    by_groups = check_keep(ledger_at, 0.5, room, adjustable=False).verdict
    assert by_groups is not None and by_groups.text.startswith("structure.groups takes 80 B")
    small = DeviceRoom(20, "memory.device (20B)")
    for decision in (choose_keep(ledger_at, small), check_keep(ledger_at, 0.5, small, adjustable=True)):
        assert decision.verdict == Verdict(
            "device",
            False,
            "memory.device (20B) is too small: the smallest plan (structure.keep 0.01) takes 31 B (subnet 31 B)",
        )


def test_on_a_cpu_auto_leaves_room_for_the_host_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "host_available", lambda: 40 * GIB)
    room = fitting.device_room(torch.device("cpu"), "auto", None)
    assert room is not None and room.with_host and room.size == int(0.92 * 50 * GIB)
    phase = Phase("training", {"process": 45 * GIB}, {"subnet": GIB})
    assert room.fits(Ledger((phase,), {}, {}, on_host=True))
    assert not room.fits(Ledger((Phase("training", {"process": 46 * GIB}, {"subnet": GIB}),), {}, {}, on_host=True))
    assert fitting.device_room(torch.device("cpu"), None, None) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fitting.host_room() == 20 * GIB


def test_a_device_smaller_than_memory_device_says_is_the_limit_but_in_a_dry_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "device_available", lambda _: 10 * GIB)
    cuda = torch.device("cuda")
    here = fitting.device_room(cuda, "24GiB", 24 * GIB)
    assert here is not None and here.size == 10 * GIB
    assert here.said == "the 10.0 GiB that the device has free, less than memory.device (24GiB)"
    elsewhere = fitting.device_room(cuda, "24GiB", 24 * GIB, elsewhere=True)
    assert elsewhere is not None and elsewhere.size == 24 * GIB
    smaller = fitting.device_room(cuda, "8GiB", 8 * GIB)
    assert smaller is not None and (smaller.size, smaller.said) == (8 * GIB, "memory.device (8GiB)")


# Host and disk


def test_a_host_that_is_too_small_is_told_what_would_save() -> None:
    phase = Phase("training", {"process": GIB, "master weights": 9 * GIB}, {"subnet": 5 * GIB})
    verdict = fitting.host_verdict(Ledger((phase,), {}, {}, on_host=False), 7 * GIB, {"memory.weights: bf16": 4 * GIB})
    assert verdict == Verdict(
        "host",
        False,
        "host memory: the run needs 10.0 GiB (master weights 9.0 GiB, process 1.0 GiB), 3.0 GiB more than the 7.0 GiB "
        "available: memory.weights: bf16 saves 4.0 GiB",
    )
    shared = fitting.host_verdict(Ledger((phase,), {}, {}, on_host=True), 7 * GIB, {})
    assert "needs 15.0 GiB" in shared.text and shared.text.endswith(
        "a smaller structure.keep saves what the device's side holds"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_what_is_available(version: int, tmp_path: Path) -> None:
    """Whichever of the nested groups leaves least; cached files count as free; `max` and 2⁶³ are no limit."""
    names = (
        ("max", "current", "inactive_file")
        if version == 2
        else ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    )
    top = tmp_path if version == 2 else tmp_path / "memory"
    lines = "0::/a/b\n" if version == 2 else "5:cpu:/elsewhere\n4:memory:/a/b\n0::/unified\n"
    process = tmp_path / "cgroup"
    process.write_text(lines)
    for folder, limit, usage, cached in (
        (top / "a" / "b", "max" if version == 2 else str(2**63 - 4096), 50, 10),
        (top / "a", "1000", 700, 100),
        (top, "5000", 800, 0),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
        (folder / f"memory.{names[1]}").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")
    assert min(memory.left_by_groups(tmp_path, process)) == 1000 - 700 + 100
    assert memory.left_by_groups(tmp_path, tmp_path / "nothing") == []
    assert 0 < memory.host_available() < 2**50


def test_host_peak_is_of_this_process() -> None:
    before = memory.host_peak()
    assert before >= memory.host_bytes() // 2
    block = torch.ones(2**26)  # 256 MiB
    assert memory.host_bytes() >= block.nbytes
    del block
    memory.trim_heap()
    assert memory.host_peak() >= memory.host_bytes()


# The link


def test_the_probed_speed_is_that_of_a_copy() -> None:
    link = probe_link(torch.device("cpu"), nbytes=2**24, repeats=3)
    assert 2e8 < link.to_device < 1e12 and 2e8 < link.to_host < 1e12


@pytest.mark.gpu
def test_the_probed_speed_of_a_gpu() -> None:
    link = probe_link(torch.device("cuda"))
    assert 1e9 < link.to_device < 1e12 and 1e9 < link.to_host < 1e12


# What a person sees


def forecast() -> Forecast:
    host = {"process": GIB, "master weights": 8 * GIB, "master exp_avg": 8 * GIB}
    phases = (
        Phase("load", {"process": GIB, "master weights": 8 * GIB}, {}),
        Phase("forward and backward", host, {"subnet": 2 * GIB, "activations": 3 * GIB}),
    )
    ledger = Ledger(phases, {"checkpoints": 32 * GIB}, {"gathered weights": 2 * GIB, "written weights": GIB}, False)
    verdicts = (Verdict("host", True, "17.0 GiB of 32.0 GiB available"), Verdict("device", False, "is too small " * 9))
    return Forecast(
        ledger, verdicts, "structure.keep is 0.31 " * 5, Link(2e10, 1e10), None, ("figures are of mean size",)
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_forecast_shows_all_of_it_within_the_width(width: int) -> None:
    text = io.StringIO()
    Console(file=text, width=width).print(forecast())
    shown = text.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    for words in (
        "forward and backward      17.0 GiB  ━━━━━━━━━━━━     5.0 GiB  ━━━━━━━━━━━━",
        "load                       9.0 GiB  ━━━━━━╸                –",
        "host in its fullest phase, forward and backward",
        "master weights             8.0 GiB",
        "together                  17.0 GiB",
        "device  does not fit: is too small",
        "host    fits: 17.0 GiB of 32.0 GiB available",
        "ρ       structure.keep is 0.31",
        "link    215 ms a round at the speed of plain copies (20.0 GB/s to the device,",
        "note    figures are of mean size",
    ):
        assert " ".join(words.split()) in " ".join(shown.split()), (words, shown)


def test_bytes_are_readable() -> None:
    assert [readable(n) for n in (0, 1023, 1024, 3 << 20, 5 * GIB, 4000 * GIB)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "3.9 TiB",
    ]


# A run


def fitted(folder: Path, **changes: object) -> tuple[str, int]:
    """A config without a keep ratio, and the device memory that a keep of 0.4 takes."""
    file = str(config(folder, **{"structure": {"groups": {"*mlp*": None, "*attn*": 0.5}, "verify": False}, **changes}))
    run = prepare(parse(["--config", file, "--structure.keep", "0.4", "--out", str(folder / "out")]))
    return file, run.forecast.ledger.device_peak_bytes


def test_the_chosen_ratio_is_the_run_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed, shown in the metrics, kept in the checkpoint, and kept to when the run is resumed."""
    file, size = fitted(tmp_path, **{"structure.settle": 0.5})
    kib = f"{size / 1024 + 0.5:.2f}KiB"
    run = prepare(parse(["--config", file, "--memory.device", kib]))
    chosen = run.config.structure.keep
    assert chosen is not None and 0.4 <= chosen < 0.43  # several ratios round to the same widths
    assert run.config.structure.groups == {"*mlp*": None, "*attn*": 0.5}
    assert run.structure.top()["model.layers.0.mlp"].numel() == round(0.4 * 48)
    assert main(["--config", file, "--memory.device", kib, "--steps", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"structure.keep is {chosen:g}, the largest that fits memory.device ({kib}): it takes" in printed
    records = metrics(tmp_path / "out")
    checkpoint = json.loads(next((tmp_path / "out").glob("checkpoints/step-*8/checkpoint.json")).read_text())
    assert checkpoint["content"]["config"]["structure.keep"] == chosen
    # Twice the memory is there now, or no limit at all: the checkpoint decides.
    for limit in (["--memory.device", f"{size * 2 // 1024}KiB"], []):
        assert main(["--config", file, *limit, "--resume", "auto"]) == 0
        assert "the largest that fits" not in capsys.readouterr().out
    assert [record["keep"] for record in metrics(tmp_path / "out")][:8] == [record["keep"] for record in records]
    assert main(["--config", file, "--memory.device", "1KiB", "--resume", "auto"]) == 2
    assert "memory.device (1KiB) is too small" in capsys.readouterr().err


def test_auto_on_this_machine_takes_all_of_a_tiny_model(tmp_path: Path) -> None:
    file = str(config(tmp_path, structure={}))
    run = prepare(parse(["--config", file, "--memory.device", "auto"]))
    assert run.config.structure.keep == 1 and run.structure.names == ()
    assert run.forecast.reason is not None and "memory.device (auto, 92% of the " in run.forecast.reason


def test_a_dry_run_answers_that_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error: the answer. Nothing is written, and nothing proven that would need memory which is not there."""
    monkeypatch.setattr(memory, "host_available", lambda: 0)
    monkeypatch.setattr(memory, "host_bytes", lambda: 2**20)
    file = str(config(tmp_path))
    assert main(["--config", file, "--dry-run", "--memory.device", "1KiB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "host does not fit: host memory: the run needs" in shown
    assert "device does not fit: memory.device (1KiB) is too small: the smallest plan (structure.keep 0.01)" in shown
    assert "disk fits:" in shown and "ms a round at the speed of plain copies" in shown
    assert not (tmp_path / "out").exists()


def test_a_settled_run_has_no_reference(tmp_path: Path) -> None:
    for settle, there in ((0.5, True), (1.0, False)):
        run = prepare(parse(["--config", str(config(tmp_path, **{"structure.settle": settle}))]))
        assert ("reference" in run.forecast.ledger.device_peak.device) == there
