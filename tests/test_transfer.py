"""Gather and write-back against plain advanced indexing."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_trainer import memory
from offload_trainer.device import elements, transfer
from offload_trainer.device.elements import gather_into, on_device, patch, scatter_from
from offload_trainer.device.transfer import SlabLayout, Transfer
from offload_trainer.groups import Group, Groups, Plan, Slot
from offload_trainer.master.precision import FP32
from offload_trainer.master.slab import Slab

Index = tuple[Tensor | None, ...]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Index]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    index: list[Tensor | None] = []
    for size in shape:
        kept = draw(st.one_of(st.none(), st.sets(st.integers(0, size - 1), min_size=1)))
        index.append(None if kept is None else torch.tensor(sorted(kept)))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 100
    return values.to(dtype), tuple(index)


def mesh(full: Tensor, index: Index) -> tuple[Tensor, ...]:
    every = [torch.arange(size) if kept is None else kept for kept, size in zip(index, full.shape, strict=True)]
    return torch.meshgrid(*every, indexing="ij") if every else ()


@pytest.fixture(autouse=True, params=[1, 60, 2**21], ids=["a row a chunk", "a few rows a chunk", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(elements, "CHUNK", request.param)
    monkeypatch.setattr(elements, "PATCH", request.param)


@given(cases())
def test_gather_is_indexing(case: tuple[Tensor, Index]):
    full, index = case
    before, expected = full.clone(), full[mesh(full, index)]
    out = torch.zeros(expected.shape, dtype=full.dtype)
    gather_into(out, full, index)
    assert torch.equal(out, expected) and torch.equal(full, before)


@given(cases())
def test_write_back_changes_the_kept_entries_and_no_bit_of_the_others(case: tuple[Tensor, Index]):
    full, index = case
    places = mesh(full, index)
    values = torch.zeros_like(full[places]) if full.dtype == torch.bool else -full[places] + 1
    expected, moved = full.clone(), (values.double() - full[places].double()).square().sum().item()
    expected[places] = values
    squared = scatter_from(values, full, index, delta=True)
    assert torch.equal(full.view(torch.uint8), expected.view(torch.uint8))
    assert squared == (pytest.approx(moved, rel=2e-2) if full.dtype.is_floating_point else 0)
    assert scatter_from(values, full, index) == 0, "not asked for"


@given(cases())
def test_a_round_trip_without_training_changes_nothing(case: tuple[Tensor, Index]):
    full, index = case
    before = full.clone()
    out = torch.zeros(full[mesh(full, index)].shape, dtype=full.dtype)
    gather_into(out, full, index)
    scatter_from(out, full, index)
    assert torch.equal(full.view(torch.uint8), before.view(torch.uint8))


@given(cases(), cases())
def test_a_patch_is_the_same_at_once_as_row_by_row(one: tuple[Tensor, Index], other: tuple[Tensor, Index]):
    """As a device does it, and as a host does; of any number of axes, kept whole or in part in either tensor."""
    (source, here), (target, there) = one, other
    axes = min(source.ndim, target.ndim)
    source, target = source.flatten(axes - 1), target.flatten(axes - 1)
    ends = [(source, list(here[:axes])), (target, list(there[:axes]))]
    for axis in range(axes):
        # As many of both: of what is kept whole, all, where the other has as many.
        count = min(tensor.shape[axis] for tensor, _ in ends)
        for tensor, index in ends:
            size = tensor.shape[axis]
            whole = index[axis] is None and size == count
            index[axis] = None if whole else torch.arange(size)[size - count :]
    places = tuple(ends[0][1]), tuple(ends[1][1])
    source, expected = source.to(target.dtype), target.clone()
    patch(expected, source, places)
    found = target.clone()
    elements._patch_at_once(found, source, *places)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(found[mesh(found, places[1])], source[mesh(source, places[0])])


def test_indices_go_to_a_device_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1])
    places = {"a": ((rows, None), (None, columns)), "b": ((rows,), (rows,)), "c": ((None,), (None,))}
    sent, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: sent.append(tensors) or cat(tensors))
    found = on_device(places, torch.device("cpu"))
    assert [len(tensors) for tensors in sent] == [2], "each once, however often it is used"
    assert found.keys() == places.keys()
    for name, ends in places.items():
        for index, wanted in zip(found[name], ends, strict=True):
            assert len(index) == len(wanted)
            for one, other in zip(index, wanted, strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
    assert on_device({"c": places["c"]}, torch.device("cpu")) == {"c": places["c"]}


def test_entries_outside_survive_whatever_they_hold():
    """NaN and negative zero, which arithmetic would not keep."""
    full = torch.full((5, 4), float("nan"))
    full[1] = -0.0
    before = full.view(torch.int32).clone()
    scatter_from(torch.ones(2, 2), full, (torch.tensor([0, 4]), torch.tensor([1, 3])))
    inside = torch.zeros(5, 4, dtype=torch.bool)
    inside[[[0], [4]], [1, 3]] = True
    assert bool((full[inside] == 1).all()) and torch.equal(full.view(torch.int32)[~inside], before[~inside])


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Staging pinned as on a GPU, without one: what is registered and not yet let go."""
    held: list[int] = []
    monkeypatch.setattr(memory, "register", lambda tensor: held.append(tensor.data_ptr()))
    monkeypatch.setattr(memory, "unregister", lambda tensor: held.remove(tensor.data_ptr()))
    return held


@pytest.fixture(params=[1, transfer.PART], ids=["a tensor a part", "one part"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART", request.param)


@pytest.mark.usefixtures("part")
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 8), min_size=1), st.sets(st.integers(0, 2), min_size=1), st.booleans())
def test_slabs_move_whole(pinned: list[int], units: set[int], heads: set[int], staged: bool):
    """Through staging as on a GPU, and without; the delta is the norm of what changed."""
    shapes = {"a": torch.Size([9, 6]), "b": torch.Size([9]), "c": torch.Size([3]), "count": torch.Size([])}
    groups = Groups((Group("u", 9, (Slot("a", 0), Slot("b", 0))), Group("h", 3, (Slot("a", 1, 2),))), shapes)
    plan = Plan(groups, {"u": sorted(units), "h": sorted(heads)})
    generator = torch.Generator().manual_seed(0)
    master = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    before = {name: tensor.clone() for name, tensor in master.items()}
    moves = Transfer(torch.device("cpu"), overlap=staged)
    moves._pin = staged
    sliced = {name: plan.shape(name) for name in shapes}
    layouts: list[SlabLayout] = [(torch.float32, torch.float32, sliced)]
    slab = Slab(sliced, torch.float32)
    moves.fetch(master, layouts, [slab], plan, "weights")
    for name, part in slab.items():
        assert torch.equal(part, master[name][mesh(master[name], plan.indices(name))])
        part += 1
    out = moves.staging(layouts, [slab], "weights")
    unloading = moves.unload([slab], out, FP32.rounding(0, "weights"))
    parts = list(unloading.parts)
    assert [name for part in parts for name in part.names] == list(slab) and unloading.excess() == 0
    assert len(parts) == (4 if transfer.PART == 1 else 1)
    squared = moves.merge(parts, master, plan, delta=True)
    numel = sum(part.numel() for part in slab.values())
    assert squared == pytest.approx(numel, rel=1e-5)
    assert moves.work.nbytes == 2 * slab.nbytes
    assert moves.staging_bytes == (slab.nbytes if staged else 0)
    for name, tensor in master.items():
        places = mesh(tensor, plan.indices(name))
        before[name][places] += 1
        assert torch.equal(tensor, before[name])
    assert bool(pinned) == staged
    moves.close()
    assert moves.staging_bytes == 0 and not pinned


def test_staging_is_reused_while_shapes_stay_and_replaced_when_they_change(pinned: list[int]):
    moves = Transfer(torch.device("cpu"), overlap=True)
    moves._pin = True
    groups = Groups((Group("u", 4, (Slot("a", 0),)),), {"a": torch.Size([4, 2])})
    for kept, rows in (([0, 1], 2), ([1, 3], 2), ([0, 1, 2], 3)):
        plan = Plan(groups, {"u": kept})
        shapes = {"a": plan.shape("a")}
        slab = Slab(shapes, torch.float32)
        moves.fetch({"a": torch.ones(4, 2)}, [(torch.float32, torch.float32, shapes)], [slab], plan, "weights")
        assert slab["a"].shape == (rows, 2) and moves.staging_bytes == slab.nbytes and len(pinned) == 1


def test_staging_of_other_widths_lies_in_the_same_memory_while_that_is_large_enough() -> None:
    """To pin anew, three times a round, would take longer than what is moved."""
    one = Transfer(torch.device("cpu"), overlap=True)
    places = []
    for rows in (40, 30, 40, 50, 20):
        (staged,) = one.staging_ahead([(torch.float32, torch.bfloat16, {"a": torch.Size([rows, 7])})], "weights")
        assert staged["a"].shape == (rows, 7) and staged.flat.dtype == torch.bfloat16
        assert staged.nbytes == 2 * (-(-rows * 7 // 32) * 32)
        staged.flat.fill_(rows)
        places.append(staged.flat.data_ptr())
    assert places[0] == places[1] == places[2] and places[3] == places[4]
    one.close()
