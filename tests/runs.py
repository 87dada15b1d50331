"""Small runs for tests: a tiny byte-level Llama on a little text, and custom tasks."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from offload_trainer import UserError, memory, train

FRESH = multiprocessing.get_context("forkserver")
"""Its processes are forks of one that has imported what takes seconds, and done nothing else."""
FRESH.set_forkserver_preload(["offload_trainer.run", "transformers.models.auto.modeling_auto"])
ROOT = Path(__file__).parent.parent
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


TWO_LAYERS = {"task.model.num_hidden_layers": 2}


def timed_in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that tools launch cost no start of a process from now on. Returns their names, as they come."""
    launched: list[str] = []
    timed, tools, variants = (importlib.import_module(f"reproduction.{name}") for name in ("timed", "runs", "variants"))
    own = train.Offloader
    monkeypatch.setattr(train, "Offloader", own)  # what a timed run puts in its place is taken back

    def launch(what: str, words: list[Any], program: list[str]) -> None:
        launched.append(what)
        assert program[:2] in (["-m", "reproduction.timed"], ["-m", "reproduction.variants"])
        code = (variants if program[2:] else timed).main([*program[2:], *(str(word) for word in words)])
        train.Offloader = own
        if code:
            raise UserError(what)

    monkeypatch.setattr(tools, "launch", launch)
    return launched


def custom(function: str, **arguments: object) -> dict[str, object]:
    """The change to a config that makes its task a function below, for what is not about language models."""
    return {"task": {"kind": "custom", "function": f"tests.runs:{function}", "arguments": arguments}}


def config(folder: Path, **changes: Any) -> Path:
    """Write a config (and its text) into `folder`; dotted keys in `changes` override it.

    Its Llama has one layer, unless the test is about several (`**TWO_LAYERS`): what a run costs is above all tracing.
    """
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(12):
        words = " ".join(f"{i * j % 97:02d} some words of file {i}" for j in range(120))
        (text / f"file{i}.txt").write_text(words)
    tree: dict[str, Any] = {
        "steps": 12,
        "sync_every": 4,
        "out": str(folder / "out"),
        "task": {
            "kind": "causal_lm",
            "model": LLAMA | {"num_hidden_layers": 1},
            "data": str(text),
            "sequence": 24,
            "batch_size": 4,
            "val_fraction": 0.2,
            "val_batches": 2,
        },
        "structure": {"keep": 0.5},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "track": {"log_every": 1, "display": "plain"},
        "checkpoint": {"every": 4},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        section = tree
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def growth(prepare: Callable[..., Callable[[], object]], *arguments: str) -> int:
    """Bytes by which what `prepare(*arguments)` returns raises the peak of resident memory, in a process of its own.

    In this one an earlier peak, or freed memory that is taken again, would hide them. `prepare` is a function of a
    module; what is asserted in it, and in what it returns, is asserted there. What it takes for a while counts too.
    """
    here, there = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=_measure, args=(there, prepare, arguments))
    process.start()
    there.close()
    with here:
        try:
            told = here.recv()
        except EOFError:
            told = "the process ended without a word"
    process.join()
    assert isinstance(told, int), told
    return told


def _measure(pipe: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[str, ...]) -> None:
    try:
        torch.set_num_threads(1)
        measured = prepare(*arguments)
        memory.trim_heap()
        before = memory.host_bytes()
        measured()
        pipe.send(memory.host_peak() - before)
    except BaseException:
        pipe.send(traceback.format_exc())


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def launch(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment, one thread, no GPU, the test process's own folder on no path."""
    program = str(Path(sys.executable).with_name(command[0]))
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(
        [program, *command[1:]], cwd=cwd, capture_output=True, text=True, env=os.environ | settings, timeout=300
    )


# Custom tasks, as `tests.runs:function`


def blobs(classes: int = 3, rows: int = 12, poison: int | None = None) -> dict[str, Any]:
    """Points around `classes` centres; the batch of step `poison` is NaN."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 8, generator=generator)
    batches = []
    for i in range(20):
        labels = torch.randint(classes, (rows,), generator=generator)
        points = centres[labels] + 0.3 * torch.randn(rows, 8, generator=generator)
        batches.append((points * float("nan") if i == poison else points, labels))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, classes))
    return {"model": model, "train": batches, "val": batches[:3], "loss": cross_entropy, "metric": accuracy}


def cross_entropy(module: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def accuracy(module: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    logits = module(batch[0])
    hits = (logits.argmax(1) == batch[1]).float().mean()
    return {"loss": nn.functional.cross_entropy(logits, batch[1]), "accuracy": hits}


def paired_rows(rows: int = 16) -> dict[str, Any]:
    """Every row is told from the one after it, so a loss of fewer rows is another one, and here none."""
    batches = [torch.randn(rows, 8) for _ in range(4)]

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        pairs = module(batch).view(rows // 2, 2, 4)
        return (pairs[:, 0] - pairs[:, 1]).square().mean()

    model = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 4))
    return {"model": model, "train": batches, "val": batches[:2], "loss": loss}


class Experts(nn.Module):
    """The sign of a row's first number decides which of three modules it goes through; the third is for none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = (x[:, 0] > 0).long(), x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows])) if len(rows) else out
        return out


def sorted_experts() -> dict[str, Any]:
    """Batches whose first half is for one expert and whose second half is for another."""
    made = blobs()
    batches = [(points[order], labels[order]) for points, labels in made["train"] for order in [points[:, 0].argsort()]]
    for points, _ in batches:
        points[: len(points) // 2, 0], points[len(points) // 2 :, 0] = -1, 1
    torch.manual_seed(0)
    return made | {"model": Experts(), "train": batches, "val": batches[:3]}


EXPERTS = {
    f"features.{i}": [f"experts.{i}.0.weight:0", f"experts.{i}.0.bias:0", f"experts.{i}.2.weight:1"] for i in range(3)
}
"""Rules for them by hand: where rows go depends on their values, which no tracing follows."""


def wrong(part: str) -> dict[str, Any]:
    """`blobs`, but for one part that is not as it must be; or with hidden layers of one size ("square")."""
    made = blobs()
    model, (points, labels) = made["model"], made["train"][0]
    change: dict[str, dict[str, Any]] = {
        "loss": {"loss": lambda module, batch: 1 / 0},
        "detached": {"loss": lambda module, batch: cross_entropy(module, batch).detach()},
        "label": {"train": [(points, labels + 5)]},
        "metric": {"metric": lambda module, batch: {"accuracy": {}["acc"]}},
        "nothing": {"metric": lambda module, batch: None},
        "val": {"val": [(points[:, :5], labels)]},
        "widths": {"widths": 5},
        "another model": {"loss": lambda module, batch: cross_entropy(model, batch)},
        "half the model": {"loss": lambda module, batch: cross_entropy(module, batch) + model[0].weight.square().sum()},
        "odd end": {"train": [*made["train"][:2], (points[:9], labels[:9])]},
        "no rows": {"val": [(points[:0], labels[:0])]},
        "masked": {"model": Masked()},
        "spectral": {"model": spectral()},
        "complex": {"model": Spectrum()},
        "square": {"model": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))},
    }
    if part == "type":
        model.register_buffer("ticks", torch.zeros(3, dtype=torch.uint16))
    if part == "frozen":
        model.requires_grad_(False)
    return made | change.get(part, {})


class Masked(nn.Module):
    """An infinity in a buffer, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("mask", torch.full((8, 8), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner((self.mask.softmax(-1) * x[:, None]).sum(-1)).relu())


def spectral() -> nn.Module:
    """A weight that is computed from a matrix and a vector: of one type they must be."""
    inner = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), inner, nn.ReLU(), nn.Linear(16, 3))


class Spectrum(nn.Module):
    """Complex numbers, but not in its first parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)
        self.turn = nn.Parameter(torch.randn(16, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer((self.inner(x) * self.turn).abs())


def a_failure() -> None:
    raise ValueError("the disk is on fire")


def a_list() -> list[int]:
    return [1, 2, 3]


def nothing_to_slice() -> dict[str, Any]:
    return blobs() | {"model": nn.Linear(8, 3)}


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.fft.fft(self.first(x)).real)


def an_op_without_a_rule() -> dict[str, Any]:
    return blobs() | {"model": Fourier()}


class Heads(nn.Module):
    """Stores its number of heads where no rule looks."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first, self.last = 4, nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.first(x).view(len(x), self.heads, 8)
        return self.last(split.softmax(-1).flatten(1))


def a_module_without_a_rule() -> dict[str, Any]:
    return blobs() | {"model": Heads()}


def wide(width: int) -> dict[str, Any]:
    """Layers of `width`² weights on few points: memory is weights and moments."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), *hidden, nn.Linear(width, 3))
    return blobs() | {"model": model}


class Counted(torch.utils.data.Dataset):
    """Rows of blobs, and how many were read."""

    read = 0

    def __init__(self, rows: int):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randn(rows, 8, generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        Counted.read += 1
        return self.rows[index], index % 3


def counted(norm: bool, rows: int = 400) -> dict[str, Any]:
    """A shuffled DataLoader of 100 batches; dropout, and a metric that draws numbers too."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), *([nn.BatchNorm1d(32)] if norm else []), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3)]
    loader = torch.utils.data.DataLoader(Counted(rows), batch_size=4, shuffle=True)

    def metric(module: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(module, (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]))}

    made = {"model": nn.Sequential(*layers), "train": loader, "val": list(loader)[:2]}
    return made | {"loss": cross_entropy, "metric": metric}


class Tables(nn.Module):
    """Buffers that hold the same on all ranks, of numbers that a sum or a third of one would change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)
        self.register_buffer("least", torch.full((3,), torch.finfo(torch.float32).min))
        self.register_buffer("table", torch.rand(32, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.last(torch.relu(self.norm(self.first(x))) * self.table)
        return torch.maximum(logits, self.least)


def tables() -> dict[str, Any]:
    return blobs() | {"model": Tables()}


def images(folder: Path, size: int) -> Path:
    """A tiny imagefolder of noise: two classes, six training and two test images each."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder
