"""A master that is narrower than what the device computes in: rounding, transfers and whole runs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload_trainer import Offloader, Structure, UserError, find_groups, memory, snapshot
from offload_trainer.device import transfer
from offload_trainer.device.transfer import SlabLayout, Transfer
from offload_trainer.groups import Group, Groups, Plan, Slot
from offload_trainer.groups.slicing import named_tensors
from offload_trainer.master import CheckpointStore, Master, Slab, StateSpec, find_checkpoint
from offload_trainer.master.master import master_bytes
from offload_trainer.master.precision import FP32, Precision
from tests.models import VOCABULARY, llm, tokens
from tests.test_offloader import ADAMW, SGD, Factory, data, network, offloader, run
from tests.test_transfer import mesh

BF16 = Precision(torch.bfloat16, torch.bfloat16)
MOMENTS = ("exp_avg", "exp_avg_sq")


# Rounding


def below(values: Tensor) -> Tensor:
    """The neighbour towards zero in bfloat16, as float32: the upper half of the bits."""
    return (values.view(torch.int32) & -(2**16)).view(torch.float32)


def above(values: Tensor) -> Tensor:
    """The neighbour away from zero; the value itself where bfloat16 represents it."""
    low = below(values)
    return torch.where(low == values, low, (low.view(torch.int32) + 2**16).view(torch.float32))


def awkward() -> Tensor:
    """Large and tiny of both signs, denormal ones, and such as round up into the next power of two."""
    normal = torch.randn(300, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor(
        [1.999, -1.999, 3.9999998, 65535.9, 1e-40, -3e-42, 1e-45, 1.17e-38, 3.3e38, -3.38e38, 0.0, -0.0]
    )
    return torch.cat([normal, normal * 1e30, normal * 1e-39, edges])


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    values, draws = awkward(), 3000
    low, high = below(values).double(), above(values).double()
    total = torch.zeros(len(values), dtype=torch.float64)
    for round in range(draws):
        rounded = FP32.rounding(round, "weights").narrow(values, 0).double()
        assert bool(((rounded == low) | (rounded == high)).all())
        total += rounded
    share = ((values.double() - low) / (high - low)).nan_to_num(0.0)  # of the draws that should go up
    error = (total / draws - values.double()).abs()
    allowed = 5 * (share * (1 - share) / draws).sqrt() * (high - low).abs()
    assert bool((error <= allowed + 1e-12 * values.abs()).all())


def test_what_bfloat16_represents_comes_back_bit_for_bit() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = every.float()
    number = ~every.isnan()
    for round in range(5):
        rounded = FP32.rounding(round, "weights").narrow(wide, round)
        assert torch.equal(rounded[number].view(torch.int16), every[number].view(torch.int16))  # both zeros, infinities
        assert bool(rounded[~number].isnan().all())


def test_what_is_not_finite_stays_so_and_what_is_stays_finite() -> None:
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    values = torch.cat([payloads, torch.tensor([math.inf, -math.inf, largest, -largest, 1.5, 0.1])])
    for round in range(50):
        rounded = FP32.rounding(round, "weights").narrow(values, 0)
        assert bool(rounded[:4].isnan().all()) and rounded[4:6].tolist() == [math.inf, -math.inf]
        limit = torch.finfo(torch.bfloat16).max
        assert rounded[6:9].tolist() == [limit, -limit, 1.5] and abs(float(rounded[9]) - 0.1) < 1e-3


def hashed(keys: tuple[int, ...], place: int) -> int:
    """The 16 bits of a place, in Python's integers."""
    word = (place // 2 + keys[0]) % 2**32
    for shift, factor, key in ((17, 0xED5AD4BB, keys[1]), (11, 0xAC4C1B51, keys[2]), (15, 0x31848BAB, keys[3])):
        word = ((word ^ word >> shift) * factor + key) % 2**32
    word ^= word >> 14
    return word >> 16 if place % 2 else word % 2**16


@pytest.mark.parametrize("start", [0, 7, 2**33 - 3, 2**34 + 1])
def test_the_bits_are_the_hash_of_keys_and_place(start: int) -> None:
    rounding = Precision(seed=3).rounding(17, "exp_avg")
    found = rounding._random(start, 9, torch.device("cpu"))
    assert [int(bits) % 2**16 for bits in found] == [hashed(rounding.keys, start + i) for i in range(9)]


def test_a_place_has_its_bits_however_values_are_cut() -> None:
    values, rounding = torch.randn(1001), FP32.rounding(1, "weights")
    whole = rounding.narrow(values, 40)
    for cut in (1, 2, 77, 500, 1000):
        parts = [rounding.narrow(values[:cut], 40), rounding.narrow(values[cut:], 40 + cut)]
        assert torch.equal(torch.cat(parts), whole)


def test_bits_of_places_rounds_and_kinds_are_independent() -> None:
    def bits(precision: Precision, round: int, what: str) -> Tensor:
        found = precision.rounding(round, what)._random(0, 2**18, torch.device("cpu"))
        return (found.double() + 0.5) / 2**16 * 12**0.5  # mean 0, variance 1

    first = bits(FP32, 0, "weights")
    others = [bits(FP32, 1, "weights"), bits(FP32, 0, "exp_avg"), bits(Precision(seed=1), 0, "weights")]
    limit = 5 / (2**18) ** 0.5
    assert abs(float(first.mean())) < limit and abs(float(first.var()) - 1) < limit
    for other in (*others, *(first.roll(by) for by in (1, 2, 3, 4, 64, 4096))):
        assert abs(float((first * other).mean())) < limit


def test_an_update_below_half_a_step_of_bfloat16_survives_in_expectation() -> None:
    """1,000 rounds, each of which adds a hundredth of the distance to the next number."""
    start, step = torch.ones(4096, dtype=torch.bfloat16), 2**-7 / 100
    random, nearest = start.clone(), start.clone()
    for round in range(1000):
        random = FP32.rounding(round, "weights").narrow(random.float() + step, 0)
        nearest = (nearest.float() + step).bfloat16()
    assert torch.equal(nearest, start)
    gained = float((random.float() - 1).mean())
    assert gained == pytest.approx(1000 * step, rel=0.02)  # a standard deviation is 0.5%


# Transfers (whole, against indexing: test_transfer.py)


def slabs_through(staged: bool, pinned: list[int]) -> tuple[Tensor, Transfer, float, float]:
    """A narrow master after a round whose subnet moved a little; the transfer, its delta and the exact one."""
    shape = torch.Size([301, 77])  # odd, so that the pieces over the link begin within a hash
    groups = Groups((Group("u", 301, (Slot("b", 0), Slot("c", 1))),), {"a": shape, "b": shape, "c": shape[::-1]})
    plan = Plan(groups, {"u": list(range(0, 301, 3))})
    generator = torch.Generator().manual_seed(0)
    master = {name: torch.randn(size, generator=generator).bfloat16() for name, size in groups.shapes.items()}
    moves = Transfer(torch.device("cpu"))
    moves._apart = moves._pin = staged
    shapes = {name: plan.shape(name) for name in groups.shapes}
    layouts: list[SlabLayout] = [(torch.float32, torch.bfloat16, shapes)]
    slab = Slab(shapes, torch.float32)
    moves.fetch(master, layouts, [slab], plan, "weights")
    exact = 0.0
    for name, part in slab.items():
        assert torch.equal(part, master[name][mesh(master[name], plan.indices(name))].float())
        step = 1e-3 * torch.randn(part.shape, generator=generator)
        part += step
        exact += step.double().square().sum().item()
    out, expected = moves.staging(layouts, [slab], "weights"), FP32.rounding(5, "weights").narrow(slab.flat, 0)
    unloading = moves.unload([slab], out, FP32.rounding(5, "weights"))
    parts, excess = list(unloading.parts), unloading.excess()
    assert torch.equal(out[0].flat, expected) and torch.equal(slab.flat, expected.float())
    squared = moves.merge(parts, master, plan, delta=True) - excess
    assert moves.work.nbytes == 2 * slab.nbytes // 2
    assert moves.staging_bytes == slab.nbytes // 2 and bool(pinned) == staged
    moves.close()
    return torch.cat([tensor.flatten() for tensor in master.values()]), moves, squared, exact


@pytest.mark.parametrize("link_chunk", [333, 2**21])
def test_rounding_before_the_link_or_on_the_host_is_the_same(
    pinned: list[int], monkeypatch: pytest.MonkeyPatch, link_chunk: int
):
    monkeypatch.setattr(transfer, "LINK_CHUNK", link_chunk)
    here, _, squared, exact = slabs_through(False, pinned)
    there, _, estimated, _ = slabs_through(True, pinned)
    assert torch.equal(here.view(torch.int16), there.view(torch.int16))
    assert squared == pytest.approx(estimated, rel=1e-5)
    assert estimated == pytest.approx(exact, rel=0.005)  # 40,000 elements, each moved less than it is rounded


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Staging as on a GPU, without one: what is registered and not yet let go."""
    held: list[int] = []
    monkeypatch.setattr(memory, "register", lambda tensor: held.append(tensor.data_ptr()))
    monkeypatch.setattr(memory, "unregister", lambda tensor: held.remove(tensor.data_ptr()))
    return held


# The master


class Mixed(nn.Module):
    """Tied, frozen, of one axis, a buffer, of another type: what is stored narrower and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        self.norm = nn.LayerNorm(8)
        self.table: Tensor
        self.register_buffer("table", torch.randn(8, 8))


def test_a_master_stores_what_its_precision_says_and_its_model_is_of_those_types() -> None:
    model, state_spec = Mixed(), StateSpec(dict.fromkeys(MOMENTS), {}, None)
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    predicted = master_bytes(model, state_spec, BF16)
    master = Master(model, state_spec, precision=BF16)
    narrow = {"embedding.weight", "frozen"}
    for name, tensor in named_tensors(model).items():
        stored = torch.bfloat16 if name in narrow else before[name].dtype
        assert tensor.dtype == master.tensors[name].dtype == stored, name
        assert tensor.data_ptr() == master.tensors[name].data_ptr()
        assert torch.equal(tensor, before[name].to(stored))
        assert master.computes[name] == before[name].dtype
    assert model.head.weight is model.embedding.weight and not model.frozen.requires_grad
    types = {name: tensor.dtype for name, tensor in master.moments["exp_avg"].items()}
    assert types == {
        "embedding.weight": torch.bfloat16,
        "wide": torch.float64,
        "head.bias": torch.float32,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
    }
    assert sum(predicted.values()) == master.nbytes


@pytest.mark.parametrize("real", [False, True])
def test_a_narrow_master_takes_half_the_bytes(real: bool) -> None:
    state_spec = StateSpec(dict.fromkeys(MOMENTS), {}, None)
    sizes = {}
    for precision in (FP32, Precision(torch.bfloat16), Precision(moments=torch.bfloat16), BF16):
        with torch.device("cpu" if real else "meta"):
            model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.Linear(256, 256))
        predicted = master_bytes(model, state_spec, precision)
        master = Master(model, state_spec, materialise=lambda model: None, precision=precision)
        assert master.nbytes == sum(predicted.values())
        sizes[precision.weights, precision.moments] = predicted
    full, half = torch.float32, torch.bfloat16
    vectors = 4 * 256 * 4
    for kind in ("weights", *MOMENTS):
        whole = sizes[full, full][kind]
        assert whole == 2 * 256 * 256 * 4 + vectors
        assert sizes[half, half][kind] == (whole - vectors) // 2 + vectors
        assert sizes[half, full][kind] == sizes[half if kind == "weights" else full, half][kind] or kind != "weights"
    assert sizes[half, full]["exp_avg"] == sizes[full, full]["exp_avg"]
    assert sizes[full, half]["weights"] == sizes[full, full]["weights"]


def test_other_types_are_refused() -> None:
    with pytest.raises(UserError, match=r"memory.moments \(torch.float16\) must be torch.float32 or torch.bfloat16"):
        Precision(moments=torch.float16)


# Runs


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def kept(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    inside = torch.zeros(tensor.shape, dtype=torch.bool)
    inside[mesh(tensor, plan.indices(name)) or ()] = True
    return inside


@pytest.mark.parametrize("sampler", ["fixed", "bernoulli"])
@pytest.mark.parametrize("factory", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("state", ["carry", "reset"])
def test_a_round_rounds_what_the_plan_keeps_and_changes_no_bit_else(
    monkeypatch: pytest.MonkeyPatch, factory: Factory, sampler: str, state: str
) -> None:
    """Convolutions and BatchNorm, whose statistics are no weights and exact."""
    with offloader(network(), factory, sampler=sampler, state=state, precision=BF16) as trainer:
        for batches in (data(28)[i : i + 7] for i in range(0, 28, 7)):
            trainer.begin_round()
            plan, subnet = trainer.plan, trainer.subnet
            assert {tensor.dtype for tensor in named_tensors(subnet).values()} == {torch.float32, torch.int64}
            stores = {"weights": trainer.master, **trainer.moments}
            before = {kind: {n: t.clone() for n, t in store.items()} for kind, store in stores.items()}
            gathered = {name: tensor.detach().clone() for name, tensor in named_tensors(subnet).items()}
            run(trainer, batches[:-1])
            loss = trainer.loss(batches[-1])
            trainer.accelerator.backward(loss)
            after: dict[str, Tensor] = {}
            end = trainer._bench.writeback.merge

            def remembering(*numbers: int, end: Any = end, after: Any = after, subnet: nn.Module = subnet) -> object:
                after.update({name: tensor.detach().clone() for name, tensor in named_tensors(subnet).items()})
                return end(*numbers)

            monkeypatch.setattr(trainer._bench.writeback, "merge", remembering)
            trainer.step()
            trainer.finish_round()
            monkeypatch.undo()
            norm = 0.0
            for kind, store in stores.items():
                for name, tensor in store.items():
                    inside = kept(plan, name, tensor)
                    assert torch.equal(tensor[~inside], before[kind][name][~inside]), (kind, name)
                    if kind == "weights":
                        trained = after[name]
                        found, exact = tensor[inside].float(), trained.flatten().float()
                        ends = (exact, exact) if tensor.dtype != torch.bfloat16 else (below(exact), above(exact))
                        assert bool(((found == ends[0]) | (found == ends[1])).all()), name
                        assert torch.equal(gathered[name].flatten().float(), before[kind][name][inside].float())
                        if trained.is_floating_point():
                            old, new = gathered[name].flatten().double(), found.double()
                            norm += float((new - old).square().sum() - (new - exact.double()).square().sum())
            assert trainer._bench.writeback.delta_norm == pytest.approx(norm**0.5, rel=1e-4)
        assert set(trainer.moments) == (
            set(trainer.optimizer.state_dict()["state"][0]) - {"step"} if state == "carry" else set()
        )


CASES: dict[str, dict[str, Any]] = {
    "adamw carry": {"factory": ADAMW},
    "sgd carry": {"factory": SGD},
    "adamw reset": {"factory": ADAMW, "state": "reset"},
    "bernoulli global": {"factory": ADAMW, "sampler": "bernoulli", "budget": "global"},
    "weights only": {"factory": ADAMW, "precision": Precision(torch.bfloat16)},
    "moments only": {"factory": ADAMW, "precision": Precision(moments=torch.bfloat16)},
    "keep 1": {"factory": ADAMW, "keep": 1.0},
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("settled", [False, True], ids=["exploring", "settled"])
def test_resume_equals_uninterrupted(tmp_path: Path, case: str, settled: bool) -> None:
    """Settled, the plan stays the same, and what the device still holds must not be what is trained on."""
    settings = {"precision": BF16, "sync_every": 5, **CASES[case]}
    batches, store, model = data(25), CheckpointStore(tmp_path), network()
    torch.manual_seed(5)
    with offloader(model, **settings) as whole:
        run(whole, batches[:5])
        if settled:
            whole.settle()
        run(whole, batches[5:15])
        path = snapshot.save(whole, store)
        expected = run(whole, batches[15:])
    torch.manual_seed(99)
    with offloader(network(seed=7), **settings) as resumed:
        snapshot.restore(resumed, find_checkpoint(tmp_path))
        assert run(resumed, batches[15:]) == expected
    for one, other in zip(
        (whole.master, *whole.moments.values()), (resumed.master, *resumed.moments.values()), strict=True
    ):
        assert all(torch.equal(raw(one[name]), raw(other[name])) for name in one)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in whole.master.values())
    assert (path / "weights.safetensors").stat().st_size < stored + 4096  # in its own type


def test_what_is_rounded_follows_from_the_rounds_number_and_its_kind() -> None:
    with offloader(network(), sync_every=5, precision=BF16) as trainer:
        for number in range(3):
            run(trainer, data(5))
            subnet = trainer._bench.subnet
            slabs = [("weights", trainer.master, slab) for slab in subnet.slabs]
            slabs += [(name, trainer.moments[name], slab) for name, made in subnet._moments.items() for slab in made]
            narrow = [found for found in slabs if found[1][next(iter(found[2]))].dtype == torch.bfloat16]
            assert [kind for kind, _, _ in narrow] == ["weights", *MOMENTS]
            for kind, store, slab in narrow:
                rounded = BF16.rounding(number, kind).narrow(slab.flat, 0)
                for name, part in slab.items():
                    expected = rounded[part.storage_offset() :][: part.numel()]
                    assert torch.equal(store[name][kept(subnet.plan, name, store[name])], expected)


def test_runs_of_one_seed_round_alike_and_of_another_do_not() -> None:
    """As on two ranks, each of which holds a master."""
    masters = []
    for seed in (0, 0, 1):
        model = network()
        torch.manual_seed(5)
        with offloader(model, precision=Precision(torch.bfloat16, torch.bfloat16, seed=seed)) as trainer:
            run(trainer, data(14))
        masters.append({name: tensor.clone() for name, tensor in trainer.master.items()})
    one, two, other = masters
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "there", [FP32, BF16, Precision(moments=torch.bfloat16)], ids=lambda p: "-".join(p.names.values())
)
@pytest.mark.parametrize("here", [FP32, BF16], ids=lambda p: "-".join(p.names.values()))
def test_a_checkpoint_of_another_precision_is_refused_by_its_key(
    tmp_path: Path, there: Precision, here: Precision
) -> None:
    with offloader(network(), sync_every=5, precision=there) as trainer:
        run(trainer, data(5))
        snapshot.save(trainer, CheckpointStore(tmp_path))
    checkpoint = find_checkpoint(tmp_path)
    fresh = network()
    tensors, trained = named_tensors(fresh), set(dict(fresh.named_parameters()))
    moments = dict.fromkeys(MOMENTS)
    if there == here:
        snapshot.check(checkpoint, tensors, moments, trained, trainer.structure, here)
        return
    key = "weights" if there.weights != here.weights else "moments"
    message = rf"^memory.{key} \({here.names[key]}\) must be {there.names[key]}, as in the checkpoint .*step-00000005$"
    with pytest.raises(UserError, match=message):
        snapshot.check(checkpoint, tensors, moments, trained, trainer.structure, here)
    with offloader(fresh, sync_every=5, precision=here) as other, pytest.raises(UserError, match=message):
        snapshot.restore(other, checkpoint)


def test_a_checkpoint_of_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    with offloader(network(), sync_every=5) as trainer:
        run(trainer, data(5))
        snapshot.save(trainer, CheckpointStore(tmp_path))
    tensors = named_tensors(network().bfloat16())
    with pytest.raises(UserError, match=r"is of another model: 0.weight is F32 there, BF16 here"):
        snapshot.check(find_checkpoint(tmp_path), tensors, {}, set(), trainer.structure)


def test_the_export_is_a_subnet_of_the_master_in_the_type_it_computes_in() -> None:
    with offloader(network(), sync_every=5, precision=BF16) as trainer:
        run(trainer, data(10))
        trainer.settle()
        trainer.begin_round()
        subnet, plan = trainer.subnet, trainer.plan
        assert plan == trainer.agenda.top()
        before = {name: tensor.detach().clone() for name, tensor in named_tensors(subnet).items()}
        small = trainer.export()
        assert trainer.plan == plan
    for name, tensor in named_tensors(small).items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    x = data(1)[0][0]
    assert torch.equal(small.eval()(x), subnet.eval()(x))


def language_model_run(precision: Precision, steps: int) -> tuple[list[float], Offloader]:
    model = llm("llama", tie_word_embeddings=True)
    groups = find_groups(model, tokens())
    torch.manual_seed(3)

    def materialise(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        for tensor in named_tensors(model).values():
            if tensor.ndim > 1:
                tensor.detach().copy_(0.05 * torch.randn(tensor.shape, generator=generator))
            else:
                tensor.detach().fill_(1.0)
        model.model.rotary_emb.inv_freq.copy_(10_000.0 ** -(torch.arange(0, 16, 2) / 16))  # type: ignore[union-attr]

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module(input_ids=batch, labels=batch, use_cache=False).loss

    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(VOCABULARY, (steps, 8, 1), generator=generator)
    strides = torch.randint(1, 4, (steps, 8, 1), generator=generator)
    batches = (starts + strides * torch.arange(24)) % VOCABULARY  # to be learnt: go on by the same stride
    with Offloader(
        model,
        groups,
        loss_fn,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95)),
        structure=Structure(groups, per_group_keep={"*mlp*": 0.5, "*attn*": 0.5}, seed=0),
        sync_every=5,
        materialise=materialise,
        precision=precision,
    ) as trainer:
        return run(trainer, batches), trainer


def test_a_language_model_learns_as_well_from_a_narrow_master() -> None:
    losses, trainer = language_model_run(FP32, 150)
    narrow, narrow_trainer = language_model_run(BF16, 150)
    start, end = losses[0], sum(losses[-50:]) / 50
    assert end < 0.5 * start  # it does learn
    assert sum(narrow[-50:]) / 50 == pytest.approx(end, rel=0.05)
    assert narrow_trainer._master.nbytes < 0.52 * trainer._master.nbytes
    small = narrow_trainer.export()
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert small.lm_head.weight is small.model.embed_tokens.weight  # type: ignore[union-attr]
