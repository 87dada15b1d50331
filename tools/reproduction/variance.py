"""How much noise each estimator of the gradient of s has, for the same two forward passes, on real networks.

At moments of a training run, with the weights and s of then, and with s as other runs have it (flat; polarised by what
units are worth, so that nine tenths of a subnetwork are nearly certain): the estimate of every unit is made from many
pairs of masks, each with a batch of its own, and its variance, summed over the units, is compared with that of VR-PGE.
"linear" is the control variate: it knows the pairs before, and what the backward pass of each first mask says of its
units, as in training, where that pass is made anyway. The first pairs, from which it learns, do not count.
Weights stand still here; where they move from pair to pair, earlier ones tell less.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from accelerate.utils import send_to_device
from benchmarks.records import Record, Setting
from benchmarks.storage import MODEL
from torch import Tensor, nn

from offload_trainer.config import Config, parse
from offload_trainer.device.credit_sums import CreditSums
from offload_trainer.groups import Groups, Plan, find_groups
from offload_trainer.groups.slicing import slice_module
from offload_trainer.making import make_structure
from offload_trainer.master import find_checkpoint
from offload_trainer.structure import Structure, polarised
from offload_trainer.structure.budgets import GroupBudget
from offload_trainer.structure.credit import Credit
from offload_trainer.structure.effects import Effects
from offload_trainer.structure.estimators import ESTIMATORS, controlled
from offload_trainer.structure.sampled_units import SampledUnits
from offload_trainer.structure.schedules import constant
from offload_trainer.tasks import Task, build_task
from reproduction.pictures import new_figure, save
from reproduction.runs import AS_PUBLISHED, ROOT, SHORT, finish

CONFIGS = {"image": "resnet32_cifar10", "text": "quickstart"}
KINDS = ("as trained", "flat", "polarised")
ALPHA = 0.5
"""Exponent of the preconditioner."""
EXPLORE = 0.1
"""Share of a subnet's units outside the best, where s is polarised."""
NAMES = [f"{name}{control}" for name in ("vr_pge", "rloo", "disarm") for control in ("", ", linear")]
QUICK: dict[str, Any] = {"image_steps": 4, "text_steps": 4, "points": 1, "pairs": 4, "burn_in": 2}
QUICK_KEYS = [*SHORT[-4:], "--structure.paired_batches", "1", "--sync_every", "2"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data/cifar10", help="of the images (default: data/cifar10)")
    parser.add_argument("--tasks", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--image-steps", type=int, default=58_600, help="of 256 images (default: 300 epochs)")
    parser.add_argument("--text-steps", type=int, default=10_000, help="of 1,024 bytes (default: 10,000)")
    parser.add_argument("--width", type=float, default=2.0, help="of ResNet-32's channels (default: 2, the paper's)")
    parser.add_argument("--points", type=int, default=4, help="moments of the run to look at")
    parser.add_argument("--pairs", type=int, default=200, help="of masks, at each moment and for each kind of s")
    parser.add_argument(
        "--burn-in", type=int, default=50, help="pairs before those, that a control variate learns from"
    )
    parser.add_argument("--seed", type=int, default=0)


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[Record]:
    for task in options.tasks:
        arguments, size = _arguments(setting, options, task)
        run = finish(options.out / f"{task}-seed-{options.seed}", CONFIGS[task], arguments, keep_checkpoints=True)
        words = ["--config", ROOT / "configs" / f"{CONFIGS[task]}.yaml", "--out", run.out, *arguments]
        config = parse([str(word) for word in words])
        for step, kind, found in observed(setting, config, run.out, options):
            for name, variance in found.items():
                yield setting.record(
                    "variance",
                    f"{size}, at step {step}, s {kind}, {name}",
                    variance,
                    "summed over units",
                    variance / found["vr_pge"],
                    "vr_pge",
                    repeats=options.pairs,
                    against_value=found["vr_pge"],
                    size=size,
                    step=step,
                    kind=kind,
                    estimator=name,
                    seed=options.seed,
                    settings=run.settings,
                    arguments=[*options.of_structure, *options.passed_on],
                    tool="tools/reproduce.py variance",
                    command=options.command,
                )


def _arguments(setting: Setting, options: argparse.Namespace, task: str) -> tuple[list[object], str]:
    """Keys of the run's config, and what to call it."""
    steps = options.image_steps if task == "image" else options.text_steps
    arguments: list[object] = ["--steps", steps, "--seed", options.seed, "--checkpoint.keep_last", 10**6]
    arguments += ["--checkpoint.every", max(1, steps // options.points), "--track.display", "plain"]
    arguments += ["--track.log_every", max(1, steps // 50)]
    if task == "image":
        arguments += ["--task.data", options.data, "--task.width", 0.25 if setting.quick else options.width]
        arguments += AS_PUBLISHED
        arguments += ["--task.limit", 16, "--task.batch_size", 4] if setting.quick else []
        size = f"ResNet-32 width {options.width:g}, {steps} steps"
    else:
        arguments += ["--task.model", json.dumps(MODEL), "--task.sequence", 128, "--task.batch_size", 8]
        arguments += ["--structure.settle", 0]
        size = f"Llama, {steps} steps"
    return [*arguments, *options.of_structure, *options.passed_on], size


def observed(
    setting: Setting, config: Config, out: Path, options: argparse.Namespace
) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Optimizer step, kind of s, and the variance of each estimator, at the checkpoints of a run."""
    task = build_task(config.task, config.seed)
    groups = find_groups(task.model, task.example_inputs, widths=task.widths)
    structure = make_structure(config, groups)
    model = task.model.to_empty(device="cpu")
    assert task.materialise is not None
    task.materialise(model)  # buffers that are not saved
    for folder in sorted((out / "checkpoints").glob("step-*")):
        checkpoint = find_checkpoint(folder)
        model.load_state_dict(checkpoint.read("weights"), strict=False)
        structure.load_state_dict(checkpoint.read("structure"))
        trial = Trial(setting, task, model, groups, structure, config.steps)
        for kind in KINDS:
            yield checkpoint.meta["step"], kind, trial.variances(kind, options)


class Trial:
    """Subnets of one moment's weights, drawn, compared and judged; no weight changes."""

    def __init__(
        self, setting: Setting, task: Task, model: nn.Module, groups: Groups, structure: Structure, batches_from: int
    ):
        self._device, self._task, self._model, self._groups = setting.device, task, model, groups
        self._batches_from = batches_from  # those before were of the run's steps
        self._credit_sums = CreditSums(model, groups, structure.names)
        self._s = {name: s.clone() for name, s in structure.s.items()}
        self._widths = {name: max(1, round(float(s.double().sum()))) for name, s in self._s.items()}
        budgets = {n: GroupBudget(len(s), constant(self._widths[n] / len(s)), 1) for n, s in self._s.items()}
        self._sampled = SampledUnits(budgets, "fixed", "per_group")
        self._judged = Credit(self._sampled.units)
        """What backward passes said of all units that were drawn so far."""

    def variances(self, kind: str, options: argparse.Namespace) -> dict[str, float]:
        """Of each estimator, summed over the units."""
        s, units, estimates = self._s_of(kind), self._sampled, {name: list[Tensor]() for name in NAMES}
        generator = torch.Generator().manual_seed(options.seed)
        credits = {twins: Credit(units.units) for twins in (False, True)}
        effects = {twins: Effects(units.units) for twins in (False, True)}
        for i in range(options.burn_in + options.pairs):
            batch = send_to_device(self._task.train[self._batches_from + i], self._device)
            alone = [units.draw(s, 0, generator) for _ in range(2)]
            twins = list(units.antithetic_pair(s, 0, generator))
            pairs = {False: self._pair(alone, batch), True: self._pair(twins, batch)}
            for is_twin, (masks, d, said) in pairs.items():
                known = effects[is_twin].expected(credits[is_twin].known(units.sizes))
                if i >= options.burn_in:
                    c = units.centred(effects[is_twin].trust() * known, s, antithetic=is_twin)
                    for name in ("disarm",) if is_twin else ("vr_pge", "rloo"):
                        estimate = ESTIMATORS[name]
                        estimates[name].append(estimate(s, masks[0], s, masks[1], d, ALPHA))
                        estimates[f"{name}, linear"].append(controlled(estimate, s, masks[0], s, masks[1], d, ALPHA, c))
                effects[is_twin].compare(masks[0], masks[1], d, known)
                for credit in (credits[is_twin], self._judged):
                    credit.see(masks[0], said)
        return {name: float(torch.stack(made).var(0).sum()) for name, made in estimates.items()}

    def _s_of(self, kind: str) -> Tensor:
        if kind == "as trained":
            return torch.cat([*self._s.values()])
        if kind == "flat":
            return torch.cat([torch.full_like(s, self._widths[name] / len(s)) for name, s in self._s.items()])
        scores = self._sampled.by_name(self._judged.scores(self._sampled.sizes, EXPLORE))
        return torch.cat([polarised(part, self._widths[name], EXPLORE) for name, part in scores.items()])

    def _pair(self, masks: list[Tensor], batch: Any) -> tuple[list[Tensor], float, Tensor]:
        """The masks, L(m) - L(m′), and what the backward pass of m says of its units, (2, kept units)."""
        losses: list[float] = []
        for i, mask in enumerate(masks):
            plan = Plan(self._groups, self._sampled.kept(mask))
            module = slice_module(self._model, plan, self._groups).to(self._device).train()
            with torch.set_grad_enabled(i == 0):
                loss = self._task.loss_fn(module, batch)
            if i == 0:
                loss.backward()
                self._credit_sums.add(plan, dict(module.named_parameters()))
            losses.append(loss.item())
        means = self._credit_sums.take()
        assert means is not None
        said = self._credit_sums.by_group(means, Plan(self._groups, self._sampled.kept(masks[0])))
        return masks, losses[0] - losses[1], torch.cat([said[name].cpu() for name in self._sampled.names], 1)


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """The ratio to VR-PGE over the steps, a panel for each run and kind of s."""
    panels = list(dict.fromkeys((r["details"]["size"], r["details"]["kind"]) for r in records))
    figure, grid = new_figure(1, len(panels), (3.0 * len(panels), 3.6), sharey=True, squeeze=False)
    for axes, (size, kind) in zip(grid[0], panels, strict=True):
        for name in NAMES:
            found = [r for r in records if (r["details"]["size"], r["details"]["kind"]) == (size, kind)]
            found = [r for r in found if r["details"]["estimator"] == name]
            axes.plot([r["details"]["step"] for r in found], [r["ratio"] for r in found], marker=".", label=name)
        axes.set(xlabel="optimizer step", yscale="log")
        axes.set_title(f"{size.partition(',')[0]}\ns {kind}", fontsize=9)
        axes.grid(alpha=0.3, which="both")
    grid[0][0].set(ylabel="variance ÷ that of vr_pge")
    grid[0][-1].legend(frameon=False, fontsize=8)
    save(figure, file)


def rows(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown, for README: geometric means over the moments of a run."""
    yield "| run | s | " + " | ".join(NAMES) + " |"
    yield "| --- | --- |" + " ---: |" * len(NAMES)

    def place(record: dict[str, Any]) -> tuple[str, int]:
        return record["details"]["size"], KINDS.index(record["details"]["kind"])

    for (size, kind), found in groupby(sorted(records, key=place), place):
        group = list(found)
        ratios = [geometric_mean(r["ratio"] for r in group if r["details"]["estimator"] == name) for name in NAMES]
        yield f"| {size} | {KINDS[kind]} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |"
