"""Kept units stand in for the others: by least squares, where that can be, and in a run."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from offload_trainer import run
from offload_trainer.groups import Plan, find_groups, slice_module
from offload_trainer.initial import standins
from offload_trainer.initial.standins import in_parts, linear_readers, scratch_bytes, stand_in
from tests import models, runs
from tests.test_importance import llama, llm_loss


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Of two rows each: more tokens than any layer has features."""
    return [torch.randint(60, (8, 21), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def half(model: nn.Module, *patterns: str) -> Plan:
    groups = find_groups(model, models.tokens())
    chosen = [group for group in groups if any(pattern in group.name for pattern in patterns)]
    return Plan(groups, {group.name: torch.arange(0, group.units, 2) for group in chosen})


def master_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters()}


def test_a_layer_comes_as_near_as_it_can(batches: list[torch.Tensor]) -> None:
    """Against torch's own least squares, on what the layer really reads."""
    model, seen = llama().eval(), []
    plan = half(model, "1.mlp")
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch[:, :-1])
    handle.remove()
    x, kept = torch.cat(seen).double(), plan.index("model.layers.1.mlp.down_proj.weight", 1)
    assert kept is not None
    before = down.weight.detach().clone()
    others = torch.ones(before.shape[1], dtype=torch.bool).index_fill(0, kept, False)
    lost = x[:, others] @ before[:, others].double().T
    squares = x[:, kept].square().mean(0)
    ridge = ((standins.RIDGE * squares + 1e-6 * squares.mean()) * len(x)).sqrt().diag()
    stacked, wanted = torch.cat([x[:, kept], ridge]), torch.cat([lost, torch.zeros(len(kept), lost.shape[1])])
    expected = before[:, kept].double() + torch.linalg.lstsq(stacked, wanted).solution.T
    assert stand_in(model, master_of(model), plan, batches, llm_loss, Accelerator(cpu=True)) == 1
    torch.testing.assert_close(down.weight[:, kept].double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(down.weight[:, others], before[:, others])
    error = [
        (x @ before.double().T - x[:, kept] @ w[:, kept].double().T).square().mean()
        for w in (before, down.weight.detach())
    ]
    assert float(error[1]) < 0.8 * float(error[0])


def test_a_dead_layer_is_left_alone(batches: list[torch.Tensor]) -> None:
    model = llama().eval()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data.zero_()
    before = model.get_submodule("model.layers.1.mlp.down_proj").weight.detach().clone()
    assert stand_in(model, master_of(model), half(model, "1.mlp"), batches, llm_loss, Accelerator(cpu=True)) == 1
    assert torch.equal(model.get_submodule("model.layers.1.mlp.down_proj").weight, before)


def test_frozen_weights_are_left_alone() -> None:
    model = llama()
    model.get_submodule("model.layers.1.mlp.down_proj").weight.requires_grad_(False)
    paths = [reader.path for reader in linear_readers(model, find_groups(model, models.tokens()))]
    assert "model.layers.1.mlp.down_proj" not in paths and len(paths) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sliced_model_is_nearer_to_the_whole_one(kind: str, batches: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = llama() if kind == "llama" else models.llm("gpt2", device="cpu")
    for parameter in model.parameters():
        parameter.data.mul_(3)  # of tiny random weights nothing would show
    model.eval()
    plan = half(model, "mlp", "attn")

    def logits(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([module(input_ids=batch[:, :-1]).logits for batch in batches])

    whole = logits(model)
    before = slice_module(model, plan, plan.groups).eval()
    changed = stand_in(model, master_of(model), plan, batches, llm_loss, Accelerator(cpu=True))
    assert changed == len(plan._chosen) == 4
    after = slice_module(model, plan, plan.groups).eval()
    assert (logits(after) - whole).norm() < 0.95 * (logits(before) - whole).norm()


def test_where_a_norm_reduces_or_a_weight_is_shared_nothing_is_taken() -> None:
    model = llama()
    groups = find_groups(model, models.tokens())
    paths = [reader.path for reader in linear_readers(model, groups)]
    assert all(path.endswith(("down_proj", "o_proj")) for path in paths) and len(paths) == 4  # not of the residual
    vision = nn.Sequential(models.conv(3, 8), models.conv(8, 8), nn.Flatten(), nn.Linear(8 * 256, 6), nn.ReLU(),
                           nn.Linear(6, 5))  # fmt: skip
    found = linear_readers(vision, find_groups(vision, models.images()))
    assert [reader.path for reader in found] == ["3", "5"]


def test_layers_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch, batches: list[torch.Tensor]) -> None:
    changed = []
    for at_once in (standins.AT_ONCE, 1):
        monkeypatch.setattr(standins, "AT_ONCE", at_once)
        model = llama().eval()
        plan = half(model, "self_attn")
        readers = linear_readers(model, plan.groups)
        assert len(list(in_parts(readers, plan.groups))) == (1 if at_once > 1 else len(readers))
        stand_in(model, master_of(model), plan, batches, llm_loss, Accelerator(cpu=True))
        changed.append(model.get_submodule("model.layers.0.self_attn.o_proj").weight.detach().clone())
        assert all(size > 0 for size in scratch_bytes(model, plan))
    torch.testing.assert_close(*changed)


def test_a_run_says_how_many_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.config(tmp_path, **{"structure.start": "importance", "structure.settle": 1, "track.display": "plain"})
    assert run.main(["--config", str(config)]) == 0
    assert "kept units stand in for the others in" in capsys.readouterr().out
    words = ["--out", str(tmp_path / "other"), "--structure.stand_in", "false"]
    assert run.main(["--config", str(config), *words]) == 0
    assert "stand in" not in capsys.readouterr().out


class Aside(nn.Module):
    """Of two layers one is never called: its weight is read by itself, as Mamba reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (self.a(x).relu() @ self.b.weight.T).relu()
        return self.d(self.c(hidden))


def test_a_layer_that_is_never_called_is_left_alone() -> None:
    model, x = Aside(), torch.randn(30, 6)
    groups = find_groups(model, (x,))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = Plan(groups, {"a": torch.arange(4), "b": torch.arange(5)})
    assert stand_in(model, master_of(model), plan, [x], lambda m, b: m(b).mean(), Accelerator(cpu=True)) == 1
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"c.weight"}
