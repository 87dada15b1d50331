"""Whole runs, as a user starts them."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from offload_trainer import Offloader, find_groups
from offload_trainer.config import parse
from offload_trainer.master import find_checkpoint
from offload_trainer.prepare import prepare
from offload_trainer.result import load_export
from offload_trainer.run import INTERRUPTED, main
from offload_trainer.tasks import build_task
from tests import runs
from tests.runs import EXPERTS, LLAMA, ROOT, TWO_LAYERS, config, custom, images, launch, metrics

EXPECTED_METRICS = {
    *("step", "round", "loss", "keep", "tokens_per_second", "gather_ms", "writeback_ms"),
    *("delta_norm", "host_bytes", "device_bytes"),
}


def test_the_quickstart_command_in_a_short_form(tmp_path: Path) -> None:
    """README's own command line, a few rounds of it: real data, real `accelerate launch`, a loadable export."""
    text = (ROOT / "README.md").read_text()
    command = re.search(r"&& (accelerate launch offload_trainer/run.py --config \S+)", text)
    assert command is not None
    program = command.group(1).split()
    short = ["--steps", "6", "--sync_every", "3", "--structure.paired_batches", "1", "--task.batch_size", "2"]
    short += ["--task.val_batches", "1", "--track.log_every", "2", "--out", str(tmp_path / "out")]
    done = launch(*program, *short)
    assert done.returncode == 0, done.stderr
    records = metrics(tmp_path / "out")
    assert [record["step"] for record in records] == [2, 4, 6]
    assert set(records[0]) >= EXPECTED_METRICS
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 2 < summary["exported"]["loss"] < 6
    assert set(summary["seconds"]) >= {"train", "gather", "writeback", "reference", "evaluation"}
    assert set(summary["ledger"]) == {"predicted", "measured"}
    assert summary["exported"]["parameters"] < summary["full_master"]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export")
    assert sum(p.numel() for p in model.parameters()) == summary["exported"]["parameters"]


def test_the_export_computes_what_the_final_subnet_computes(tmp_path: Path) -> None:
    """Through transformers, and through `load_export`, against the master of the last checkpoint."""
    file = config(tmp_path, **TWO_LAYERS)
    assert main(["--config", str(file)]) == 0
    out = tmp_path / "out"
    task = build_task(parse(["--config", str(file)]).task, 0)
    exported = AutoModelForCausalLM.from_pretrained(out / "export").eval()
    groups = find_groups(task.model, task.example_inputs)
    plan = json.loads((out / "export" / "plan.json").read_text())["kept"]
    master = load_file(out / "checkpoints" / "step-00000012" / "weights.safetensors")
    for name, tensor in exported.state_dict().items():
        if name == "lm_head.weight":  # tied
            name = "model.embed_tokens.weight"
        full = master[name]
        for group in groups:
            for slot in group.slots:
                if slot.tensor == name:
                    units = torch.tensor(plan[group.name])
                    picked = (units[:, None] * slot.block + torch.arange(slot.block)).flatten() + slot.offset
                    full = full.index_select(slot.axis, picked)
        assert torch.equal(full, tensor), name
    summary = json.loads((out / "summary.json").read_text())
    with torch.no_grad():
        losses = [task.metrics_fn(exported, batch)["loss"] for batch in task.val]
    assert float(torch.stack(losses).mean()) == pytest.approx(summary["exported"]["loss"], rel=1e-5)


def test_resume_on_the_command_line_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """With evaluations, a settled end and a schedule of the learning rate in between."""
    changes = {"track.eval_every": 4, "structure.settle": 0.4, "optimizer.warmup_steps": 2}
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, parts = config(tmp_path / "whole", **changes), config(tmp_path / "parts", **changes)
    assert main(["--config", str(whole)]) == 0
    assert main(["--config", str(parts)]) == 0
    for newer in ("step-00000012",):  # as if it had been killed after step 8
        for path in (tmp_path / "parts" / "out" / "checkpoints" / newer).iterdir():
            path.unlink()
        (tmp_path / "parts" / "out" / "checkpoints" / newer).rmdir()
    assert main(["--config", str(parts), "--resume", "auto"]) == 0
    one, two = (metrics(tmp_path / run / "out") for run in ("whole", "parts"))
    for key in ("step", "round", "loss", "keep", "delta_norm", "val_loss"):
        assert [r.get(key) for r in one] == [r.get(key) for r in two], key
    ends = [tmp_path / run / "out" / "checkpoints" / "step-00000012" for run in ("whole", "parts")]
    for file in ends[0].glob("*.safetensors"):
        assert file.read_bytes() == (ends[1] / file.name).read_bytes(), file.name


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["int", "term", "kill"])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, stop: signal.Signals) -> None:
    """Ctrl-C and SIGTERM keep the last whole round; after SIGKILL there is the last checkpoint."""
    whole = str(config(tmp_path, steps=400, **custom("blobs")))
    out = tmp_path / "out"
    command = [sys.executable, "offload_trainer/run.py", "--config", whole, "--checkpoint.every", "40"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "checkpoints" / "step-00000040").exists():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    running.send_signal(stop)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == (130 if stop != signal.SIGKILL else -signal.SIGKILL)
    assert ("broken off; --resume auto goes on from step" in printed) == (stop != signal.SIGKILL)
    steps = [record["step"] for record in metrics(out)]
    assert steps == list(range(1, len(steps) + 1)) and 40 <= len(steps) < 400
    end = str(len(steps) + 8)
    assert main(["--config", whole, "--resume", "auto", "--steps", end, "--optimizer.schedule", "constant"]) == 0
    assert [record["step"] for record in metrics(out)] == list(range(1, int(end) + 1))
    assert not list((out / "checkpoints").glob(".writing-*"))


def test_an_interrupt_in_the_last_step_of_a_round_leaves_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a validation is due after it, which the resumed run makes up for."""
    step = Offloader.step

    def interrupted(self: Offloader) -> None:
        step(self)
        if self.steps == 8:
            signal.raise_signal(signal.SIGTERM)

    file = str(config(tmp_path, **custom("blobs"), **{"track.eval_every": 4}))
    with monkeypatch.context() as once:
        once.setattr(Offloader, "step", interrupted)
        assert main(["--config", file]) == INTERRUPTED
    assert [record["step"] for record in metrics(tmp_path / "out")] == [0, *range(1, 9)]
    assert main(["--config", file, "--resume", "auto"]) == 0
    assert main(["--config", file, "--out", str(tmp_path / "whole")]) == 0
    parts, whole = (metrics(tmp_path / out) for out in ("out", "whole"))
    seen, expected = ({r["step"]: r["val_loss"] for r in run if "val_loss" in r} for run in (parts, whole))
    assert seen == expected and 8 in seen
    assert [r["train_seconds"] for r in parts] == sorted(r["train_seconds"] for r in parts)


def test_what_somebody_put_beside_an_export_is_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = str(config(tmp_path, **custom("blobs"))), tmp_path / "out"
    assert main(["--config", file]) == main(["--config", file]) == 0
    assert not list(out.glob("export-*")) and "export-earlier" not in capsys.readouterr().out
    (out / "export" / "README.md").write_text("mine")
    assert main(["--config", file]) == 0
    assert (out / "export-earlier-1" / "README.md").read_text() == "mine" and (out / "export" / "plan.json").is_file()
    assert "export-earlier-1" in capsys.readouterr().out


def test_a_new_run_does_not_begin_with_the_summary_of_another(tmp_path: Path) -> None:
    file, out = str(config(tmp_path, **custom("blobs"))), tmp_path / "out"
    assert main(["--config", file]) == 0
    assert main(["--config", file, "--optimizer.lr", "1e30", "--optimizer.schedule", "constant"]) == 2
    assert not (out / "summary.json").exists()


def test_parts_of_a_batch_make_the_same_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, losses = str(config(tmp_path, **{"structure.paired_batches": 2})), []
    for parts in ("1", "2"):
        out = tmp_path / parts
        assert main(["--config", file, "--micro_batches", parts, "--out", str(out)]) == 0
        losses.append([record["loss"] for record in metrics(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    capsys.readouterr()
    assert main(["--config", file, "--micro_batches", "3"]) == 2
    line = "task.batch_size (4) must be divisible by the number of processes times micro_batches (3)"
    assert line in capsys.readouterr().err


def test_calibration_takes_batches_in_the_same_parts(tmp_path: Path) -> None:
    """But one that cannot be parted evenly whole: nothing stops a run at its end."""
    prepared = prepare(parse(["--config", str(config(tmp_path)), "--micro_batches", "2"]))
    batches = [prepared.local(step) for step in (0, 1)]
    parts = prepared.parts(range(2))
    assert [len(part) for part in parts] == [len(batches[0]) // 2] * 4
    assert torch.equal(torch.cat(parts), torch.cat(batches))
    odd = replace(prepared, task=replace(prepared.task, train=[batches[0][:3]]))
    assert [len(part) for part in odd.parts([0])] == [3]


def test_a_last_batch_that_does_not_divide_is_taken_whole(tmp_path: Path) -> None:
    """As a loader has one at the end of an epoch."""
    losses = []
    for parts in ("4", "1"):
        file = str(config(tmp_path, steps=3, **custom("wrong", part="odd end")))
        assert main(["--config", file, "--micro_batches", parts, "--out", str(tmp_path / parts)]) == 0
        losses.append([record["loss"] for record in metrics(tmp_path / parts)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_needs_its_batch_whole_gets_it(tmp_path: Path) -> None:
    """Of the master's evaluation too, whatever it takes."""
    file = config(tmp_path, **custom("paired_rows"), **{"structure.keep": 0.1})
    assert main(["--config", str(file)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["full_master"]["loss"] > 0
    phases = summary["ledger"]["predicted"]["phases"]
    assert phases["master evaluated"]["device_bytes"] > phases["forward and backward"]["device_bytes"]


def test_validation_takes_no_more_rows_at_once_than_training(tmp_path: Path) -> None:
    file, losses, device = str(config(tmp_path, **{"task.batch_size": 8, "track.eval_every": 4})), [], []
    for parts in ("1", "8"):
        out = tmp_path / parts
        assert main(["--config", file, "--micro_batches", parts, "--out", str(out)]) == 0
        losses.append([record["val_loss"] for record in metrics(out) if "val_loss" in record])
        phases = json.loads((out / "summary.json").read_text())["ledger"]["predicted"]["phases"]
        device.append(phases["subnet evaluated"]["device_bytes"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert device[1] < 0.7 * device[0]


@pytest.mark.parametrize("norm", [False, True])
def test_validation_leaves_training_and_its_loader_alone(tmp_path: Path, norm: bool) -> None:
    """Whatever it draws; and batches are not read anew after each."""
    file, losses = str(config(tmp_path, **custom("counted", norm=norm), steps=40)), []
    for every in ("0", "4"):
        runs.Counted.read = 0
        assert main(["--config", file, "--track.eval_every", every, "--out", str(tmp_path / every)]) == 0
        losses.append([record["loss"] for record in metrics(tmp_path / every) if record["step"]])
        assert runs.Counted.read <= 4 * (40 + 2 * 100 + 20), "batches were read again and again"
    assert losses[0] == losses[1]


def test_recomputed_activations_train_the_same_and_take_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, losses, device = str(config(tmp_path, **TWO_LAYERS, **{"task.sequence": 64})), [], []
    for way in ("false", "true"):
        out = tmp_path / way
        assert main(["--config", file, "--memory.recompute", way, "--out", str(out)]) == 0
        losses.append([record["loss"] for record in metrics(out)])
        phases = json.loads((out / "summary.json").read_text())["ledger"]["predicted"]["phases"]
        device.append(phases["forward and backward"]["device_bytes"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert device[1] < 0.9 * device[0]
    capsys.readouterr()
    blobs = str(config(tmp_path, **custom("blobs")))
    assert main(["--config", blobs, "--memory.recompute", "true"]) == 2
    assert "memory.recompute (true) needs a model of transformers that offers it" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder, and two real processes on gloo: a run that cannot be; one in `two` of which each has half a batch."""
    folder = tmp_path_factory.mktemp("processes")
    file = str(config(folder, **{"structure.settle": 0.3, "track.eval_every": 4, "task.val_batches": 1}))
    words = ["--config", file, "--task.batch_size", "3", "--", "--config", file, "--out", str(folder / "two")]
    return folder, launch("torchrun", "--nproc_per_node", "2", "-m", "tests.several", *words)


def test_processes_that_call_other_experts_agree_on_what_they_are_worth(tmp_path: Path) -> None:
    """The batches of one reach a layer that those of the other never do."""
    keys = {"structure.rules": EXPERTS, "structure.start": "importance", "structure.verify": False}
    file = str(config(tmp_path, **custom("sorted_experts"), **keys, **{"steps": 4, "track.structure_every": 4}))
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    assert main(["--config", file, "--out", one]) == 0
    program = str(ROOT / "offload_trainer" / "run.py")
    done = launch("torchrun", "--nproc_per_node", "2", program, "--config", file, "--out", two, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    pictures = [metrics(Path(out))[3]["structure"] for out in (one, two)]
    for name in EXPERTS:
        assert pictures[0][name]["s"] == pytest.approx(pictures[1][name]["s"], abs=1e-5), name


def test_two_processes_give_the_losses_of_one(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = two_processes
    assert done.returncode == 0 and done.stdout.count("exit code 0") == 2, done.stderr
    file, one, two = (str(folder / name) for name in ("tiny.yaml", "one", "two"))
    assert main(["--config", file, "--out", one]) == 0
    (start, *firsts), (other, *seconds) = metrics(Path(one)), metrics(Path(two))
    assert other["val_loss"] == pytest.approx(start["val_loss"], rel=1e-4)
    for first, second in zip(firsts, seconds, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["delta_norm"] == pytest.approx(first["delta_norm"], rel=1e-3)
        assert ("val_loss" in second) == ("val_loss" in first) == (first["step"] in (4, 8))
        assert second.get("val_loss", 0) == pytest.approx(first.get("val_loss", 0), rel=1e-4)
    # On as many processes as divide the batch, from any checkpoint.
    further = ["--config", file, "--resume", "auto", "--steps", str(firsts[-1]["step"] + 4)]
    for out in (one, two):
        assert main([*further, "--out", out]) == 0
    (end, *more), (other, *others) = (metrics(Path(out))[len(firsts) + 1 :] for out in (one, two))
    assert end["step"] == other["step"] == firsts[-1]["step"]  # is validated now that it is not the last any more
    assert other["val_loss"] == pytest.approx(end["val_loss"], rel=1e-4)
    assert [record["loss"] for record in others] == pytest.approx([record["loss"] for record in more], rel=1e-4)
    assert len(more) == 4


def test_what_all_processes_hold_alike_stays_as_it_is(tmp_path: Path) -> None:
    """A sum of two would be infinite."""
    file, program = str(config(tmp_path, **custom("tables"))), str(ROOT / "offload_trainer" / "run.py")
    done = launch("torchrun", "--nproc_per_node", "2", program, "--config", file, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    weights, model = find_checkpoint(tmp_path / "out" / "checkpoints").read("weights"), runs.Tables()
    assert torch.equal(weights["least"], model.least) and torch.equal(weights["table"], model.table)
    assert not torch.equal(weights["norm.running_mean"], model.norm.running_mean)


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    """The second of two is interrupted: both end in order, and the last whole round is kept."""
    file = str(config(tmp_path, **custom("blobs"), **{"steps": 100_000, "checkpoint.every": 0}))
    program = str(Path(sys.executable).with_name("torchrun"))
    words = [program, "--nproc_per_node", "2", str(ROOT / "offload_trainer" / "run.py"), "--config", file]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=PIPE, stderr=PIPE, text=True, env=os.environ | settings) as both:
        log = tmp_path / "out" / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 30:
            assert both.poll() is None, both.stderr.read() if both.stderr else ""
            time.sleep(0.2)
        ranks = psutil.Process(both.pid).children()
        second = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
        second.send_signal(signal.SIGTERM)
        _, said = both.communicate(timeout=120)
    assert said.count("interrupted\n") == 2, said
    step = find_checkpoint(tmp_path / "out" / "checkpoints").meta["step"]
    steps = [record["step"] for record in metrics(tmp_path / "out")]
    assert steps == list(range(1, len(steps) + 1)) and step == steps[-1] // 4 * 4 > 0
    assert main(["--config", file, "--resume", "auto", "--steps", str(step + 4)]) == 0


def test_processes_that_do_not_divide_the_batch_are_told_so(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = two_processes
    assert done.stdout.count("exit code 2") == 2, done.stderr
    for error in ("error", "error (rank 1)"):
        assert f"{error}: task.batch_size (3) must be divisible by the number of processes (2)" in done.stderr


def test_dry_run_prints_groups_and_ledger_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config(tmp_path, **TWO_LAYERS)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for word in ("residual", "model.layers.{0-1}.mlp", "activations", "weights", "together"):
        assert word in printed
    assert not (tmp_path / "out").exists()


def test_groups_by_hand_are_the_traced_ones(tmp_path: Path) -> None:
    """A run with the traced groups written out as rules in the config is the same run."""
    file = config(tmp_path, **TWO_LAYERS)
    task = build_task(parse(["--config", str(file)]).task, 0)
    groups = find_groups(task.model, task.example_inputs)
    rules = {group.name: [str(slot) for slot in group.slots] for group in groups}
    assert main(["--config", str(file), "--out", str(tmp_path / "traced")]) == 0
    by_hand = config(tmp_path, **TWO_LAYERS, **{"structure.rules": rules})
    assert main(["--config", str(by_hand), "--out", str(tmp_path / "hand")]) == 0
    one, two = metrics(tmp_path / "traced"), metrics(tmp_path / "hand")
    assert [record["loss"] for record in one] == [record["loss"] for record in two]


def test_widths_without_a_config_are_said_and_still_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uneven = {"structure.sampler": "bernoulli", "structure.budget": "global", "seed": 1}
    file = config(tmp_path, **TWO_LAYERS, **uneven)
    assert main(["--config", str(file)]) == 0
    export = tmp_path / "out" / "export"
    assert "there is no config.json" in capsys.readouterr().out
    assert not (export / "config.json").exists()
    task = build_task(parse(["--config", str(file)]).task, 0)
    groups = find_groups(task.model, task.example_inputs)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(task.model.config)  # real: rotary frequencies are not saved
    module = load_export(export, whole, groups)
    with torch.no_grad():
        losses = [task.metrics_fn(module, batch)["loss"] for batch in task.val]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert float(torch.stack(losses).mean()) == pytest.approx(summary["exported"]["loss"], rel=1e-5)


def test_a_config_that_computes_something_else_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma scales its embeddings by the square root of hidden_size: a smaller hidden_size is another model."""
    gemma = {**LLAMA, "model_type": "gemma", "pad_token_id": 0, "num_hidden_layers": 1}
    whole = config(tmp_path, **{"task.model": gemma, "steps": 4})
    assert main(["--config", str(whole)]) == 0
    assert "there is no config.json" in capsys.readouterr().out
    assert not (tmp_path / "out" / "export" / "config.json").exists()
    heads = config(tmp_path, **{"task.model": gemma, "steps": 4, "structure": {"groups": {"model.layers*": 0.5}}})
    assert main(["--config", str(heads), "--out", str(tmp_path / "heads")]) == 0
    assert (tmp_path / "heads" / "export" / "config.json").exists()


def test_a_second_run_in_the_same_folder_keeps_its_own_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config(tmp_path, **custom("blobs")))
    assert main(["--config", file]) == 0
    assert main(["--config", file, "--steps", "5"]) == 0
    assert "checkpoints of an earlier run are now in" in capsys.readouterr().out
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    earlier = sorted(path.name for path in (tmp_path / "out" / "checkpoints-earlier-1").iterdir())
    assert earlier == ["step-00000008", "step-00000012"]
    # Rounds go on from the broken one: they end at 9, and checkpoints at what falls between two ends.
    assert main(["--config", file, "--resume", "auto", "--steps", "11", "--checkpoint.keep_last", "9"]) == 0
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (4, 5, 9, 11)]


def test_a_write_killed_before_the_first_checkpoint_is_a_first_start(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / ".writing-step-00000004").mkdir(parents=True)
    assert main(["--config", str(config(tmp_path, steps=4, **custom("blobs"))), "--resume", "auto"]) == 0


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if "shrink" not in path.stem)
"""Those for pretrained models are run in test_shrink.py."""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_runs_at_reduced_size(tmp_path: Path, name: str) -> None:
    file = str(ROOT / "configs" / f"{name}.yaml")
    small = ["--steps", "4", "--sync_every", "2", "--structure.paired_batches", "1", "--task.batch_size", "4"]
    small += ["--structure.result_batches", "1", "--out", str(tmp_path / "out"), "--optimizer.warmup_steps", "1"]
    small += ["--track.log_every", "1", "--memory.compile", "false", "--micro_batches", "1"]
    if parse(["--config", file]).task.kind == "image_classification":
        size = 64 if "imagenet" in name else 32
        small += ["--task.data", str(images(tmp_path / "images", size)), "--task.image_size", str(size)]
        small += ["--task.width", "0.125", "--task.workers", "0"]
    else:
        folder = tmp_path / "text"
        folder.mkdir()
        for i in range(30):
            (folder / f"{i}.py").write_text(f"value = {i}\n" * 400)
        model = "{model_type: llama, vocab_size: 256, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, \
num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64}"
        small += ["--task.data", str(folder), "--task.model", model, "--task.sequence", "32"]
    assert main(["--config", file, *small]) == 0
    records = metrics(tmp_path / "out")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert all(math.isfinite(record.get("loss", record.get("val_loss"))) for record in records)
    assert (tmp_path / "out" / "export" / "model.safetensors").is_file()


def test_the_papers_way_runs(tmp_path: Path) -> None:
    """A new pair of subnets in every step, of widths that vary."""
    words = [str(ROOT / "configs" / name) for name in ("vgg19_cifar10.yaml", "overlays/paper.yaml")]
    words = ["--config", words[0], "--config", words[1], "--task.data", str(images(tmp_path / "images", 32))]
    words += ["--task.width", "0.125", "--task.batch_size", "4", "--steps", "6", "--track.log_every", "1"]
    words += ["--structure.samples", "2", "--structure.result_batches", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    records = [record for record in metrics(tmp_path / "out") if "loss" in record]
    assert [record["round"] for record in records] == list(range(6))
    assert len({record["device_bytes"] for record in records}) > 1
    assert all(record["difference"] is not None for record in records)


def test_an_exported_cnn_loads_with_its_plan(tmp_path: Path) -> None:
    data = images(tmp_path / "images", 32)
    arguments = [
        "--config",
        str(ROOT / "configs/vgg19_cifar10.yaml"),
        "--task.data",
        str(data),
        "--task.width",
        "0.125",
    ]
    arguments += ["--steps", "4", "--sync_every", "2", "--structure.paired_batches", "1", "--task.batch_size", "4"]
    arguments += ["--structure.result", "best_of", "--structure.samples", "2", "--structure.result_batches", "2"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    task = build_task(parse(arguments).task, 0)
    model = load_export(tmp_path / "out" / "export", task.model, find_groups(task.model, task.example_inputs))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    total = sum(task.count(batch) for batch in task.val)
    with torch.no_grad():
        loss = sum(float(task.metrics_fn(model, batch)["loss"]) * task.count(batch) for batch in task.val) / total
    assert loss == pytest.approx(summary["exported"]["loss"], rel=1e-5)
    assert sum(p.numel() for p in model.parameters()) == summary["exported"]["parameters"]


def test_the_library_example_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope: dict[str, object] = {}
    block = next(block for block in blocks if "with Offloader(" in block)
    exec(compile(block, "README.md", "exec"), scope)
    small = scope["small"]
    assert isinstance(small, torch.nn.Sequential)
    assert isinstance(small[0], torch.nn.Linear) and small[0].out_features == 256


def test_the_custom_task_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    for name, language in (("mine.py", "python"), ("mine.yaml", "yaml")):
        block = re.search(rf"```{language}\n(# {name}\n.*?)```", text, re.S)
        assert block is not None
        (tmp_path / name).write_text(block.group(1))
    command = re.search(r"offload_trainer/run.py (--config mine.yaml .*)", text)
    assert command is not None
    monkeypatch.chdir(tmp_path)
    assert main([*command.group(1).split(), "--task.arguments", "{width: 64}"]) == 0
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert summary["steps"] == 200
    assert summary["exported"]["parameters"] < 0.55 * summary["full_master"]["parameters"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"structure": {"keep": 0.53, "schedule": "cubic", "start_keep": 1.0, "schedule_steps": 4}},
            "hidden size (17)",
        ),
        ({"structure": {"keep": 0.5, "schedule": "cubic", "start_keep": 0.9, "schedule_steps": 4}}, None),
        ({"structure": {"keep": 0.5, "budget": "global"}}, "only if layers end with equal widths"),
    ],
    ids=["ends without one", "begins without one", "nobody knows"],
)
def test_what_the_export_will_lack_is_told_of_the_end_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], said: str | None
) -> None:
    assert main(["--config", str(config(tmp_path, **keys)), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ("config.json" in out) == (said is not None) and (said or "") in out


@pytest.mark.parametrize("part", ["complex", "masked"])
def test_models_with_numbers_of_other_kinds_train(tmp_path: Path, part: str) -> None:
    """Complex parameters, for which torch has no fused optimizer, and an infinity in a buffer."""
    assert main(["--config", str(config(tmp_path, steps=4, **custom("wrong", part=part)))]) == 0
    assert math.isfinite(json.loads((tmp_path / "out" / "summary.json").read_text())["exported"]["loss"])


def llama3_8b(folder: Path) -> Path:
    """A model folder as it is downloaded, of a file that has headers and holes."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    model_config = LlamaConfig(**sizes, **heads, max_position_embeddings=8192, dtype="bfloat16")
    model_config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(model_config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * shape.numel()]}
    words = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + end)
    return folder


@pytest.mark.parametrize("name", ["llama_from_scratch", "shrink_llama3_8b"])
def test_what_is_shipped_fits_the_card_it_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--task.data", "stdlib"]
    if name.startswith("shrink"):
        words += ["--task.model", str(llama3_8b(tmp_path / "model")), "--task.tokenizer", "bytes"]
    assert main([*words, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"device +fits: \d+\.\d GiB of 24.0 GiB, memory.device \(24GiB\)", printed)
    assert "no config.json" not in printed
