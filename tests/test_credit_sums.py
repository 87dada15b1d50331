"""What backward passes say of each unit: against finite differences, and as a run gathers and uses it."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offload_trainer import Offloader, UserError
from offload_trainer.device.credit_sums import LAST, CreditSums
from offload_trainer.groups import Group, Groups, Plan, Slot, find_groups
from offload_trainer.groups.readers import find_readers, read_slots
from offload_trainer.structure import Structure
from tests import models
from tests.test_offloader import data, network, offloader, run


def smooth(module: nn.Module, inputs: Any) -> Tensor:
    """A loss without kinks, of whatever a model returns."""
    out = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    return (out.logits if hasattr(out, "logits") else out).double().mul(3).sin().mean()


def vision() -> nn.Module:
    torch.manual_seed(0)
    layers = [models.conv(3, 10), nn.SiLU(), models.conv(10, 12), nn.Flatten(), nn.Linear(12 * 16 * 16, 8), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(8, 5))


def embedded() -> nn.Module:
    """The first group is read by nothing but a norm: its gate is on all its slots."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, 4))


CASES = {
    "convolutions": (vision, lambda: models.images()),
    "linear": (embedded, lambda: (torch.randn(5, 6, generator=torch.Generator().manual_seed(1)),)),
    "llama": (lambda: models.llm("llama", device="cpu"), models.tokens),
    "gpt2, fused heads": (lambda: models.llm("gpt2", device="cpu"), models.tokens),
    "phi3, fused projections": (lambda: models.llm("phi3", device="cpu", pad_token_id=0), models.tokens),
}


@pytest.mark.parametrize("case", CASES)
def test_credit_is_the_derivative_for_a_gate_on_what_reads_a_unit(case: str) -> None:
    torch.manual_seed(3)
    model, inputs = CASES[case][0](), CASES[case][1]()
    model = model.double().eval()
    if not isinstance(inputs, dict):
        inputs = tuple(x.double() for x in inputs)
    groups = find_groups(model, inputs)
    structure = Structure(groups, keep=0.5, control="linear", seed=2)
    readers = find_readers(model, groups)
    credit_sums = CreditSums(model, groups, structure.names)
    arguments: dict[str, Any] = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "sync_every": 5}
    with Offloader(model, groups, smooth, structure=structure, accelerator=Accelerator(cpu=True), **arguments) as o:
        o.begin_round()
        plan, subnet = o.plan, o._bench.subnet
        o.subnet.eval()
        smooth(o.subnet, inputs).backward()
        credit_sums.add(plan, subnet.parameters)
        means = credit_sums.take()
        assert means is not None
        found = credit_sums.by_group(means, plan)
        assert found is not None and list(found) == list(structure.names)
        assert credit_sums.take() is None
        for name in structure.names:
            slots = {slot for _, slot in read_slots(readers, groups, name)}
            for unit in range(len(plan[name])):
                change = [_loss_scaled(o.subnet, groups, plan, name, slots, unit, 1 + e, inputs) for e in (1e-4, -1e-4)]
                derivative = (change[0] - change[1]) / 2e-4
                assert float(found[name][0, unit]) == pytest.approx(derivative, rel=0.02, abs=1e-5), (
                    name,
                    unit,
                )  # norms compute in float32
            torch.testing.assert_close(found[name][1], found[name][0].square())


def _loss_scaled(module: nn.Module, groups, plan, name: str, slots, unit: int, factor: float, inputs: Any) -> float:
    """The loss with the weights that read the unit (its place in the plan) times a factor."""
    scaled = copy.deepcopy(module)
    tensors = dict(scaled.named_parameters())
    for slot in slots or groups.slots(name):
        if slot.tensor in tensors:
            first = slot.offset + int(plan[name][unit]) * slot.block
            index = plan.index(slot.tensor, slot.axis)
            assert index is not None
            places = ((index >= first) & (index < first + slot.block)).nonzero().flatten()
            weight = tensors[slot.tensor].data
            weight.index_copy_(slot.axis, places, weight.index_select(slot.axis, places) * factor)
    with torch.no_grad():
        return float(smooth(scaled, inputs))


def test_means_over_the_last_batches_of_a_round_reach_the_structure() -> None:
    trainer = offloader(network(), control="linear")
    own, seen = CreditSums(network(), trainer.groups, trainer.structure.names), []
    with trainer:
        for i, batch in enumerate(data(14)):
            trainer.accelerator.backward(trainer.loss(batch))
            if i % 7 >= 7 - LAST:
                own.add(trainer.plan, trainer._bench.subnet.parameters)
            if i % 7 == 6:
                seen.append((trainer.plan, own.by_group(own.take(), trainer.plan)))
            trainer.step()
    (first, found), _ = seen
    assert found is not None
    structure = offloader(network(), control="linear").structure
    structure.follow()
    structure.update(None, first, found)
    state, whole = structure.state_dict(), trainer.structure.state_dict()
    once = state["credit.seen"] & ~torch.cat([_mask(seen[1][0][n], len(s)) for n, s in structure.s.items()])
    assert torch.equal(whole["credit.features"][:, once], state["credit.features"][:, once]) and bool(once.any())


def _mask(kept: Tensor, units: int) -> Tensor:
    return torch.zeros(units, dtype=torch.bool).index_fill(0, kept, True)


def test_credit_needs_no_second_subnet() -> None:
    kept = {}
    for estimator in ("rloo", "credit"):
        with offloader(network(), estimator=estimator, reference="fresh") as trainer:
            run(trainer, data(3))
            kept[estimator] = trainer._bench.nbytes
            assert (trainer._bench._reference is None) == (estimator == "credit")
            run(trainer, data(18))
            assert trainer.report.difference is None or estimator == "rloo"
            assert float(trainer.structure.flat.std()) > 0
    assert kept["credit"] < kept["rloo"]


@pytest.mark.parametrize("name", list(models.FAMILIES))
def test_every_family_can_be_credited_or_left_alone(name: str) -> None:
    model, _inputs = models.FAMILIES[name]()
    groups = find_groups(model, _inputs)
    assert CreditSums(model, groups, ()).take() is None
    credit_sums = CreditSums(model, groups, [group.name for group in groups])
    assert all(slots for slots in credit_sums._slots.values())


def test_a_weight_that_is_computed_reads_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    nn.utils.parametrizations.weight_norm(model[2])
    assert [reader.path for reader in find_readers(model, find_groups(model, models.vectors(6)))] == ["4"]


def test_groups_that_share_elements_are_refused() -> None:
    shapes = {"w": torch.Size([12, 3])}
    groups = Groups((Group("heads", 3, (Slot("w", 0, 4),)), Group("features", 12, (Slot("w", 0),))), shapes)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(12, 3))
    with pytest.raises(UserError, match="groups 'heads' and 'features' share elements of w"):
        CreditSums(model, groups, ["heads", "features"])


def test_a_credit_that_is_not_finite_ends_the_round_before_it_reaches_the_master() -> None:
    trainer = offloader(network(), control="linear", paired_batches=1)
    with pytest.raises(UserError, match="what s learns from, a loss of the reference or a gradient"), trainer:
        batches = data(14)
        run(trainer, batches[:13])
        before = {name: tensor.clone() for name, tensor in trainer.master.items()}
        trainer.accelerator.backward(trainer.loss(batches[13]))
        trainer._credit_sums.add(trainer.plan, {n: p for n, p in trainer._bench.subnet.parameters.items()})
        assert trainer._credit_sums._sums is not None
        trainer._credit_sums._sums += float("nan")
        trainer.step()
    assert trainer.boundary().numbers["steps"] == 7
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.master.items())


def test_magnitude_is_the_size_of_what_reads_a_unit() -> None:
    with offloader(network(), estimator="magnitude", paired_batches=2) as trainer:
        run(trainer, data(6))
        trainer.accelerator.backward(trainer.loss(data(1)[0]))
        plan, linear = trainer.plan, {n: p.detach().clone() for n, p in trainer.subnet.named_parameters()}["10.weight"]
        trainer._credit_sums.take()
        trainer._credit_sums.add(plan, trainer._bench.subnet.parameters)
        found = trainer._credit_sums.by_group(trainer._credit_sums.take(), plan)
        assert found is not None
    torch.testing.assert_close(found["8"][0], linear.square().sum(0))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 7)
        self.w = nn.Parameter(torch.randn(7, dtype=torch.cfloat))
        self.v = nn.Parameter(torch.randn(7, 3, dtype=torch.cfloat))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        inner, w, v = self.inner(x), self.w, self.v
        if gate is not None:  # on each
            inner, w, v = gate * inner, gate * w, gate[:, None] * v
        return ((inner * w) @ v).abs()


@pytest.mark.parametrize("magnitude", [False, True])
def test_complex_parameters_count_as_pairs_of_numbers(magnitude: bool) -> None:
    torch.manual_seed(0)
    model, x = Complex(), torch.randn(9, 6)
    groups = find_groups(model, (x,))
    (name,) = [group.name for group in groups]
    credit_sums, plan = CreditSums(model, groups, [name], magnitude=magnitude), Plan.whole(groups)
    gate = torch.ones(7, requires_grad=True)
    model(x, gate).square().mean().backward()
    credit_sums.add(plan, dict(model.named_parameters()))
    found = credit_sums.by_group(credit_sums.take(), plan)
    assert found is not None and gate.grad is not None
    if magnitude:
        sizes = [p.detach().abs().square().flatten(1).sum(1) for p in (model.inner.weight, model.v)]
        vectors = [p.detach().abs().square() for p in (model.inner.bias, model.w)]
        expected = sum([*sizes, *vectors], torch.zeros(7))
    else:
        expected = gate.grad  # on all that the unit is: its own row and bias, w, and its row of v
    torch.testing.assert_close(found[name][0], expected)


def test_looking_for_readers_computes_nothing() -> None:
    """Reading a parametrized weight would move the buffers of a spectral norm on."""
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(9, 4)))
    groups = find_groups(model, (torch.randn(3, 6),))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    find_readers(model, groups)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
