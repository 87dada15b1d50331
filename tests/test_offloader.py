"""The rounds: DESIGN §10, 1 and 2, and what a round must not do."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch._dynamo
from accelerate import Accelerator
from torch import nn

from offload_trainer import Group, Offloader, Structure, UserError, find_groups, verify_groups
from offload_trainer.device import workbench
from offload_trainer.device.swap import Swap
from offload_trainer.groups import Plan, slice_module
from offload_trainer.master.master import _require_apart
from offload_trainer.round import Round, require_arguments

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SGD: Factory = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4)  # noqa: E731
ADAMW: Factory = lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.99))  # noqa: E731


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, stride=2),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(80, 16),
        nn.Dropout(0.1),
        nn.Linear(16, 5),
    )


def data(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator))
        for _ in range(count)
    ]


def loss_fn(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def offloader(model: nn.Module, factory: Factory = ADAMW, sync_every: int = 7, **structure) -> Offloader:
    of_offloader = ("state", "clip_norm", "precision", "reference", "overlap", "folder", "transfer")
    extra = {key: structure.pop(key) for key in of_offloader if key in structure}
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    keep = structure.pop("keep", 0.5)
    made = Structure(groups, keep, **structure)
    return Offloader(model, groups, loss_fn, optimizer=factory, structure=made, sync_every=sync_every, **extra)


def run(trainer: Offloader, batches) -> list[float]:
    losses = []
    for batch in batches:
        loss = trainer.loss(batch)
        trainer.accelerator.backward(loss)
        trainer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("factory", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("sync_every", [1, 7, 100])
def test_keep_1_is_plain_training_bit_for_bit(factory: Factory, sync_every: int) -> None:
    plain = network()
    optimizer = factory(list(plain.parameters()))
    torch.manual_seed(5)  # dropout
    expected = []
    for batch in data(24):
        loss = loss_fn(plain, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    model = network()
    torch.manual_seed(5)
    with offloader(model, factory, sync_every, keep=1.0) as trainer:
        assert run(trainer, data(24)) == expected
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, trainer.master[name]), name


def test_keep_1_with_clipping_is_plain_training() -> None:
    plain = network()
    optimizer = SGD(list(plain.parameters()))
    torch.manual_seed(5)
    for batch in data(9):
        loss_fn(plain, batch).backward()
        nn.utils.clip_grad_norm_(list(plain.parameters()), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    model = network()
    torch.manual_seed(5)
    with offloader(model, SGD, 4, keep=1.0, clip_norm=0.1) as trainer:
        run(trainer, data(9))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, trainer.master[name]), name


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
@pytest.mark.parametrize("factory", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_round_changes_what_the_plan_keeps_and_nothing_else(factory: Factory, sampler: str) -> None:
    with offloader(network(), factory, sampler=sampler) as trainer:
        for batches in (data(28)[i : i + 7] for i in range(0, 28, 7)):
            trainer.begin_round()
            plan, subnet = trainer.plan, trainer.subnet
            stores = {"weights": trainer.master, **trainer.moments}
            before = {kind: {n: t.clone() for n, t in store.items()} for kind, store in stores.items()}
            run(trainer, batches)  # the last step ends the round
            trainer.finish_round()  # and is written back
            trained = dict(subnet.named_parameters()) | dict(subnet.named_buffers())
            for kind, store in stores.items():
                for name, tensor in store.items():
                    inside = torch.zeros(tensor.shape, dtype=torch.bool)
                    kept = zip(plan.indices(name), tensor.shape, strict=True)
                    rows = [torch.arange(size) if index is None else index for index, size in kept]
                    inside[torch.meshgrid(*rows, indexing="ij") if rows else ()] = True
                    assert torch.equal(tensor[~inside], before[kind][name][~inside]), (kind, name)
                    if kind == "weights":
                        assert torch.equal(tensor[inside], trained[name].detach().flatten()), name
            assert any(not torch.equal(trainer.master[n], before["weights"][n]) for n in before["weights"])


def test_gathered_values_are_the_masters() -> None:
    with offloader(network()) as trainer:
        trainer.begin_round()
        for name, tensor in [*trainer.subnet.named_parameters(), *trainer.subnet.named_buffers()]:
            full = trainer.master[name]
            for axis, index in enumerate(trainer.plan.indices(name)):
                full = full if index is None else full.index_select(axis, index)
            assert torch.equal(tensor, full), name


def test_fixed_plans_reuse_the_same_tensors_in_place() -> None:
    with offloader(network()) as trainer:
        addresses, optimizers = set(), set()
        for _ in range(4):
            run(trainer, data(7))
            trainer.begin_round()
            addresses.add(tuple(p.data_ptr() for p in trainer.subnet.parameters()))
            optimizers.add(id(trainer.optimizer))
        assert len(addresses) == len(optimizers) == 1


def test_the_reference_leaves_no_trace() -> None:
    """Without learning s, runs with and without pairs are the same: no statistics, no random state, no gradients."""
    results = []
    for pairs in (1, 7):
        model = network()
        torch.manual_seed(5)
        with offloader(model, lr=0.0, paired_batches=pairs) as trainer:
            run(trainer, data(21))
        results.append({name: tensor.clone() for name, tensor in trainer.master.items()})
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_nor_does_it_when_the_loss_fails() -> None:
    results, failing = [], False

    def failing_loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss = loss_fn(module, batch)
        if failing:
            raise ArithmeticError
        return loss

    for tried in (False, True):
        model = network()
        groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
        torch.manual_seed(5)
        with Offloader(
            model, groups, failing_loss, optimizer=ADAMW, structure=Structure(groups, 0.5, lr=0.0), sync_every=4
        ) as trainer:
            failing = tried
            if tried:
                with pytest.raises(ArithmeticError):
                    trainer.loss(data(1)[0])  # the reference's comes first
            failing = False
            run(trainer, data(8))
        results.append({name: tensor.clone() for name, tensor in trainer.master.items()})
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_the_difference_is_the_mean_over_the_paired_batches() -> None:
    with offloader(network(), SGD, paired_batches=2) as trainer:
        trainer.begin_round()
        reference = trainer._bench._reference
        assert reference is not None
        torch.manual_seed(5)
        expected = []
        for batch in data(2):
            state = torch.get_rng_state()
            with torch.no_grad():
                against = loss_fn(reference.module, batch)  # its own statistics do not matter in training mode
            torch.set_rng_state(state)
            loss = trainer.loss(batch)
            trainer.accelerator.backward(loss)
            trainer.step()
            expected.append(loss.item() - against.item())
        run(trainer, data(7)[2:])
        assert trainer.report.difference == pytest.approx(sum(expected) / 2, rel=1e-5)


@pytest.mark.parametrize("late", [150, 1000])
def test_a_unit_that_comes_in_late_takes_no_oversized_step(late: int) -> None:
    """Raw moments under a common step count would make it about (1−β₁)/√(1−β₂) learning rates: here 3.2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40, bias=False), nn.Tanh(), nn.Linear(40, 3))
    lr = 1e-3
    groups = find_groups(model, (torch.zeros(3, 8),))
    structure = Structure(groups, keep=0.5, lr=0.0)
    name = structure.names[0]
    structure.s[name].fill_(1.0)[30:] = 0.0  # units 30… are never drawn
    batch = (torch.randn(16, 8), torch.randint(3, (16,)))
    with Offloader(
        model,
        groups,
        loss_fn,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), weight_decay=0.0),
        structure=structure,
        sync_every=50,
        reference="fresh",  # so that the next plan follows from s as it is now
    ) as trainer:
        run(trainer, [batch] * late)
        structure.s[name].fill_(1.0)[:20] = 0.0
        trainer.begin_round()
        new = trainer.plan[name] >= 30
        assert new.any()
        assert float(trainer.moments["exp_avg_sq"]["0.weight"][30:].max()) == 0.0  # never trained
        before = trainer.subnet.get_parameter("0.weight").detach().clone()
        run(trainer, [batch])
        step = (trainer.subnet.get_parameter("0.weight").detach() - before).abs()[new]
        assert float(step.max()) <= 1.05 * lr
        assert float(step.median()) >= 0.5 * lr  # nor is it held back


@pytest.mark.parametrize("overlap", [False, True], ids=["one after another", "overlapping"])
@pytest.mark.parametrize(
    "factory",
    [
        lambda params: torch.optim.Rprop(params, lr=1e-2),
        lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=10.0),
    ],
    ids=["rprop", "adagrad"],
)
def test_state_that_starts_elsewhere_than_at_zero_does_so_for_late_units(factory: Factory, overlap: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 5))
    groups = find_groups(model, (torch.zeros(3, 6),))
    structure = Structure(groups, 0.5, lr=0.0)
    seen = torch.zeros(64, dtype=torch.bool)
    first: list[float] = []
    with Offloader(
        model, groups, loss_fn, optimizer=factory, structure=structure, sync_every=1, overlap=overlap
    ) as trainer:
        for _ in range(4):
            trainer.begin_round()
            kept = trainer.plan[structure.names[0]]
            new = ~seen[kept]
            before = trainer.subnet.get_parameter("0.weight").detach().clone()
            batch = torch.randn(16, 6), torch.randint(5, (16,))
            trainer.loss(batch).backward()
            gradient = trainer.subnet.get_parameter("0.weight").grad[new].clone()  # type: ignore[index]
            weight = trainer.subnet.get_parameter("0.weight")
            alone = nn.Parameter(before[new].clone())
            alone.grad = gradient
            factory([alone]).step()
            trainer.step()
            torch.testing.assert_close(trainer.master["0.weight"][kept[new]], alone.detach())
            assert weight is trainer.subnet.get_parameter("0.weight")
            first.append(int(new.sum()))
            seen[kept] = True
    assert first[0] == 32 and sum(first[1:]) > 20


def test_moments_of_an_unchanged_plan_go_on_as_in_plain_training() -> None:
    """When the same units are trained again and again, rounds must not show: compare with the subnet trained alone."""
    model = network()
    with offloader(model, ADAMW, keep=0.5, sync_every=5) as trainer:
        trainer.settle()
        trainer.begin_round()
        alone = trainer.export()
    alone.train()
    with offloader(network(), ADAMW, keep=0.5, sync_every=5) as trainer:
        trainer.settle()
        optimizer = ADAMW(list(alone.parameters()))
        torch.manual_seed(5)
        expected = []
        for batch in data(30):
            loss = loss_fn(alone, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
        torch.manual_seed(5)
        # Dividing by 1 − βᵗ and multiplying again rounds, so the two agree to rounding, not bit for bit.
        assert run(trainer, data(30)) == pytest.approx(expected, rel=2e-4)


def test_reset_forgets_the_moments_of_another_plan() -> None:
    with offloader(network(), ADAMW, state="reset", sync_every=5) as trainer:
        assert trainer.moments == {}
        run(trainer, data(5))
        trainer.begin_round()
        assert all(not trainer.optimizer.state[p] for p in trainer.subnet.parameters())


def test_a_loss_that_is_not_finite_names_step_and_round_and_spares_the_master() -> None:
    with offloader(network(), sync_every=5) as trainer:
        run(trainer, data(5))
        before = {name: tensor.clone() for name, tensor in trainer.master.items()}
        bad = data(1)[0][0] * float("nan"), data(1)[0][1]
        with pytest.raises(UserError, match=r"the loss is nan at step 8, round 1"):
            run(trainer, [*data(2), bad, *data(2)])
            trainer.finish_round()
        for name, tensor in before.items():
            assert torch.equal(tensor, trainer.master[name]), name


def test_export_computes_what_the_final_subnet_computes() -> None:
    with offloader(network(), sync_every=5) as trainer:
        run(trainer, data(10))
        trainer.settle()
        run(trainer, data(5)[:4])
        subnet, plan = trainer.subnet, trainer.plan
        assert plan == trainer.agenda.top()
        trainer.step()  # the fifth: ends the round
    small = trainer.export()
    x = data(1)[0][0]
    with torch.no_grad():
        assert torch.equal(small.eval()(x), subnet.eval()(x))


def test_optimizer_state_of_another_shape_is_an_error() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["factors"] = torch.zeros(p.shape[0])

    with pytest.raises(UserError, match=r"Odd keeps 'factors' as a tensor of shape \(6,\).*optimizer.state: reset"):
        offloader(network(), lambda params: Odd(params, lr=0.1))


def test_an_optimizer_of_the_models_own_parameters_alone_resets() -> None:
    def rates(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        named = zip(params, [0.1] * 10 + [0.01], strict=True)
        return torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in named])

    with offloader(network(), rates, state="reset") as trainer:
        run(trainer, data(2))
    with pytest.raises(UserError, match=r"must take any list of parameters; of a list of one it raised ValueError"):
        offloader(network(), rates)


@pytest.mark.parametrize("state", ["carry", "reset"])
def test_an_optimizer_that_takes_no_step_by_itself_is_refused(state: str) -> None:
    with pytest.raises(UserError, match=r"LBFGS cannot take a step on a parameter of torch.float32: .*closure"):
        offloader(network(), lambda params: torch.optim.LBFGS(params), state=state)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(1.5, "float"), (None, "NoneType"), (torch.zeros(2), r"a tensor of shape \(2,\)")],
    ids=["a number", "nothing", "a vector"],
)
def test_a_loss_must_be_a_scalar_tensor(wrong: object, said: str) -> None:
    model = network()
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    with (
        pytest.raises(UserError, match=f"must return a scalar tensor; it returned {said}"),
        Offloader(model, groups, lambda *_: wrong, optimizer=ADAMW, structure=Structure(groups, 0.5)) as trainer,
    ):
        trainer.loss(data(1)[0])


def test_a_model_that_cannot_be_taken_over_is_refused() -> None:
    """On meta with nobody to fill it; of which nothing is trained; with two tensors that are one in memory alone."""
    with torch.device("meta"):
        empty = network()
    with pytest.raises(UserError, match=r"0\.weight is on the meta device"):
        offloader(empty)
    with pytest.raises(UserError, match="no parameter of the model is trained"):
        offloader(network().requires_grad_(False))
    shared = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    shared[2].weight.data = shared[0].weight.data
    groups = find_groups(shared, (torch.zeros(3, 6),))
    with pytest.raises(UserError, match=r"0\.weight and 2\.weight share their memory but are two tensors"):
        Offloader(shared, groups, loss_fn, optimizer=ADAMW, structure=Structure(groups, 1.0))
    model = network()
    model.register_buffer("first", torch.arange(3))
    model.register_buffer("again", model.get_buffer("first").view(3))  # nothing trains either of them
    offloader(model)


def test_groups_of_another_model_are_refused() -> None:
    def wide(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 5))

    groups = find_groups(wide(12), (torch.zeros(3, 6),))
    said = r"these groups are another model's: 0.weight is \(12, 6\) in theirs and is \(20, 6\) in this model"
    for keep in (0.5, 1.0):
        with pytest.raises(UserError, match=said):
            Offloader(wide(20), groups, loss_fn, optimizer=ADAMW, structure=Structure(groups, keep))
    with pytest.raises(UserError, match=said):
        verify_groups(wide(20), groups, (torch.zeros(3, 6),))
    with pytest.raises(UserError, match=said):
        slice_module(wide(20), Plan.whole(groups), groups)
    with pytest.raises(UserError, match=r"2\.weight .* is not in this model"):
        slice_module(nn.Sequential(nn.Linear(6, 12)), Plan.whole(groups), groups)
    with pytest.raises(UserError, match=said):
        own = find_groups(wide(20), (torch.zeros(3, 6),))
        slice_module(wide(20), Plan.whole(groups), own)


def test_optimizer_must_be_one() -> None:
    with pytest.raises(UserError, match="must return a torch optimizer, it returned list"):
        offloader(network(), lambda params: params)  # type: ignore[arg-type, return-value]


def test_bf16_autocast_trains_in_bf16_and_keeps_fp32_weights() -> None:
    seen = []

    def watched(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = module(batch[0])
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits, batch[1])

    model = network()
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    with Offloader(
        model,
        groups,
        watched,
        optimizer=ADAMW,
        structure=Structure(groups, 0.5),
        sync_every=5,
        accelerator=Accelerator(mixed_precision="bf16", cpu=True),
    ) as trainer:
        losses = run(trainer, data(10))
    assert set(seen) == {torch.bfloat16}  # the subnet and the reference
    assert all(tensor.dtype == torch.float32 for tensor in trainer.master.values() if tensor.is_floating_point())
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_subnet_trains_as_the_plain_one_does(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    """Traced for real but not lowered to C++, which would take a minute; values are swapped without a new trace."""
    monkeypatch.setattr(workbench, "Swap", lambda *a, **_: Swap(*a, in_place=in_place))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def mlp() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(20)]
    results = []
    for compile in (False, True):
        model = mlp()
        groups = find_groups(model, (torch.zeros(3, 8),))
        structure = Structure(groups, 0.5)
        with Offloader(
            model, groups, loss_fn, optimizer=ADAMW, structure=structure, sync_every=5, compile=compile
        ) as trainer:
            results.append(run(trainer, batches))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiling_needs_constant_widths() -> None:
    with pytest.raises(UserError, match="constant widths"):
        model = network()
        groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
        structure = Structure(groups, 0.5, sampler="bernoulli")
        Offloader(model, groups, loss_fn, optimizer=ADAMW, structure=structure, compile=True)


class Late(nn.Module):
    """A layer that is reached only once `open` is set, as a routed expert is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 3)
        self.open = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last(self.late(x).relu() if self.open else x)


def points(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(count)]


def test_a_parameter_that_is_reached_late_finds_moments_of_zero() -> None:
    torch.manual_seed(1)
    model = Late()
    groups = find_groups(model, (torch.zeros(3, 8),))
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        with Offloader(
            model, groups, loss_fn, optimizer=ADAMW, structure=Structure(groups, 0.5), sync_every=4
        ) as trainer:
            for reached in (False, True):
                trainer.begin_round()
                trainer.subnet.open = reached
                run(trainer, points(4))
                assert all(bool(t.isfinite().all()) for views in trainer.moments.values() for t in views.values())
            assert float(trainer.moments["exp_avg_sq"]["late.weight"].max()) > 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_weights_of_several_dtypes_each_have_moments_of_their_own() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 3)
            self.first.bfloat16(), self.last.bfloat16()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.norm(self.first(x.to(self.first.weight.dtype)).float())
            return self.last(hidden.to(self.last.weight.dtype)).float()

    model = Mixed()
    groups = find_groups(model, (torch.zeros(3, 8),))
    with Offloader(model, groups, loss_fn, optimizer=ADAMW, structure=Structure(groups, 0.5), sync_every=4) as trainer:
        losses = run(trainer, points(12))
    assert all(math.isfinite(loss) for loss in losses)
    for name, tensor in trainer.moments["exp_avg"].items():
        assert tensor.dtype == trainer.master[name].dtype


def test_a_tensor_kept_under_a_second_name_stays_the_same_tensor() -> None:
    model = network()
    kept = model[8].weight
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    with Offloader(model, groups, loss_fn, optimizer=ADAMW, structure=Structure(groups, 1.0), sync_every=3) as trainer:
        run(trainer, data(3))
    assert kept is model[8].weight and kept.data_ptr() == trainer.master["8.weight"].data_ptr()


def test_looking_and_exporting_between_rounds_changes_nothing() -> None:
    results = []
    for looking in (False, True):
        model = network()
        torch.manual_seed(5)
        with offloader(model, ADAMW, sync_every=4) as trainer:
            for i in range(5):
                if i == 3:
                    trainer.settle()
                if looking:
                    assert len(trainer.plan) > 0 and trainer.subnet is not None
                    trainer.export()
                    trainer.boundary()
                run(trainer, data(20)[4 * i : 4 * i + 4])
        results.append({name: tensor.clone() for name, tensor in trainer.master.items()})
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_under_cuda_graphs_a_second_part_of_a_batch_is_refused() -> None:
    """Its backward pass would overwrite the gradients of the first; elsewhere parts add up."""
    loss = torch.tensor(1.0)
    for defer_interrupts in (False, True):
        running = Round(paired=False, whole_batches=defer_interrupts)
        running.add_loss(loss)
        if defer_interrupts:
            with pytest.raises(UserError, match="take a step's batch whole"):
                running.add_loss(loss)
        else:
            running.add_loss(loss)
        running.losses = running.losses[:1]
        running.steps += 1
        running.add_loss(loss)
        assert len(running.losses) == 2


def test_gradients_of_a_batch_without_a_step_do_not_leak_into_the_next_round() -> None:
    with offloader(network(), SGD, sync_every=4) as trainer:
        run(trainer, data(2))
        trainer.accelerator.backward(trainer.loss(data(3)[2]))
        trainer.export()  # ends the round
        trainer.begin_round()
        assert all(parameter.grad is None for parameter in trainer.subnet.parameters())


def test_a_run_goes_on_after_a_loss_that_was_not_finite() -> None:
    bad = data(1)[0][0] * float("nan"), data(1)[0][1]
    with offloader(network(), sync_every=3) as trainer:
        run(trainer, data(3))
        with pytest.raises(UserError, match="step 5, round 1"):
            run(trainer, [data(1)[0], bad, data(1)[0]])
            trainer.finish_round()
        assert (trainer.steps, trainer.rounds) == (3, 1)
        run(trainer, data(6))
        assert (trainer.steps, trainer.rounds) == (9, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": "Carry"}, "carry or reset"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"clip_norm": math.nan}, r"clip_norm \(nan\) must be positive, or None"),
        ({"sync_every": 0}, "sync_every"),
        ({"sync_every": 1.5}, r"sync_every \(1.5\) must be a whole number, at least 1"),
        ({"reference": "frehs"}, r"reference \('frehs'\) must be next or fresh"),
    ],
)
def test_arguments_that_mean_nothing(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        offloader(network(), ADAMW, **arguments)


def test_compile_is_one_of_three() -> None:
    for compile in (False, True, "graphs"):
        require_arguments(1, "carry", None, compile, fits=True)
    with pytest.raises(UserError, match=r"compile \('graph'\) must be False, True or graphs"):
        require_arguments(1, "carry", None, "graph", fits=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}], ids=["accumulation"])
def test_an_accelerator_that_would_change_gradients_is_refused(settings: dict) -> None:
    model = network()
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    accelerator = Accelerator(cpu=True, **settings)
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        Offloader(model, groups, loss_fn, optimizer=ADAMW, structure=Structure(groups), accelerator=accelerator)


def test_an_end_that_fails_closes_all_the_same() -> None:
    batch = data(1)[0]
    trainer = offloader(network(), sync_every=5)
    with pytest.raises(UserError, match="the loss is nan"), trainer:
        trainer.loss((batch[0] * math.nan, batch[1])).backward()
        trainer.step()
    assert trainer._bench.pipeline._worker._shutdown
    with pytest.raises(RuntimeError, match="closed"):
        trainer.loss(batch)


def test_a_wrong_argument_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"transfer \('nativ'\)"):
        offloader(model, transfer="nativ")
    assert before == {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}


def test_stepping_without_a_loss_or_after_the_end_is_an_error() -> None:
    with offloader(network()) as trainer, pytest.raises(RuntimeError, match="follows loss"):
        trainer.step()
    with pytest.raises(RuntimeError, match="closed"):
        trainer.loss(data(1)[0])


def test_a_structure_of_other_groups_is_refused() -> None:
    groups = find_groups(network(), (torch.zeros(3, 3, 8, 8),))
    structure = Structure([Group("elsewhere", 4, ())])
    with pytest.raises(UserError, match="which the model's groups do not"):
        Offloader(network(), groups, loss_fn, optimizer=ADAMW, structure=structure)


class Rebinding(nn.Module):
    """Puts new tensors in the place of a buffer and of a weight's data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16, bias=False), nn.Linear(16, 5)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.first.weight.data = nn.functional.normalize(self.first.weight.data, dim=1)
        y = self.first(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return self.last((y - self.mean).relu())


def squared(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return module(batch).square().mean()


def rebinding(model: nn.Module, keep: float, *, overlap: bool) -> Offloader:
    groups = find_groups(model, (torch.zeros(3, 6),))
    return Offloader(
        model, groups, squared, optimizer=ADAMW, structure=Structure(groups, keep), sync_every=4, overlap=overlap
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_forward_rebinds_is_trained_and_written_back(overlap: bool) -> None:
    torch.manual_seed(0)
    model, rows = Rebinding(), torch.randn(14, 8, 6) + 1
    plain = copy.deepcopy(model)
    optimizer = ADAMW(list(plain.parameters()))
    with rebinding(copy.deepcopy(model), 1.0, overlap=overlap) as trainer:
        losses = run(trainer, rows)
        trainer.finish_round()
        for row, loss in zip(rows, losses, strict=True):
            own = squared(plain.train(), row)
            own.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert own.item() == loss
        for name, tensor in plain.state_dict().items():
            assert torch.equal(trainer.master[name], tensor), name
    with rebinding(model, 0.5, overlap=overlap) as trainer:
        for _ in range(3):
            trainer.begin_round()
            sliced = slice_module(trainer.model, trainer.plan, trainer.groups).state_dict()
            for name, tensor in trainer.subnet.state_dict().items():
                assert torch.equal(tensor, sliced[name]), name
            run(trainer, rows[:4])
        assert trainer.master["mean"].any()


class Kept(nn.Module):
    """Calls a layer through a function that it keeps, which a copy of the module does not copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.function = lambda x: self.first(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(x).relu())


def test_a_model_that_computes_with_what_a_copy_of_it_does_not_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"computes with first.weight of the model itself"):
        find_groups(Kept(), (torch.zeros(3, 6),))
    with pytest.raises(UserError, match=r"example_inputs \(Tensor\) must be a tuple"):
        find_groups(Kept(), torch.zeros(3, 6))  # type: ignore[arg-type]


def test_a_loss_of_the_model_itself_or_of_nothing_ends_at_the_first_step() -> None:
    model = network()
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    structure = Structure(groups, 0.5)
    with Offloader(
        model, groups, lambda _, batch: loss_fn(model, batch), optimizer=SGD, structure=structure
    ) as trainer:
        with pytest.raises(UserError, match=r"the loss reaches 0.weight of the model itself"):
            run(trainer, data(1))
        trainer._rounds.under_way = None
    with offloader(network()) as trainer:
        trainer.loss(data(1)[0])
        with pytest.raises(RuntimeError, match="no parameter of the subnet has a gradient"):
            trainer.step()
        trainer._rounds.under_way = None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_s_does_not_depend_on_the_default_type(dtype: torch.dtype) -> None:
    found = []
    for default in (torch.float32, dtype):
        trainer, batches = offloader(network(), control="linear"), data(14)
        torch.set_default_dtype(default)
        try:
            with trainer:
                run(trainer, batches)
                found.append(trainer.structure.flat.clone())
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


def test_gradients_from_before_are_no_mistake() -> None:
    """Of a step that its owner has tried on the model itself."""
    model, batches = network(), data(4)
    loss_fn(model, batches[0]).backward()
    with offloader(model) as trainer:
        run(trainer, batches)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_may_take_things_out_of_its_batch() -> None:
    """The second subnet of a pair finds them again."""
    model = network()
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    structure = Structure(groups, 0.5, paired_batches=2)

    def taking(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        return nn.functional.cross_entropy(module(batch["images"]), labels)

    with Offloader(model, groups, taking, optimizer=ADAMW, structure=structure, sync_every=3) as trainer:
        for images, labels in data(6):
            trainer.accelerator.backward(trainer.loss({"images": images, "labels": labels}))
            trainer.step()
    assert trainer.rounds == 2


@pytest.mark.parametrize(
    "shared",
    [lambda w: w.data[:4], lambda w: w.data.T, lambda w: w.data.view(-1)[5:9]],
    ids=["rows", "transposed", "a few"],
)
def test_a_buffer_that_is_a_part_of_a_weight_is_refused(shared: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """In the master they would be two."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model.register_buffer("other", shared(model[0].weight))
    groups = find_groups(model, (torch.zeros(3, 6),))
    with pytest.raises(UserError, match=r"share their memory but are two tensors: make them one, or clone it"):
        Offloader(model, groups, loss_fn, optimizer=ADAMW, structure=Structure(groups, 0.5))


def test_tensors_that_lie_between_one_another_are_two() -> None:
    """Halves of the columns of one matrix, and parts of one vector."""
    whole, flat = torch.randn(8, 12), torch.randn(11)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(6, 8))
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(whole[:, 6 * i : 6 * i + 6])
    model[0].bias, model[1].bias = nn.Parameter(flat[:8]), nn.Parameter(torch.randn(8))
    model.register_buffer("rest", flat[8:])
    assert not model[0].weight.is_contiguous()
    _require_apart(dict(model.named_parameters()) | dict(model.named_buffers()))
