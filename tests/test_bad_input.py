"""DESIGN §10, 10: bad input ends with one clear line and exit code 2, before anything is allocated or damaged."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from offload_trainer import UserError, making, memory, train
from offload_trainer import offloader as offloader_module
from offload_trainer.config import Config
from offload_trainer.files.writing import sole_writer
from offload_trainer.master import CheckpointStore
from offload_trainer.monitor import Monitor
from offload_trainer.run import main
from tests.runs import ROOT, config, custom, launch, metrics


@pytest.fixture
def never_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the master was allocated")

    monkeypatch.setattr(offloader_module, "Master", refuse)


def one_line(capsys: pytest.CaptureFixture[str], code: int) -> str:
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


CASES: dict[str, tuple[dict[str, object], list[str], str]] = {
    "typo": ({}, ["--structure.kep", "0.5"], "structure.kep"),
    "keep 0": ({}, ["--structure.keep", "0"], "structure.keep (0) must be in (0, 1]"),
    "keep 1.5": ({}, ["--structure.keep", "1.5"], "structure.keep (1.5) must be in (0, 1]"),
    "K": ({}, ["--sync_every", "0"], "sync_every (0)"),
    "a word for a number": ({}, ["--steps", "many"], "steps (many)"),
    "data missing": ({}, ["--task.data", "/no/such/folder"], "/no/such/folder"),
    "pattern": ({"structure.groups": {"*nothing*": 0.5}, "structure.keep": None}, [], "*nothing*"),
    "model folder missing": ({"task.model": "/no/such/model"}, [], "/no/such/model"),
    "not a task": (custom("a_list"), [], "it returned list"),
    "no such function": (custom("no_such"), [], "no_such"),
    "a function that fails": (custom("a_failure"), [], "raised ValueError: the disk is on fire ("),
    "a seed too large": ({}, ["--seed", "99999999999"], "seed (99999999999)"),
    "nothing to slice": (custom("nothing_to_slice"), [], "no group of units found in Linear"),
    "op": (custom("an_op_without_a_rule"), [], "aten::_fft_r2c, an op without a rule"),
    "module": (custom("a_module_without_a_rule"), [], "heads=4"),
    "resume": ({}, ["--resume", "/no/such/checkpoint"], "/no/such/checkpoint holds no checkpoint"),
    "rule": ({"structure.rules": {"mlp": ["no.such.weight:0"]}}, [], "no.such.weight"),
    "memory.device": ({}, ["--memory.device", "lots"], "memory.device (lots)"),
    "no device memory": ({}, ["--memory.device", "0GiB"], "memory.device (0GiB) is too small: the smallest plan"),
    "the smallest plan": (
        {"structure": {}},
        ["--memory.device", "10KiB"],
        "memory.device (10KiB) is too small: the smallest plan (structure.keep 0.01) takes ",
    ),
    "a keep that does not fit": ({}, ["--memory.device", "400KiB"], "more than memory.device (400KiB): at most 0."),
    "groups that do not fit": (
        {"structure": {"groups": {"*mlp*": 0.9}}},
        ["--memory.device", "100KiB"],
        "structure.groups takes ",
    ),
    "a schedule decides": (
        {"structure": {"schedule": "cubic", "start_keep": 0.8, "schedule_steps": 4}},
        ["--memory.device", "1GiB"],
        "structure.keep (null) must be given with structure.schedule (cubic)",
    ),
    "a loss that fails": (custom("wrong", part="loss"), [], "loss raised ZeroDivisionError: "),
    "a loss without a gradient": (custom("wrong", part="detached"), [], "loss does not depend on a trained parameter"),
    "a label too large": (custom("wrong", part="label"), [], "loss raised IndexError: Target 7 is out of bounds"),
    "a metric that fails": (custom("wrong", part="metric"), [], "metric, on a batch of val, raised KeyError: 'acc' ("),
    "a metric of nothing": (custom("wrong", part="nothing"), [], "metric metric must return a scalar tensor"),
    "val of another width": (custom("wrong", part="val"), [], "metric, on a batch of val, raised RuntimeError: mat1"),
    "a loss of the model itself": (
        custom("wrong", part="another model"),
        [],
        "loss reaches 0.weight of the model itself",
    ),
    "and of both": (custom("wrong", part="half the model"), [], "loss reaches 0.weight of the model itself"),
    "val of no rows": (custom("wrong", part="no rows"), [], "val: its first batch holds no rows"),
    "rules for widths": (custom("wrong", part="widths"), [], "widths must be a dict of rules; it is int"),
    "a tensor that no file holds": (custom("wrong", part="type"), [], "ticks: tensors of torch.uint16 cannot be saved"),
    "nothing to train": (custom("wrong", part="frozen"), [], "no parameter of the model is trained"),
    "weights that bf16 cannot hold": (
        custom("wrong", part="spectral") | {"memory.weights": "bf16"},
        [],
        "does not run with weights stored in bfloat16, so that the full master could not be evaluated (RuntimeError: ",
    ),
    "longer than MPT's positions": (
        {"task.model": {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16}},
        [],
        "at most the model's max_seq_len (16)",
    ),
    "tracker": ({"track.trackers": ["carrier pigeon"]}, [], "carrier pigeon"),
}


@pytest.mark.usefixtures("never_allocated")
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changes, arguments, expected = CASES[case]
    changes = {key: value for key, value in changes.items() if value is not None}
    if "structure.groups" in changes:
        changes["structure"] = {"groups": changes.pop("structure.groups")}
    assert expected in one_line(capsys, main(["--config", str(config(tmp_path, **changes)), *arguments]))


@pytest.mark.usefixtures("never_allocated")
def test_an_empty_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    line = one_line(capsys, main(["--config", str(config(tmp_path)), "--task.data", str(tmp_path / "empty")]))
    assert str(tmp_path / "empty") in line


@pytest.mark.usefixtures("never_allocated")
@pytest.mark.parametrize("there", ["nothing", "config alone", "a pickle"])
def test_a_model_folder_without_config_or_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    if there != "nothing":
        (model / "config.json").write_text('{"model_type": "llama"}')
    if there == "a pickle":
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    line = one_line(capsys, main(["--config", str(config(tmp_path, **{"task.model": str(model)}))]))
    assert str(model) in line


@pytest.mark.usefixtures("never_allocated")
def test_an_out_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_file").write_text("")
    out = tmp_path / "a_file" / "out"
    line = one_line(capsys, main(["--config", str(config(tmp_path)), "--out", str(out)]))
    assert f"out ({out}) must be a folder that can be written" in line


@pytest.mark.usefixtures("never_allocated")
def test_more_processes_than_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = one_line(capsys, main(["--config", str(config(tmp_path))]))
    assert "3 GPUs were asked for, one per process, and this machine has 2" in line


@pytest.mark.usefixtures("never_allocated")
def test_cuda_graphs_without_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory.compile", "true", "--memory.cuda_graphs", "true"]
    assert main(["--config", str(config(tmp_path)), *options]) == 2
    assert capsys.readouterr().err == "error: memory.cuda_graphs (true) needs a CUDA device; this run is on cpu\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_an_engine_that_is_not_supported_is_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    line = one_line(capsys, main(["--config", str(config(tmp_path))]))
    assert f"accelerate was configured for {engine}" in line


TWO_GPUS = "error: 2 GPUs were asked for, one per process, and this machine has 0"


def test_processes_asked_of_accelerate_for_gpus_that_are_not_there(tmp_path: Path) -> None:
    program = ["offload_trainer/run.py", "--config", str(config(tmp_path))]
    done = launch("accelerate", "launch", "--num_processes", "2", *program)
    assert done.returncode != 0
    assert TWO_GPUS in done.stderr


@pytest.mark.usefixtures("never_allocated")
def test_gpus_asked_of_accelerate_by_id_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment that `accelerate launch` makes."""
    given = "--gpu_ids 0,1 --num_machines 1 --mixed_precision no --dynamo_backend no offload_trainer/run.py"
    asked = launch_command_parser().parse_args(given.split())
    asked.use_cpu = False  # as the launcher finds on its own
    _, environment = prepare_simple_launcher_cmd_env(asked)
    for name in environment.keys() - os.environ.keys() | {"CUDA_VISIBLE_DEVICES"}:
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert TWO_GPUS in one_line(capsys, main(["--config", str(config(tmp_path))]))


@pytest.mark.usefixtures("never_allocated")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("checkpoints", Path.touch),
        ("checkpoints", lambda path: path.symlink_to("nowhere")),
        ("export", Path.touch),
        ("export", lambda path: path.symlink_to("nowhere/export")),
        ("metrics.jsonl", Path.mkdir),
    ],
)
def test_what_stands_in_the_way_in_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, make) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    line = one_line(capsys, main(["--config", str(config(tmp_path))]))
    assert f"out ({tmp_path / 'out'}): {name} in it" in line and "must be a" in line


@pytest.mark.usefixtures("never_allocated")
def test_an_export_that_cannot_be_replaced_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export").symlink_to(tmp_path / "disk")
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk" or real(path))
    line = one_line(capsys, main(["--config", str(config(tmp_path))]))
    assert line.endswith(f"must be a folder within one that can be written; it is {tmp_path / 'disk'}")


def test_resuming_with_another_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(config(tmp_path, steps=4))
    assert main(["--config", file]) == 0
    capsys.readouterr()
    for key, value, there in (
        ("structure.sampler", "bernoulli", "fixed"),
        ("structure.keep", "0.3", "0.5"),
        ("optimizer.kind", "sgd", "adamw"),
        ("optimizer.state", "reset", "carry"),
    ):
        line = one_line(capsys, main(["--config", file, "--resume", "auto", f"--{key}", value]))
        assert f"{key} ({value}) must be {there}, as in the checkpoint" in line


def test_resuming_with_other_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same sizes, so that nothing else would tell."""
    file = str(config(tmp_path, **custom("wrong", part="square"), steps=4))
    rules = ["{a: ['0.weight:0', '0.bias:0', '2.weight:1']}", "{a: ['2.weight:0', '2.bias:0', '4.weight:1']}"]
    assert main(["--config", file, "--structure.rules", rules[0]]) == 0
    capsys.readouterr()
    words = ["--config", file, "--resume", "auto", "--steps", "8", "--structure.rules"]
    assert "structure.rules (" in one_line(capsys, main([*words, rules[1]]))
    assert main([*words, rules[0]]) == 0


def test_resuming_what_no_run_has_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`snapshot.save` of the library alone knows of no config."""
    store = CheckpointStore(tmp_path / "out" / "checkpoints")
    path = store.save(4, {"weights": {"w": torch.zeros(2)}}, {})
    line = one_line(capsys, main(["--config", str(config(tmp_path, **custom("blobs"))), "--resume", "auto"]))
    assert f"resume: {path} does not say of what config it is" in line


def test_resuming_a_checkpoint_that_does_not_know_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an older version: what it does not say cannot differ."""
    file = str(config(tmp_path, **custom("wrong", part="square"), steps=4))
    rules = "{a: ['0.weight:0', '0.bias:0', '2.weight:1']}"

    def of_older(config: Config) -> dict[str, object]:
        return {"config": {key: value for key, value in making.resumable(config).items() if key != "structure.rules"}}

    monkeypatch.setattr(train, "of_checkpoint", of_older)
    assert main(["--config", file, "--structure.rules", rules]) == 0
    assert main(["--config", file, "--resume", "auto", "--steps", "8", "--structure.rules", rules]) == 0


def test_resuming_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(config(tmp_path))
    assert main(["--config", file, "--steps", "4"]) == 0
    capsys.readouterr()
    model = "{model_type: llama, vocab_size: 256, hidden_size: 64, intermediate_size: 48, num_hidden_layers: 1, \
num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64, tie_word_embeddings: true}"
    line = one_line(capsys, main(["--config", file, "--resume", "auto", "--task.model", model]))
    assert "is of another model: model.embed_tokens.weight is (256, 32) there, (256, 64) here" in line
    line = one_line(capsys, main(["--config", file, "--resume", "auto", "--sync_every", "6"]))
    assert "sync_every (6) must be 4" in line


def test_a_resumed_run_says_what_is_not_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(config(tmp_path, **custom("blobs", rows=12)))
    assert main(["--config", file, "--steps", "8"]) == 0
    assert main(["--config", file, "--steps", "8", "--resume", "auto"]) == 0
    said = capsys.readouterr().out
    assert "resumed from" in said and "not as it was" not in said
    file = str(config(tmp_path, **custom("blobs", rows=6)))
    assert main(["--config", file, "--resume", "auto"]) == 0
    assert "not as it was: steps 12 (was 8), task.arguments.rows 6 (was 12)" in capsys.readouterr().out
    file = str(config(tmp_path, **custom("blobs")))
    assert main(["--config", file, "--resume", "auto"]) == 0
    assert "not as it was: task.arguments.rows null (was 6)" in capsys.readouterr().out


def test_a_truncated_checkpoint_is_named_and_auto_falls_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config(tmp_path, **custom("blobs")))
    assert main(["--config", file]) == 0
    newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    weights = newest / "weights.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    capsys.readouterr()
    line = one_line(capsys, main(["--config", file, "--resume", str(newest)]))
    assert f"{weights} is damaged" in line
    assert main(["--config", file, "--resume", "auto"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert metrics(tmp_path / "out")[-1]["step"] == 12


def test_a_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(config(tmp_path, steps=16, **custom("blobs", poison=9)))
    line = one_line(capsys, main(["--config", file]))
    assert "the loss is nan at step 10, round 2" in line
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"]
    # In the last round, which is a part of one: what no checkpoint was due for is kept.
    last = ["--steps", "10", "--checkpoint.every", "0", "--out", str(tmp_path / "last")]
    assert "the loss is nan at step 10, round 2" in one_line(capsys, main(["--config", file, *last]))
    assert [path.name for path in (tmp_path / "last" / "checkpoints").iterdir()] == ["step-00000008"]


def test_a_folder_that_another_run_writes_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(config(tmp_path, steps=4, **custom("blobs")))
    out = tmp_path / "out"
    out.mkdir()
    with sole_writer(out):
        assert f"out ({out}): another run writes there" in one_line(capsys, main(["--config", file]))
        assert not list(out.iterdir())
    assert main(["--config", file]) == 0


def test_what_fails_on_fake_tensors_says_one_line(tmp_path: Path) -> None:
    """Torch logs a traceback for every op that fails there, to the standard error of the process's start."""
    file = config(tmp_path, **custom("wrong", part="val"))
    done = launch("python", str(ROOT / "offload_trainer" / "run.py"), "--config", str(file), PYTHONPATH=str(ROOT))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [("task: &a\n  kind: *a\n", "task.kind holds itself, by an alias"), ("[" * 3000, "nested too deeply")],
)
def test_a_file_without_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert said in one_line(capsys, main(["--config", str(file)]))


def test_a_host_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, never_allocated: None
) -> None:
    """By how much, and what would save it; nothing is written."""
    monkeypatch.setattr(memory, "host_available", lambda: 2**20)
    line = one_line(capsys, main(["--config", str(config(tmp_path, **custom("wide", width=512)))]))
    assert "host memory: the run needs " in line and " more than the " in line
    for option in ("optimizer.state: reset", "memory.moments: bf16", "memory.weights: bf16", "memory.master: file"):
        assert f"{option} saves" in line
    assert not list((tmp_path / "out").iterdir())
    narrow = {"memory": {"weights": "bf16", "master": "file"}, "optimizer.state": "reset"}
    line = one_line(capsys, main(["--config", str(config(tmp_path, **custom("wide", width=512), **narrow))]))
    assert line.endswith("available: a smaller structure.keep saves what the device's side holds")


def usage(monkeypatch: pytest.MonkeyPatch, folder: Path, *free: int) -> None:
    """Make `shutil.disk_usage` tell these free bytes, one a call; the last from then on."""
    real, left = shutil.disk_usage(folder), list(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=left.pop(0) if len(left) > 1 else left[0]))


def test_a_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, never_allocated: None
) -> None:
    usage(monkeypatch, tmp_path, 1000)
    line = one_line(capsys, main(["--config", str(config(tmp_path))]))
    assert f"out ({tmp_path / 'out'}): the run writes " in line and "more than the 1000 B free" in line
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(config(tmp_path, **custom("blobs")))
    assert main(["--config", file, "--steps", "4"]) == 0
    capsys.readouterr()
    usage(monkeypatch, tmp_path, 2**40, 1000)  # it fills while the run goes on
    line = one_line(capsys, main(["--config", file, "--resume", "auto"]))
    assert "no room for a checkpoint" in line
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_while_metrics_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Monitor.log

    def full(monitor: Monitor, record: dict[str, object]) -> None:
        if record["step"] == 6:
            monitor.file.close()
            monitor.file = open("/dev/full", "a")  # noqa: SIM115 (the monitor closes it)
        log(monitor, record)

    file = str(config(tmp_path, **custom("blobs")))
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", full)
        line = one_line(capsys, main(["--config", file]))
    assert line.startswith(f"error: cannot write {tmp_path / 'out' / 'metrics.jsonl'}: No space left on device")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000004"]
    assert main(["--config", file, "--resume", "auto"]) == 0
    assert [record["step"] for record in metrics(tmp_path / "out")] == list(range(1, 13))


def test_a_dry_run_finds_a_folder_that_cannot_be_written_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(config(tmp_path)), tmp_path / "new" / "out"
    (tmp_path / "file").touch()
    words = ["--config", file, "--dry-run"]
    for keys in (["--out", str(tmp_path / "file" / "out")], ["--out", str(tmp_path / "file")]):
        assert "must be a folder that can be written" in one_line(capsys, main([*words, *keys]))
    mapped = ["--memory.master", "file", "--memory.folder", str(tmp_path / "none")]
    assert "memory.folder" in one_line(capsys, main([*words, *mapped]))
    assert main([*words, "--out", str(out)]) == 0 and not out.parent.exists()


def test_ranks_that_were_started_differently_are_named_by_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = {"steps": 4, "optimizer": {"kind": "adamw", "lr": 0.1}}, {"steps": 4, "optimizer": {"lr": 0.2}}
    ours, theirs = (parse_dict({**one, "task": {"kind": "custom", "function": "a:b"}}) for one in (mine, other))
    flat = making._flat(theirs.model_dump(mode="json", exclude={"memory": {"folder"}}))
    monkeypatch.setattr(making.ranks, "gather", lambda _, value: [value, flat])
    with pytest.raises(UserError, match=r"^optimizer.lr \(0.1\) of rank 0 must be that of rank 1 \(0.2\)$"):
        making.require_same_config(ours, Accelerator(cpu=True))
    making.require_same_config(theirs, Accelerator(cpu=True))


def parse_dict(values: dict[str, Any]) -> Config:
    return Config.model_validate(values)
