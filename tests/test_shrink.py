"""Shrinking a pretrained model, as README says; and the comparison of contenders, on a tiny one."""

import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from offload_trainer import run
from tests import runs

README = (runs.ROOT / "README.md").read_text()


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A model folder as the hub has them: sharded bfloat16 weights, a tokenizer of its own; and text in data/text."""
    text = tmp_path / "data" / "text"
    text.mkdir(parents=True)
    words = [f"{i * 7 % 50} some words of a text that goes on {i}. " for i in range(600)]
    for i in range(12):
        (text / f"{i}.txt").write_text("".join(words[i * 50 : (i + 1) * 50] * 6))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>"]
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator(words, trainer)
    folder = tmp_path / "data" / "smollm2"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0]).save_pretrained(folder)
    settings = runs.LLAMA | {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 384,
        "head_dim": 64,
        "num_attention_heads": 6,
    }
    settings |= {"num_key_value_heads": 3, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).bfloat16()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def test_the_commands_of_the_readme(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"run\.py (--config configs/shrink_smollm2.yaml.*)", README)
    assert len(commands) == 2
    short = (
        "--steps 8 --sync_every 2 --task.sequence 32 --task.val_batches 2 --track.display plain --track.eval_every 4"
    )
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")

    assert run.main([*commands[0].split(), *short.split()]) == 0
    assert "fits" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert run.main([*commands[1].split(), *short.split()]) == 0

    out = tmp_path / "runs" / "shrink_smollm2"
    summary = json.loads((out / "summary.json").read_text())
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "from_pretrained" in b)
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    model, tokenizer = scope["model"], scope["tokenizer"]
    # 128 of 384 features (0.29 of them, in steps of 64), 2 of 3 key/value heads with their 4 query heads.
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (128, 4, 2)
    assert sum(p.numel() for p in model.parameters()) == summary["exported"]["parameters"]
    assert tokenizer("some words")["input_ids"] == AutoTokenizer.from_pretrained(pretrained)("some words")["input_ids"]
    first, last = runs.metrics(out)[0], summary["exported"]
    assert last["loss"] < first["val_loss"]
    assert last["perplexity"] == pytest.approx(torch.tensor(last["loss"]).exp().item(), rel=1e-5)
    # The export computes what the final subnet computed.
    from offload_trainer.config import parse
    from offload_trainer.tasks import build_task

    task = build_task(parse([*commands[1].split(), *short.split()]).task, 0)
    with torch.no_grad():
        losses = [float(task.metrics_fn(model.eval(), batch)["loss"]) for batch in task.val]
    assert sum(losses) / len(losses) == pytest.approx(last["loss"], rel=2e-3)  # the run computes in bfloat16


def test_the_shipped_config_of_a_model_that_fits_no_card(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is but for sizes and lengths: all groups shrink, in bf16 on the host, and the result has a config.json."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(runs.ROOT / "configs" / "shrink_llama3_8b.yaml"), "--task.model", str(pretrained)]
    words += ["--structure.multiple_of", "4", "--steps", "8", "--sync_every", "4", "--micro_batches", "2"]
    words += ["--task.batch_size", "4", "--task.sequence", "32", "--task.val_batches", "2", "--track.eval_every", "4"]
    words += ["--optimizer.lr", "1e-3", "--optimizer.warmup_steps", "0", "--out", "out"]
    assert run.main(words) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export")
    config = model.config  # 0.40625 of 48, 2 of 3 key/value heads, 0.36 of 384
    assert (config.hidden_size, config.num_key_value_heads, config.intermediate_size) == (20, 2, 140)
    losses = [record["val_loss"] for record in runs.metrics(tmp_path / "out") if "val_loss" in record]
    assert losses[-1] < losses[0]


# The comparison


@pytest.fixture
def shrink(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(runs.ROOT / "tools")
    for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield importlib.import_module("shrink")
    sys.modules.pop("shrink", None)


@pytest.fixture
def in_this_process(shrink: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that the comparison launches, but for the one below that fails, cost no start of a process."""
    return runs.timed_in_this_process(monkeypatch)


def test_a_comparison(
    shrink: Any, in_this_process: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs.config(tmp_path, **{"structure.start": "importance"})
    arguments = ["--config", str(config), "--quick", "--seeds", "0", "--contenders", "ours", "full", "--points", "3"]
    arguments += ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "r.json")]
    arguments += ["--picture", str(tmp_path / "r.svg"), "--task.val_batches", "1"]
    assert shrink.main(arguments) == 0
    ours, full = json.loads((tmp_path / "r.json").read_text())
    assert ours["case"].startswith("ours, seed 0") and full["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["value"] / full["value"])
    assert ours["details"]["parameters"] < full["details"]["parameters"]
    for record in (ours, full):
        steps, seconds, _ = zip(*record["details"]["points"], strict=True)
        assert steps[0] == 0 and list(steps) == sorted(steps) and steps[-1] == record["details"]["steps"]
        assert list(seconds) == sorted(seconds) and seconds[-1] == record["details"]["seconds"]
    assert "<svg" in (tmp_path / "r.svg").read_text()

    assert in_this_process == ["ours-0", "full-0"]
    assert shrink.main(arguments) == 0
    assert len(in_this_process) == 2  # nothing is run twice
    assert shrink.main([*arguments, "--optimizer.lr", "9"]) == 2  # and nothing is taken for what it is not
    assert "holds a run with other arguments" in capsys.readouterr().err


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_contenders_get_the_same_time(shrink: Any, clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 s on the wall and 2 s of a CPU, with pairs 1.5 times as long; the first round much longer."""
    asked: dict[str, dict[str, str]] = {}

    def finish(out: Path, config: Path, words: list[Any]) -> Any:
        keys = dict(zip(*[iter(map(str, words))] * 2, strict=True))
        asked[out.name] = keys
        every, steps = int(keys["--track.log_every"]), int(keys["--steps"])
        a_step = 1.5 if keys["--structure.settle"] == "0" else 1.0
        at = [{"step": step, "train_seconds": 100 + step * a_step} for step in range(every, steps + 1, every)]
        log = [{**record, "train_cpu_seconds": 2 * record["train_seconds"]} for record in at]
        exported = {"loss": 1.0, "parameters": 1}
        summary = {"exported": exported, "steps": steps, "seconds": {"start": 7.0}}
        return SimpleNamespace(metrics=log, settings={}, summary=summary, device_bytes=5)

    monkeypatch.setattr(shrink, "finish", finish)
    config = runs.config(tmp_path, **{"structure.paired_batches": 4, "sync_every": 20})
    arguments = ["--config", str(config), "--minutes", "10", "--clock", clock, "--seeds", "0", "--contenders"]
    assert shrink.main([*arguments, "ours", "plain", "--json", str(tmp_path / "r.json")]) == 0
    seconds = 600 if clock == "wall" else 300
    assert int(asked["plain-0"]["--steps"]) == seconds
    assert int(asked["ours-0"]["--steps"]) == round(seconds / 1.25)  # half of it explores
    assert set(asked) == {"ours-cost-0", "ours-cost-1", "plain-cost-1", "ours-0", "plain-0"}
    assert asked["ours-cost-0"]["--structure.paired_batches"] == "2"  # of 10 steps, as 4 of 20
    ours, _ = json.loads((tmp_path / "r.json").read_text())
    assert ours["case"] == "ours, seed 0, 10 min" and ours["details"]["start_seconds"] == 7


@pytest.mark.usefixtures("in_this_process")
def test_from_scratch_is_the_same_network_of_random_weights(shrink: Any, pretrained: Path, tmp_path: Path) -> None:
    file = pretrained / "config.json"
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    model.model.norm.weight.data *= 40  # so sure of itself as only a trained one is
    model.save_pretrained(pretrained)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unk_token_id": 0}))  # as SmolLM2's has it
    changes = {"structure.start": "importance", "structure.settle": 1, "task.data": str(pretrained.parent / "text")}
    config = runs.config(tmp_path, **changes, **{"task.model": str(pretrained), "task.sequence": 32})
    arguments = ["--config", str(config), "--quick", "--seeds", "0", "--contenders", "fixed", "scratch"]
    arguments += ["--out", str(tmp_path / "runs"), "--json", str(tmp_path / "r.json"), "--task.val_batches", "1"]
    assert shrink.main(arguments) == 0
    fixed, scratch = json.loads((tmp_path / "r.json").read_text())
    assert scratch["details"]["parameters"] == fixed["details"]["parameters"]
    starts = [record["details"]["points"][0][2] for record in (fixed, scratch)]
    assert starts[1] == pytest.approx(math.log(320), abs=0.3)  # nothing is known of 320 tokens
    assert abs(starts[0] - math.log(320)) > 1


def test_a_run_that_fails_is_named(shrink: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = runs.config(tmp_path)
    arguments = ["--config", str(config), "--quick", "--contenders", "ours", "--out", str(tmp_path / "runs")]
    assert shrink.main([*arguments, "--task.data", str(tmp_path / "nowhere")]) == 2
    assert "ours-0: error: task.data" in capsys.readouterr().err
