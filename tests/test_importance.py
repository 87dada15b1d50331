"""Importance of units: against the definition computed slowly, against ablation, and as the start of a run."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offload_trainer import UserError, run
from offload_trainer.groups import find_groups
from offload_trainer.groups.readers import find_readers
from offload_trainer.initial.importance import importance
from tests import models, runs


def llm_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = module(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def llama() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**runs.LLAMA))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_scores_are_shares_of_what_the_readers_put_out(batches: list[torch.Tensor]):
    model = llama()
    groups = find_groups(model, models.tokens())
    names = [group.name for group in groups]
    scores, by_weight = importance(model, groups, names, batches, llm_loss, Accelerator(cpu=True))
    assert by_weight == []
    assert {name: float(score.sum()) for name, score in scores.items()} == pytest.approx(dict.fromkeys(names, 1.0))

    # The slow way: run the model, keep what the down projection reads, and drop each unit's columns in turn.
    name = next(name for name in names if name.endswith("1.mlp"))
    down = model.get_submodule(name).down_proj
    seen: list[torch.Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model.eval()(input_ids=batch[:, :-1], use_cache=False)
    handle.remove()
    x = torch.cat(seen).double()
    lost = torch.stack([(x[:, [u]] @ down.weight[:, [u]].double().T).square().sum(1).mean() for u in range(x.shape[1])])
    torch.testing.assert_close(scores[name].double(), lost / lost.sum(), rtol=1e-5, atol=1e-9)


def test_a_unit_that_contributes_nothing_scores_nothing(batches: list[torch.Tensor]):
    model = llama()
    groups = find_groups(model, models.tokens())
    mlp = next(group.name for group in groups if group.name.endswith("0.mlp"))
    heads = next(group for group in groups if group.name.endswith("0.self_attn"))
    with torch.no_grad():
        model.get_submodule(mlp).down_proj.weight[:, 5] = 0  # written by nobody
        model.get_submodule(mlp).up_proj.weight[7] = 0  # always zero
        width = model.get_submodule(heads.name).o_proj.weight.shape[1] // heads.units
        model.get_submodule(heads.name).o_proj.weight[:, width:] = 0
    scores, _ = importance(model, groups, [mlp, heads.name], batches, llm_loss, Accelerator(cpu=True))
    assert scores[mlp][5] == scores[mlp][7] == 0 and int((scores[mlp] == 0).sum()) == 2
    assert scores[heads.name].tolist() == pytest.approx([1.0, 0.0])


def test_what_is_left_alone(batches: list[torch.Tensor]):
    model = llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = find_groups(model, models.tokens())
    importance(model, groups, [group.name for group in groups], batches, llm_loss, Accelerator(cpu=True))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_convolutions_are_read_by_channel():
    torch.manual_seed(0)
    model = nn.Sequential(
        models.conv(3, 8), models.conv(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )
    groups = find_groups(model, models.images())
    batch = (torch.randn(6, 3, 16, 16), torch.randint(5, (6,)))
    with torch.no_grad():
        model[1][0].weight[:, 3] = 0
    scores, by_weight = importance(
        model, groups, [g.name for g in groups], [batch], runs.cross_entropy, Accelerator(cpu=True)
    )
    assert by_weight == []
    assert [len(score) for score in scores.values()] == [8, 12]
    first = next(iter(scores.values()))
    assert int(first.argmin()) == 3 and first[3] == 0
    readers = find_readers(model, groups)
    assert [reader.path for reader in readers] == ["1.0", "4"]


def test_units_that_no_known_layer_reads_are_judged_by_weight():
    class Read(nn.Module):
        """The second product is no layer."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Parameter(torch.randn(10, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).relu() @ self.second

    torch.manual_seed(0)
    model = Read()
    groups = find_groups(model, models.vectors(3, 6))
    batch = (torch.randn(8, 6), torch.randint(4, (8,)))
    scores, by_weight = importance(
        model, groups, [g.name for g in groups], [batch], runs.cross_entropy, Accelerator(cpu=True)
    )
    assert by_weight == [next(iter(groups)).name]
    first, second = model.first.weight.square().sum(1), model.second.square().sum(1)
    expected = (first / first.sum() + second / second.sum()) / 2
    torch.testing.assert_close(scores[by_weight[0]], expected.detach())


def test_dropping_important_units_hurts_more(batches: list[torch.Tensor]):
    """The reason for the score, on a network that was trained: the halves differ."""
    from offload_trainer.groups import Plan, slice_module

    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = torch.stack([inputs.square().sum(1), inputs[:, 0] * inputs[:, 1]], 1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss_fn(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(module(batch), targets)

    for _ in range(300):
        optimizer.zero_grad()
        loss_fn(model, inputs).backward()
        optimizer.step()
    groups = find_groups(model, (torch.zeros(3, 8),))
    name = next(iter(groups)).name
    scores, _ = importance(model, groups, [name], [inputs], loss_fn, Accelerator(cpu=True))
    order = scores[name].argsort()

    def kept(units: torch.Tensor) -> float:
        with torch.no_grad():
            small = slice_module(model, Plan(groups, {name: units.sort().values}), groups)
            return float(loss_fn(small, inputs))

    assert kept(order[32:]) < 0.5 * kept(order[:32])


# A run


@pytest.mark.parametrize("start", ["importance", "random"])
def test_a_run_starts_from_the_most_important(start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = runs.config(tmp_path, **{"structure.start": start, "structure.settle": 1.0, "track.eval_every": 4})
    assert run.main(["--config", str(config)]) == 0
    kept = json.loads((tmp_path / "out" / "export" / "plan.json").read_text())["kept"]
    firsts = [indices == list(range(len(indices))) for name, indices in kept.items() if "mlp" in name]
    assert not any(firsts)  # what a uniform s would keep
    first, *rest = runs.metrics(tmp_path / "out")
    assert first["step"] == 0 and first["val_loss"] > 0 and "loss" not in first
    assert [record["step"] for record in rest] == list(range(1, 13))


def test_the_first_round_trains_the_top_plan_and_leaves_s_alone(tmp_path: Path):
    """12 steps in rounds of 4: pairs are compared from the second round on."""
    config = runs.config(tmp_path, **{"structure.start": "importance", "structure.explore": 0.4})
    assert run.main(["--config", str(config)]) == 0
    differences = {record["step"]: record["difference"] for record in runs.metrics(tmp_path / "out")}
    assert differences[4] is None and differences[8] is not None  # of the last finished round


class Named(nn.Module):
    """Its second layer is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(input=self.a(x).relu())


class OneRow(nn.Module):
    """A layer that reads a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.h, self.g = nn.Parameter(torch.randn(5)), nn.Linear(5, 16), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.g(self.h(self.z).relu())


class Vectors(nn.Module):
    """No matrix at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.v = (nn.Parameter(torch.randn(16)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x[..., None] * self.w + self.b).relu() * self.v).sum(-1)


@pytest.mark.parametrize("kind", [Named, OneRow, Vectors, "float64"])
def test_layers_that_are_called_in_other_ways(kind: type[nn.Module] | str) -> None:
    model = kind() if isinstance(kind, type) else nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(4, 6, dtype=next(model.parameters()).dtype)
    groups = find_groups(model, (x,))
    names = [group.name for group in groups]
    scores, by_weight = importance(model, groups, names, [x], lambda m, b: m(b).mean(), Accelerator(cpu=True))
    assert by_weight == (["w"] if kind is Vectors else [])
    assert all(float(score.sum()) == pytest.approx(1) and bool((score > 0).any()) for score in scores.values())
    if kind is Vectors:
        shares = torch.stack([v.square() / v.square().sum() for v in model.parameters()]).mean(0)
        torch.testing.assert_close(scores["w"], shares.detach())


@pytest.mark.parametrize("shape", [(6, 8, 5), (3, 6, 8, 5)], ids=["no batch axis", "batches"])
def test_channels_are_found_with_and_without_a_batch_axis(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1))  # as many channels as rows
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([9.0, *7 * [1.0]]))
        model[1].weight.fill_(1.0)
    x = torch.randn(shape)
    groups = find_groups(model, (x,))
    scores, _ = importance(model, groups, ["0"], [x], lambda m, b: m(b).mean(), Accelerator(cpu=True))
    torch.testing.assert_close(scores["0"], torch.tensor([81.0, *7 * [1.0]]) / 88)


def test_what_is_not_finite_names_the_group() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    x = torch.randn(4, 6)
    with pytest.raises(UserError, match="importance of group '0' is not finite"):
        importance(model, find_groups(model, (x,)), ["0"], [x], lambda m, b: m(b).mean(), Accelerator(cpu=True))
