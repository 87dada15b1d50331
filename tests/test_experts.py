"""Whole experts of a mixture as units, with the router's rows: how they are found, sliced, gated and trained."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload_trainer import Offloader, Plan, Structure, UserError, find_groups, slice_module, verify_groups
from offload_trainer.groups import read_rules
from offload_trainer.groups.experts import countable_on_fake_tensors
from offload_trainer.groups.slicing import named_tensors, with_tensors
from tests.models import llm, moe, tokens, vectors

ROUTED = "experts.gate_up_proj:0 experts.down_proj:0"
BIASED = "experts.gate_up_proj_bias:0 experts.down_proj_bias:0 router.weight:0 router.bias:0"


def drawn(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return moe(kind, device="cpu", **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "router", "units", "least", "slots"),
    [
        ("mixtral", {}, "mlp.gate", 4, 2, f"gate.weight:0 {ROUTED}"),
        ("qwen3_moe", {"head_dim": 16}, "mlp.gate", 4, 2, f"gate.weight:0 {ROUTED}"),
        ("olmoe", {}, "mlp.gate", 4, 2, f"gate.weight:0 {ROUTED}"),
        ("gpt_oss", {"head_dim": 16}, "mlp.router", 4, 2, f"{ROUTED} {BIASED}"),
        ("deepseek_v3", {}, "mlp.gate", 4, 2, f"gate.weight:0 gate.e_score_correction_bias:0 {ROUTED}"),
        (  # routing limited to 2 of 4 groups of experts: they are the units
            "deepseek_v3",
            {"n_group": 4, "topk_group": 2, "n_routed_experts": 12, "num_local_experts": 12},
            "mlp.gate",
            4,
            2,
            "gate.weight:0:3 gate.e_score_correction_bias:0:3 experts.gate_up_proj:0:3 experts.down_proj:0:3",
        ),
        ("llama4_text", {}, "feed_forward.router", 4, 2, f"router.weight:0 {ROUTED}"),
    ],
)
def test_experts_are_units(kind: str, settings: dict, router: str, units: int, least: int, slots: str):
    model = moe(kind, **settings)
    groups = find_groups(model, tokens())
    for layer in ("model.layers.0", "model.layers.1"):
        group = groups[f"{layer}.{router}"]
        below = f"{layer}.{router.split('.')[0]}."
        assert (group.units, group.least) == (units, least)
        assert {str(slot).removeprefix(below) for slot in group.slots} == set(slots.split())
    assert verify_groups(model, groups, tokens()) < 2e-5
    assert f"(≥ {least})" in str(groups)


# Sliced, against two references that know nothing of groups


PLAN = {"model.layers.0.mlp.gate": [0, 2, 3], "model.layers.1.mlp.gate": [1, 2, 3]}


def without_experts(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """The full model, whose routers give the experts that are not kept a logit of -∞."""

    def forward(router: Any, units: list[int]) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        def route(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            dropped = torch.ones(len(router.weight), dtype=torch.bool)
            dropped[units] = False
            logits = logits.masked_fill(dropped, float("-inf"))
            weights, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        return route

    model = copy.deepcopy(model)
    for path, units in kept.items():
        router = model.get_submodule(path)
        router.forward = forward(router, units)
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_dropped_experts_are_those_with_a_logit_of_minus_infinity(kind: str, implementation: str):
    model = drawn(kind)
    groups = find_groups(model, tokens())
    model.config._experts_implementation = implementation
    small = slice_module(model, Plan(groups, PLAN), groups).eval()
    assert small.config._experts_implementation == implementation
    expected = without_experts(model, PLAN).eval()(**tokens()).logits
    torch.testing.assert_close(small(**tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - model.eval()(**tokens()).logits).abs().max() > 1e-3, "the dropped experts matter"


def test_a_sliced_mixtral_is_the_smaller_mixtral():
    """Experts, their features, heads and the residual stream, against transformers' own model of those widths."""
    model = drawn("mixtral")
    groups = find_groups(model, tokens())
    kept = {g.name: torch.arange(g.units)[-max(g.least, g.units // 2) :] for g in groups if "self_attn" not in g.name}
    small = slice_module(model, Plan(groups, kept), groups).eval()
    own = llm(
        "mixtral",
        device="cpu",
        hidden_size=32,
        intermediate_size=48,
        head_dim=16,
        num_local_experts=2,
    )
    own.load_state_dict(small.state_dict())
    assert torch.equal(own.eval()(**tokens()).logits, small(**tokens()).logits)


def test_every_way_to_compute_experts_trains_the_same():
    """transformers' default included: it reads the number of experts from an attribute."""
    losses = {}
    for implementation in ("grouped_mm", "eager", "batched_mm"):
        model = drawn("mixtral")
        model.config._experts_implementation = implementation
        groups = find_groups(model, tokens())
        structure = Structure(groups, keep=0.5, seed=0)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
        loss_fn = lambda module, batch: module(**batch, labels=batch["input_ids"]).loss  # noqa: E731
        with Offloader(model, groups, loss_fn, optimizer=sgd, structure=structure, sync_every=2) as offloader:
            seen = []
            for _ in range(6):
                loss = offloader.loss(tokens())
                loss.backward()
                offloader.step()
                seen.append(loss.item())
                experts = offloader.subnet.model.layers[0].mlp.experts
                assert experts.num_experts == len(experts.down_proj) == 2
            losses[implementation] = seen
        assert model.config._experts_implementation == implementation, "tracing switches a copy"
    torch.testing.assert_close(losses["grouped_mm"], losses["eager"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["grouped_mm"], losses["batched_mm"], rtol=1e-5, atol=0)


def saved_bytes(model: nn.Module, inputs: Any) -> int:
    """What a forward keeps for the backward, parameters aside."""
    own = {tensor.untyped_storage()._cdata for tensor in named_tensors(model).values()}
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(size for storage, size in seen.items() if storage not in own)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_what_experts_save_for_the_backward_can_be_counted_on_fake_tensors(implementation: str):
    layer = drawn("mixtral").model.layers[0].mlp
    inputs = {"hidden_states": torch.randn(3, 11, 64)}
    expected = saved_bytes(layer, inputs)  # as grouped products, transformers' default
    layer.experts.config._experts_implementation = implementation
    with FakeTensorMode() as mode:
        fake = with_tensors(layer, {name: mode.from_tensor(tensor) for name, tensor in named_tensors(layer).items()})
        with countable_on_fake_tensors(fake):
            counted = saved_bytes(fake, {"hidden_states": mode.from_tensor(inputs["hidden_states"])})
    assert counted == pytest.approx(expected, abs=64)  # the ends of the experts' rows
    assert layer.experts.config._experts_implementation == implementation
    if implementation == "grouped_mm":
        assert saved_bytes(layer, inputs) == expected, "nothing stays switched"


# What is refused


def test_fewer_experts_than_the_router_chooses_are_refused():
    groups = find_groups(moe("mixtral"), tokens())
    with pytest.raises(UserError, match=r"keeps 1 units of group 'model.layers.0.mlp.gate'; at least 2 must stay"):
        Plan(groups, {"model.layers.0.mlp.gate": [3]})
    assert all(
        not group.name.endswith("gate") for group in find_groups(moe("mixtral", num_experts_per_tok=4), tokens())
    )


def test_rows_that_grouped_products_cannot_take_are_a_line():
    model = drawn("mixtral")
    groups = find_groups(model, tokens())
    plan = Plan(groups, {"model.layers.1.mlp.experts": range(13)})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.gate_up_proj is sliced to \(4, 26, 64\), .* of 4"):
        slice_module(model, plan, groups)
    model.config._experts_implementation = "eager"
    slice_module(model, plan, groups)(**tokens())


def test_a_router_that_is_forgotten_or_of_another_layer_is_caught():
    model = moe("mixtral", num_experts_per_tok=1)
    groups = find_groups(model, tokens())
    rules = {group.name: [str(slot) for slot in group.slots] for group in groups}
    zero, one = (f"model.layers.{i}.mlp" for i in (0, 1))
    weights = {mlp: [f"{mlp}.experts.gate_up_proj:0", f"{mlp}.experts.down_proj:0"] for mlp in (zero, one)}

    def proved(**routers: str) -> float:
        wrong = {f"{mlp}.gate": [*weights[mlp], *slots] for mlp, *slots in routers.values()}
        return verify_groups(model, read_rules(rules | wrong, model), tokens())

    assert proved(a=(zero, f"{zero}.gate.weight:0"), b=(one, f"{one}.gate.weight:0")) < 2e-5
    with pytest.raises(UserError, match=rf"does not run: {zero}.experts"):
        proved(a=(zero,))
    with pytest.raises(UserError, match=rf"(does not run:|'{one}.gate' meet in) {zero}.experts"):
        proved(a=(zero, f"{one}.gate.weight:0"), b=(one, f"{zero}.gate.weight:0"))


# Positions, wherever they come from


class Routed(nn.Module):
    """The best of 8 features chooses a row of a table; `how` says what else is done with its position."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.first = how, nn.Linear(6, 8)
        self.rows, self.head = nn.Parameter(torch.zeros(8, 5)), nn.Linear(8, 5)
        self.table = nn.Embedding(8, 5)

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        best = hidden.argmax(-1)
        out = self.head(torch.relu(hidden))
        if self.how == "rows":
            return out + self.rows[best]
        if self.how == "table":
            return out + self.table(hidden.max(-1).indices) * hidden.amax(-1, keepdim=True)
        if self.how == "gather":
            return out + hidden.gather(-1, hidden.topk(5, -1).indices).flip(-1)
        if self.how == "scatter":
            values, chosen = hidden.topk(3, -1)
            return self.head(torch.zeros_like(hidden).scatter(-1, chosen, values))
        if self.how == "picked":  # the second best of the three best
            return out + self.rows[hidden.topk(3, -1).indices.gather(-1, torch.ones_like(x[:, :1]).long())[:, 0]]
        if self.how == "written":
            chosen = hidden.topk(3, -1).indices
            return out + self.rows[torch.zeros_like(chosen).scatter(-1, torch.ones_like(chosen), chosen)].sum(1)
        if self.how == "computed":
            return out + self.rows[7 - best]
        if self.how == "number":
            return out * best.unsqueeze(-1)
        return out, best  # "returned"


@pytest.mark.parametrize(
    ("how", "least"),
    [("rows", 1), ("table", 1), ("gather", 5), ("scatter", 3), ("picked", 3)],
    ids=lambda value: str(value),
)
def test_positions_tie_what_they_address_to_where_they_come_from(how: str, least: int):
    groups = find_groups(Routed(how), vectors(6))
    (group,) = groups
    addressed = {"rows": {"rows:0"}, "picked": {"rows:0"}, "table": {"table.weight:0"}}.get(how, set())
    assert {str(slot) for slot in group.slots} == {"first.weight:0", "first.bias:0", "head.weight:1"} | addressed
    assert group.least == least
    assert verify_groups(Routed(how), groups, vectors(6), plans=6) < 1e-5


@pytest.mark.parametrize("how", ["written", "computed", "number", "returned"])
def test_an_axis_whose_positions_are_numbers_to_the_model_stays_whole(how: str):
    with pytest.raises(
        UserError, match=r"every axis is pinned .*(computes with positions in it|an output of the model)"
    ):
        find_groups(Routed(how), vectors(6))


def test_experts_go_one_by_one_and_their_features_in_steps():
    groups = find_groups(llm("mixtral", num_local_experts=8, num_experts_per_tok=2), tokens())
    steps = groups.width_steps(8)
    assert {steps[group.name] for group in groups if group.chosen} == {1}
    features = [group for group in groups if group.name.endswith("experts")]
    assert features and {steps[group.name] for group in features} == {8} and not any(g.chosen for g in features)
