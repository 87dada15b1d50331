"""The same invariants with the master pinned on the host and the subnet on a GPU."""

import pytest
import torch
from torch import nn

from offload_trainer import Offloader, Structure, find_groups
from offload_trainer.evaluation import evaluate, evaluate_full
from offload_trainer.master import Slab
from tests.test_offloader import ADAMW, SGD, Factory, data, loss_fn, network, run

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def on_gpu(batches: list) -> list:
    return [(x.to(CUDA), y.to(CUDA)) for x, y in batches]


def offloader(model: nn.Module, factory: Factory, keep: float, sync_every: int, **structure) -> Offloader:
    groups = find_groups(model, (torch.zeros(3, 3, 8, 8),))
    made = Structure(groups, keep, **structure)
    return Offloader(model, groups, loss_fn, optimizer=factory, structure=made, sync_every=sync_every)


def test_a_slab_is_pinned_at_its_exact_size_and_let_go() -> None:
    slab = Slab({"a": torch.Size([1000, 77])}, torch.float32, pin=True)
    assert slab.flat.is_pinned()
    assert slab.nbytes <= 77_000 * 4 + 64
    slab.close()
    assert not slab.flat.is_pinned()


@pytest.mark.parametrize("factory", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_keep_1_is_plain_training_bit_for_bit(factory: Factory) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    plain = network().to(CUDA)
    optimizer = factory(list(plain.parameters()))
    torch.cuda.manual_seed(5)
    for batch in on_gpu(data(20)):
        loss_fn(plain, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.manual_seed(5)
    model = network()
    torch.cuda.manual_seed(5)
    with offloader(model, factory, 1.0, 7) as trainer:
        run(trainer, on_gpu(data(20)))
    torch.use_deterministic_algorithms(False)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor.cpu(), trainer.master[name]), name


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
def test_a_round_changes_what_the_plan_keeps_and_nothing_else(sampler: str) -> None:
    with offloader(network(), ADAMW, 0.5, 7, sampler=sampler) as trainer:
        for start in range(0, 28, 7):
            trainer.begin_round()
            plan, subnet = trainer.plan, trainer.subnet
            assert all(p.is_cuda for p in subnet.parameters())
            before = {name: tensor.clone() for name, tensor in trainer.master.items()}
            run(trainer, on_gpu(data(28)[start : start + 7]))
            trained = dict(subnet.named_parameters()) | dict(subnet.named_buffers())
            for name, tensor in trainer.master.items():
                inside = torch.zeros(tensor.shape, dtype=torch.bool)
                kept = zip(plan.indices(name), tensor.shape, strict=True)
                rows = [torch.arange(size) if index is None else index for index, size in kept]
                inside[torch.meshgrid(*rows, indexing="ij") if rows else ()] = True
                assert torch.equal(tensor[~inside], before[name][~inside]), name
                assert torch.equal(tensor[inside], trained[name].detach().cpu().flatten()), name


def test_nothing_full_size_touches_the_device() -> None:
    """Training and evaluating a network whose master is far larger than its subnet: the peak says so."""
    model = nn.Sequential(
        nn.Linear(64, 8192), nn.ReLU(), nn.Linear(8192, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()
    )
    model.append(nn.Linear(4096, 5))
    full = sum(p.numel() * 4 for p in model.parameters())
    batches = [(torch.randn(8, 64, device=CUDA), torch.randint(5, (8,), device=CUDA)) for _ in range(10)]
    groups = find_groups(model, (torch.zeros(3, 64),))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    with Offloader(model, groups, loss_fn, optimizer=SGD, structure=Structure(groups, 0.125), sync_every=5) as trainer:
        run(trainer, batches)
        metrics = lambda module, batch: {"loss": loss_fn(module, batch)}  # noqa: E731
        whole = evaluate_full(trainer.model, batches, metrics, lambda _: 8, trainer.accelerator)
        assert torch.cuda.max_memory_allocated() - start < 0.75 * full  # its largest layer is half of it
        on_host = [(x.cpu(), y.cpu()) for x, y in batches]
        expected = sum(loss_fn(trainer.model, batch).item() for batch in on_host) / len(on_host)
        assert whole["loss"] == pytest.approx(expected, rel=1e-4)
        assert all(parameter.device.type == "cpu" for parameter in trainer.model.parameters())
        small = trainer.export().to(CUDA)
        evaluate(small, batches, metrics, lambda _: 8, trainer.accelerator)


def test_memory_does_not_grow_over_rounds() -> None:
    with offloader(network(), ADAMW, 0.5, 2) as trainer:
        batches = on_gpu(data(4))
        run(trainer, batches * 5)
        before = torch.cuda.memory_allocated()
        run(trainer, batches * 50)
        assert torch.cuda.memory_allocated() <= before + 2**16
