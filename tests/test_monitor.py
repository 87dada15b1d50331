"""The monitor: what it writes is whole and strict JSON, what it shows fits, and the terminal is left as it was."""

import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from offload_trainer.errors import UserError
from offload_trainer.monitor import Monitor

FULL = Path("/dev/full")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
RECORD = {"round": 1, "loss": 2.5, "val_loss": 2.75, "keep": 0.25, "tokens_per_second": 41234.5}
RECORD |= {"transfer_share": 0.021, "host_bytes": 3 << 30, "device_bytes": 12 << 20}


class Accelerator(SimpleNamespace):
    """As much of accelerate's as the monitor uses."""

    def __init__(self, main: bool = True, trackers: tuple[str, ...] = ()):
        super().__init__(is_main_process=main, trackers=trackers, tracked=[])

    def log(self, values: dict[str, Any], step: int) -> None:
        self.tracked.append((step, values))


def monitor(out: Path, display: str = "plain", accelerator: Accelerator | None = None, width: int = 100, **more: Any):
    """A monitor of 100 steps, and the text it prints."""
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=display == "rich", _environ={"TERM": "xterm-256color"})
    return Monitor(out, 100, "tokens", accelerator or Accelerator(), display, console=console, **more), text  # type: ignore[arg-type]


def lines(out: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


# What it writes


def test_every_record_is_on_disk_at_once(tmp_path: Path):
    mine, _ = monitor(tmp_path)
    with mine:
        for step in (10, 20):
            mine.log({"step": step, "loss": 1 / step})
            assert lines(tmp_path)[-1] == {"step": step, "loss": 1 / step}
    assert len(lines(tmp_path)) == 2


def test_only_strict_json_is_written(tmp_path: Path):
    mine, _ = monitor(tmp_path)
    record = {"a": float("nan"), "b": [float("inf"), 1], "c": torch.tensor(2.0), "d": {"e": torch.tensor(-torch.inf)}}
    with mine:
        mine.log({"step": 1, **record, "f": tmp_path, "g": None, "h": True})
        mine.summary(record)
    plain = {"a": None, "b": [None, 1], "c": 2.0, "d": {"e": None}}
    assert lines(tmp_path) == [{"step": 1, **plain, "f": str(tmp_path), "g": None, "h": True}]
    assert json.loads((tmp_path / "summary.json").read_text()) == plain
    assert not list(tmp_path.glob("*.tmp"))


def test_new_run_replaces_and_resumed_run_continues(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 40, "lo')  # cut off while being written
    mine, _ = monitor(tmp_path, first_step=20)
    with mine:
        mine.log({"step": 25})
    assert [record["step"] for record in lines(tmp_path)] == [10, 20, 25]
    mine, _ = monitor(tmp_path)
    with mine:
        mine.log({"step": 5})
    assert [record["step"] for record in lines(tmp_path)] == [5]


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe{}", b"\0\0\0\0\0", b"[1, 2]", b"7", b'{"loss": 1}', b'{"step": "ten", "loss": 1}', b'{"step": null}'],
)
def test_what_is_no_record_is_left_out_of_a_resumed_run(line: bytes, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10}\n' + line + b'\n{"step": 20, "loss": NaN}\n')
    mine, _ = monitor(tmp_path, "rich", first_step=20)
    with mine:
        mine.log({"step": 25})
    assert lines(tmp_path) == [{"step": 10}, {"step": 20, "loss": None}, {"step": 25}]


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_and_closing_says_nothing_more(tmp_path: Path):
    mine, _ = monitor(tmp_path)
    said = f"cannot write {tmp_path}/metrics.jsonl: No space left on device; checkpoints and earlier records are kept"
    with pytest.raises(UserError, match=re.escape(said)), mine:
        mine.log({"step": 10})
        mine.file.close()
        mine.file = FULL.open("a")
        mine.log({"step": 20})
    assert mine.file.closed
    assert lines(tmp_path) == [{"step": 10}]


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path):
    with FULL.open("w", buffering=1) as log:
        mine = Monitor(tmp_path, 100, "tokens", Accelerator(), "plain", console=Console(file=log))  # type: ignore[arg-type]
        with mine:
            for step in (1, 2):
                mine.log({"step": step, "loss": 1.0})
            mine.summary({"steps": 2})
        assert [record["step"] for record in lines(tmp_path)] == [1, 2]
        assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 2}
        with suppress(OSError):
            log.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # so that it can be closed


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    mine, _ = monitor(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No such file or directory"), mine:
        pass


def test_summary_replaces_whole_or_not_at_all(tmp_path: Path):
    mine, _ = monitor(tmp_path)
    with mine:
        mine.summary({"loss": 1})
        with pytest.raises(UserError, match=r"cannot write .*summary.json: No such file"):
            mine.out = tmp_path / "nowhere"
            mine.summary({"loss": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 1}


def test_trackers_get_the_numbers(tmp_path: Path):
    accelerator = Accelerator(trackers=("tensorboard",))
    mine, _ = monitor(tmp_path, accelerator=accelerator)
    with mine:
        mine.log({"step": 3, "loss": 1.5, "difference": None, "note": "text", "bad": float("nan")})
    assert accelerator.tracked == [(3, {"step": 3, "loss": 1.5})]


@pytest.mark.parametrize("display", ["plain", "rich"])
def test_other_processes_write_and_print_nothing(display: str, tmp_path: Path):
    mine, text = monitor(tmp_path, display, Accelerator(main=False, trackers=("tensorboard",)))
    with mine:
        mine.log({"step": 1, **RECORD})
        mine.show(torch.rand(9))
        mine.message("hello")
        mine.summary({"loss": 1})
    assert not list(tmp_path.iterdir()) and not text.getvalue() and not mine.accelerator.tracked


# What it shows


def test_plain_lines(tmp_path: Path):
    mine, text = monitor(tmp_path, width=40)
    with mine:
        mine.message("[resumed] " + "x" * 60)
        mine.log({"step": 50, **RECORD})
        mine.log({"step": 60, "loss": None})
        mine.show(torch.rand(9))
        mine.summary({"exported": {"loss": 1.25, "parameters": 12345}, "steps": 100})
    first, second, third, *table = text.getvalue().splitlines()
    assert first == "[resumed] " + "x" * 60  # neither wrapped nor taken as markup
    assert second.startswith("step 50/100  loss 2.5000  val loss 2.7500  ρ 0.25  round 1  41.2k tokens/s")
    assert "between rounds 2.1%  host 3.0 GiB  device 12.0 MiB  left 0:00:0" in second
    assert third.startswith("step 60/100  loss –  left ")
    assert [line.split() for line in table] == [
        ["run", "steps", "100"],
        ["exported", "loss", "1.2500"],
        ["parameters", "12,345"],
    ]


def test_measured_memory_stands_beside_predicted(tmp_path: Path):
    mine, text = monitor(tmp_path)
    predicted = {"host_peak_bytes": 4 << 30, "disk_bytes": 9, "phases": {"load": {"host_bytes": 7}}}
    measured = {"host_peak_bytes": 3 << 30, "device_held_bytes": 1 << 20}
    with mine:
        mine.summary({"ledger": {"predicted": predicted, "measured": measured}, "steps": 7})
    assert [line.rstrip() for line in text.getvalue().splitlines()] == [
        "run      steps         7",
        "memory   host peak     3.0 GiB, 4.0 GiB predicted (×0.75)",
        "         device held   1.0 MiB",
    ]


@pytest.mark.parametrize("width", [60, 100])
def test_live_view_shows_all_of_it_within_the_width(width: int, tmp_path: Path):
    mine, text = monitor(tmp_path, "rich", width=width)
    with mine:
        for step in range(1, 51):
            mine.log({"step": step, **RECORD, "loss": 5 / step})
        mine.show(torch.cat([torch.zeros(64), torch.full((16,), 0.5), torch.ones(1)]))
        mine.message("hello")
        mine.live.refresh()  # type: ignore[union-attr]
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    frame = shown[shown.rindex("╭") : shown.rindex("╯") + 1]
    assert all(len(line) <= width for line in frame.splitlines())
    for words in ("step 50 of 100", "50%", "0.1000", "2.7500", "0.25", "41.2k tokens/s", "2.1%", "3.0 GiB", "12.0 MiB"):
        assert words in frame
    assert "hello" in shown[: shown.rindex("╭")]
    histogram = [line for line in frame.splitlines() if "│" in line][-3]
    assert re.search(r"█ +█ +▁|█ {19}█ {18}▃", histogram.replace("│", "")), histogram


def test_live_view_before_the_first_record(tmp_path: Path):
    mine, text = monitor(tmp_path, "rich")
    with mine:
        pass
    assert "step 0 of 100" in text.getvalue() and "? left" in text.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_terminal_is_left_as_it_was(error: type[BaseException], tmp_path: Path):
    mine, text = monitor(tmp_path, "rich")
    with pytest.raises(error), mine:
        mine.log({"step": 1, **RECORD})
        raise error
    assert text.getvalue().count(HIDE) == text.getvalue().count(SHOW) == 1
    assert mine.file.closed


def test_display_is_chosen_by_the_terminal(tmp_path: Path):
    def shows_live(terminal: bool, display: str = "auto", term: str = "xterm") -> bool:
        console = Console(file=io.StringIO(), force_terminal=terminal, _environ={"TERM": term})
        return Monitor(tmp_path, 1, "images", Accelerator(), display, console=console).live is not None  # type: ignore[arg-type]

    assert shows_live(terminal=True)
    assert not shows_live(terminal=False)
    assert not shows_live(terminal=True, term="dumb")
    assert not shows_live(terminal=True, display="plain")
    assert shows_live(terminal=False, display="rich")
