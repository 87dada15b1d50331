"""The proof itself: it catches hand-written rules that are wrong, and does not pass for want of evidence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_trainer import Groups, UserError, find_groups, verify_groups
from offload_trainer.groups import random_plan, read_rules
from offload_trainer.groups.slicing import named_tensors, narrowed
from tests import models
from tests.models import FAMILIES, MLP, images, llm, tokens, vectors
from tests.runs import growth

FULL, NARROW = 2**28, 0
at_every_size = pytest.mark.parametrize("above", [FULL, NARROW], ids=["full size", "stand-in"])


def by_hand(groups: Groups, model: nn.Module, **changed: list[str]) -> Groups:
    """The groups found, written out as rules, some of them changed."""
    rules = {group.name: [str(slot) for slot in group.slots] for group in groups}
    return read_rules(rules | changed, model)


@at_every_size
@pytest.mark.parametrize("family", ["unet", "norms", "llama, tied", "phi3", "resnet32"])
def test_groups_written_by_hand_are_proved_like_those_found(family: str, above: int):
    model, inputs = FAMILIES[family]()
    groups = find_groups(model, inputs)
    assert verify_groups(model, by_hand(groups, model), inputs, narrow_above=above) < 2e-5


@at_every_size
@pytest.mark.parametrize(
    ("slots", "where"),
    [
        (["first.weight:0", "first.bias:0"], "second"),  # the consumer is missing
        (["first.weight:0", "second.weight:1"], "first"),  # the bias is missing
        (["first.weight:0", "first.bias:0", "second.weight:0"], "second"),  # wrong axis
    ],
)
def test_rules_that_do_not_fit_together_are_named_by_the_module_that_breaks(slots: list[str], where: str, above: int):
    model = MLP()
    with pytest.raises(UserError, match=rf"a sliced subnetwork of this model does not run: {where} \(Linear\)"):
        verify_groups(model, read_rules({"hidden": slots}, model), vectors(6), narrow_above=above)


class Two(nn.Module):
    """Two projections that are concatenated: wrong slots still fit."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.cat([self.a(x), self.b(x)], 1)))


A, B = ["a.weight:0", "a.bias:0"], ["b.weight:0", "b.bias:0"]


@at_every_size
def test_a_wrong_offset_is_caught_and_the_module_named(above: int):
    model = Two()
    right = read_rules({"a": [*A, "head.weight:1"], "b": [*B, "head.weight:1:1:8"]}, model)
    assert verify_groups(model, right, vectors(6), narrow_above=above) < 1e-5
    swapped = read_rules({"a": [*A, "head.weight:1:1:8"], "b": [*B, "head.weight:1"]}, model)
    with pytest.raises(UserError, match=r"groups 'a' and 'b' meet in head \(Linear\): a slot of one of them is wrong"):
        # Widths differ from plan to plan, so that the columns fit is luck; that they are the wrong ones is seen.
        verify_groups(model, swapped, vectors(6), narrow_above=above)


@at_every_size
def test_a_wrong_block_is_caught(above: int):
    """Heads of 4 taken for single features: every shape fits."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x)).unflatten(-1, (-1, 2)).transpose(1, 2).flatten(1)  # (2, 4) from (4, 2)
            return self.head(torch.relu(self.second(hidden)))

    model = Heads()
    rules = ["first.weight:0:2", "first.bias:0:2", "second.weight:1", "second.weight:1:1:4"]
    assert verify_groups(model, read_rules({"pairs": rules}, model), vectors(6), narrow_above=above) < 1e-5
    with pytest.raises(UserError, match=r"second \(Linear\) takes units of .* apart|first seen in second"):
        verify_groups(
            model, read_rules({"pairs": [*rules[:2], "second.weight:1:2"]}, model), vectors(6), narrow_above=above
        )


@at_every_size
def test_one_missing_slot_of_a_llama_is_caught(above: int):
    model = llm("llama")
    groups = find_groups(model, tokens())
    name = "model.layers.1.mlp"
    rest = [str(slot) for slot in groups.slots(name) if "up_proj" not in str(slot)]
    with pytest.raises(UserError, match=r"does not run: model.layers.1.mlp \(LlamaMLP\)"):
        verify_groups(model, by_hand(groups, model, **{name: rest}), tokens(), narrow_above=above)


@at_every_size
def test_a_forgotten_statistic_is_caught(above: int):
    model, inputs = FAMILIES["conv flatten linear"]()
    groups = find_groups(model, inputs)
    rest = [str(slot) for slot in groups.slots("conv") if "running_var" not in str(slot)]
    with pytest.raises(UserError, match=r"does not run: norm \(BatchNorm2d\)"):
        verify_groups(model, by_hand(groups, model, conv=rest), inputs, narrow_above=above)


@at_every_size
def test_a_missing_width_rule_is_caught(above: int):
    rule = {models.Attention: {"heads": ("qkv.weight", 0)}}
    groups = find_groups(models.ViT(free=False), images(), widths=rule)
    assert verify_groups(models.ViT(free=False), groups, images(), narrow_above=above) < 1e-5
    forgotten = Groups(groups.groups, groups.shapes)
    with pytest.raises(UserError, match=r"does not run: attention \(Attention\) .*heads=4"):
        verify_groups(models.ViT(free=False), forgotten, images(), narrow_above=above)


def a_billion_parameters() -> Callable[[], None]:
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64)
    model = llm("llama", vocab_size=128256, num_hidden_layers=16, **sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e9
    groups = find_groups(model, tokens())

    def measured() -> None:
        assert verify_groups(model, groups, tokens()) < 2e-5

    return measured


def test_a_billion_parameters_are_proved_in_little_memory():
    """A float32 copy of it would be 5 GB, of its embeddings 1 GB."""
    assert growth(a_billion_parameters) < 0.75 * 2**30


def test_a_stand_in_has_some_units_of_every_group():
    model, inputs = FAMILIES["phi3"]()
    groups = find_groups(model, inputs)
    narrow, its_groups = narrowed(model, groups, 8, torch.Generator().manual_seed(0))
    assert {group.name: group.units for group in its_groups} == {g.name: min(8, g.units) for g in groups}
    assert {name: tensor.shape for name, tensor in named_tensors(narrow).items()} == its_groups.shapes
    assert all(parameter.is_meta for parameter in narrow.parameters())
    assert [str(slot) for slot in its_groups.slots("model.layers.1.mlp.gate_up_proj")] == [
        "model.layers.1.mlp.gate_up_proj.weight:0",
        "model.layers.1.mlp.gate_up_proj.weight:0:1:8",  # behind 8 gates that stay of 96
        "model.layers.1.mlp.down_proj.weight:1",
    ]
    assert find_groups(narrow, inputs).groups == its_groups.groups


class Constant(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 5) + 0 * super().forward(x)


class Zero(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * super().forward(x)


class NotANumber(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(-1 - super().forward(x).abs())


class PartlyNotANumber(MLP):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.cat([out, torch.log(-1 - out.abs())], 1)


class Ignored(nn.Module):
    """One branch does not count."""

    def __init__(self):
        super().__init__()
        self.one, self.two = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + 0 * self.two(x)


class Position(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Constant(), r"outputs do not depend on group 'first' \(first slot first.weight:0\)"),
        (Zero(), "outputs are zero or not a number on random weights, so nothing can be verified"),
        (NotANumber(), "outputs are zero or not a number on random weights, so nothing can be verified"),
        (PartlyNotANumber(), "outputs are zero or not a number on random weights, so nothing can be verified"),
        (Ignored(), r"outputs do not depend on group 'two.first' \(first slot two.first.weight:0\)"),
        (Position(), "outputs are zero or not a number"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_evidence_is_no_proof(model: nn.Module, message: str):
    groups = find_groups(model, vectors(6))
    with pytest.raises(UserError, match=message):
        verify_groups(model, groups, vectors(6))


def test_a_group_that_counts_on_some_weights_only_is_seen_in_the_end():
    class Switched(Ignored):
        def __init__(self):
            super().__init__()
            self.switch = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + (self.switch < 0) * self.two(x)

    groups = find_groups(Switched(), vectors(6))
    assert all(verify_groups(Switched(), groups, vectors(6), plans=1, seed=seed) < 1e-5 for seed in range(4))


def test_masked_logits_are_no_obstacle():
    class Masked(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.arange(5) > 3, float("-inf"))

    groups = find_groups(Masked(), vectors(6))
    assert verify_groups(Masked(), groups, vectors(6)) < 1e-5


def test_outputs_without_a_gradient_are_proved_by_gating():
    class Detached(MLP):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    groups = find_groups(Detached(), vectors(6))
    assert verify_groups(Detached(), groups, vectors(6)) < 1e-5


def test_zeros_at_initialisation_hide_nothing():
    """A zero-initialised output layer and a zero layer scale: verification draws its own weights."""
    model, inputs = FAMILIES["convnext block"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    groups = find_groups(model, inputs)
    assert verify_groups(model, groups, inputs) < 1e-5
    assert not any(parameter.any() for parameter in model.parameters()), "the model itself is left alone"


def test_deep_networks_hear_their_first_layer():
    model, inputs = FAMILIES["resnet50"]()
    verify_groups(model, find_groups(model, inputs), inputs, plans=1)


def test_the_model_may_be_bfloat16_with_inputs_of_its_own():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).bfloat16()
    inputs = (images()[0].bfloat16(),)
    assert verify_groups(model, find_groups(model, inputs), inputs) < 1e-5


@at_every_size
def test_a_scale_by_the_width_found_at_run_time_is_refused(above: int):
    """Not a slicing error, but a subnet that computes something else than a gated network: it is not passed over."""

    class Scaled(MLP):
        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.first(x))
            return self.second(hidden * hidden.shape[-1] ** -0.5)

    groups = find_groups(Scaled(), vectors(6))
    with pytest.raises(UserError, match="first seen in second"):
        verify_groups(Scaled(), groups, vectors(6), narrow_above=above)


def test_random_plans_are_valid_reproducible_and_uneven_when_asked():
    model, inputs = FAMILIES["resnet32"]()
    groups = find_groups(model, inputs)
    even = random_plan(groups, torch.Generator().manual_seed(0), 0.25)
    assert {len(even[group.name]) for group in groups if group.units == 16} == {4}
    assert even == random_plan(groups, torch.Generator().manual_seed(0), 0.25)
    uneven = random_plan(groups, torch.Generator().manual_seed(0), spread=0.3)
    assert len({len(uneven[group.name]) for group in groups if group.units == 16}) > 1
    tiny = random_plan(groups, torch.Generator().manual_seed(0), 0.001)
    assert {len(tiny[group.name]) for group in groups} == {1}


def test_ties_of_one_layer_used_twice_are_not_confused_by_its_calls():
    model = models.SharedTwice()
    groups = find_groups(model, vectors(6))
    rules = {"encoder": ["encoder.weight:0", "encoder.bias:0", "layer.weight:0", "layer.bias:0"]}
    with pytest.raises(UserError, match=r"does not run: layer \(Linear\)"):
        verify_groups(model, read_rules(rules, model), vectors(6))
    assert verify_groups(model, groups, vectors(6)) < 1e-5


class Auxiliary(MLP):
    """A head that training alone runs. odd: it adds noise, which no proof can look through."""

    def __init__(self, *, odd: bool = False):
        super().__init__()
        self.auxiliary = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 3))
        self.odd = odd

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        if not self.training:
            return out
        noise = torch.rand(()) if self.odd else 0
        return out, self.auxiliary(x) + noise


def test_what_only_training_runs_is_verified_there():
    groups = find_groups(Auxiliary(), vectors(6))
    assert "auxiliary.0" in [group.name for group in groups]
    assert verify_groups(Auxiliary(), groups, vectors(6)) < 1e-5
    with pytest.raises(UserError, match=r"auxiliary.0.*where only training needs it, do without this proof"):
        verify_groups(Auxiliary(odd=True), find_groups(Auxiliary(odd=True), vectors(6)), vectors(6))


def test_a_wrong_slot_of_what_only_training_runs_is_seen():
    groups = find_groups(Auxiliary(), vectors(6))
    wrong = by_hand(groups, Auxiliary(), **{"auxiliary.0": ["auxiliary.0.weight:0", "auxiliary.2.weight:1"]})
    with pytest.raises(UserError, match=r"auxiliary"):
        verify_groups(Auxiliary(), wrong, vectors(6))


class Noisy(MLP):
    """Draws numbers in evaluation, where no slice reaches (`inside` False) or as many as a group has units."""

    def __init__(self, inside: bool):
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            return super().forward(x + torch.randn_like(x))
        hidden = self.first(x)
        return self.second(hidden + torch.randn_like(hidden))


def test_random_numbers_are_the_same_for_both_or_named() -> None:
    for inside in (False, True):
        model = Noisy(inside)
        groups = find_groups(model, vectors(6))
        if inside:
            with pytest.raises(UserError, match="draws random numbers in its forward"):
                verify_groups(model, groups, vectors(6))
        else:
            assert verify_groups(model, groups, vectors(6)) < 1e-5


def test_what_a_forward_writes_into_a_weight_counts() -> None:
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.out = nn.Embedding(9, 6, max_norm=0.5), nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(torch.relu(self.up(self.embed(tokens))))

    inputs = (torch.arange(9).view(3, 3),)
    groups = find_groups(Renormed(), inputs)
    assert [group.units for group in groups] == [10]
    assert verify_groups(Renormed(), groups, inputs) < 1e-5
