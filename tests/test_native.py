"""The compiled kernels against the plain transfers, bit for bit."""

import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from offload_trainer import UserError
from offload_trainer.device import native
from offload_trainer.device.elements import Index, Pair, gather_into, scatter_from
from offload_trainer.device.native import Kernels, NotCompiled, load_kernels
from offload_trainer.master import Slab

try:
    KERNELS = load_kernels()
except NotCompiled as error:
    pytest.skip(str(error), allow_module_level=True)

TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.bool]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def picked(size: int, pattern: str, generator: torch.Generator) -> Tensor | None:
    """Kept indices of an axis."""
    if pattern == "whole":
        return None
    if pattern == "every":
        return torch.arange(size)
    if pattern == "one":
        return torch.randint(size, (1,), generator=generator)
    if pattern == "none":
        return torch.zeros(0, dtype=torch.int64)
    block = {"runs": 5, "heads": 64}.get(pattern, 1)
    share = {"few": 0.05}.get(pattern, 0.5)
    units = torch.rand(-(-size // block), generator=generator) < share
    return units.repeat_interleave(block)[:size].nonzero().flatten()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Index]:
    """A full tensor and what is kept of it; small axes and such as fill many vectors."""
    sizes = st.one_of(st.integers(1, 5), st.integers(1, 90), st.sampled_from([16, 32, 64, 128, 300]))
    shape = draw(st.lists(sizes, max_size=4).filter(lambda shape: math.prod(shape) < 60_000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pattern = st.sampled_from(["whole", "whole", "half", "half", "runs", "heads", "few", "one", "every", "none"])
    index = tuple(picked(size, draw(pattern), generator) for size in shape)
    return noise(tuple(shape), draw(st.integers(0, 9)), draw(st.sampled_from(TYPES))), index


def kept_shape(full: Tensor, index: Index) -> tuple[int, ...]:
    return tuple(size if kept is None else len(kept) for size, kept in zip(full.shape, index, strict=True))


def framed(shape: tuple[int, ...], dtype: torch.dtype, lead: int) -> tuple[Tensor, Tensor]:
    """A tensor that begins `lead` elements into a larger one, which shows what is written outside; and that one."""
    numel = math.prod(shape)
    frame = torch.full((lead + numel + 40,), 77, dtype=dtype)
    return frame[lead : lead + numel].view(shape), frame


def untouched(frame: Tensor, lead: int, numel: int) -> bool:
    return bool((frame[:lead] == frame.new_tensor(77)).all() and (frame[lead + numel :] == frame.new_tensor(77)).all())


@settings(max_examples=250, deadline=None)
@given(cases(), st.integers(0, 9), st.integers(1, 2))
def test_gather_is_the_plain_one(case: tuple[Tensor, Index], lead: int, threads: int) -> None:
    full, index = case
    expected = torch.zeros(kept_shape(full, index), dtype=full.dtype)
    gather_into(expected, full, index)
    out, frame = framed(kept_shape(full, index), full.dtype, lead)
    KERNELS.gather([(out, full, index)], threads=threads)
    assert torch.equal(bits(out), bits(expected)) and untouched(frame, lead, out.numel())


@settings(max_examples=250, deadline=None)
@given(cases(), st.booleans(), st.integers(1, 2))
def test_write_back_is_the_plain_one(case: tuple[Tensor, Index], delta: bool, threads: int) -> None:
    """No bit elsewhere changes."""
    full, index = case
    values = noise(kept_shape(full, index), 10, full.dtype)
    expected = full.clone()
    plain = scatter_from(values, expected, index, delta=delta)
    squared = KERNELS.scatter([(values, full, index)], delta=delta, threads=threads)
    assert torch.equal(bits(full), bits(expected))
    assert squared == pytest.approx(plain, rel=1e-5)  # torch's sum is in float32


def test_entries_outside_survive_whatever_they_hold() -> None:
    full = torch.full((33, 50), float("nan"))
    full[1] = -0.0
    before = full.view(torch.int32).clone()
    rows, columns = torch.tensor([0, 4, 32]), torch.tensor([1, 3, 17, 48])
    KERNELS.scatter([(torch.ones(3, 4), full, (rows, columns))], delta=True)
    inside = torch.zeros(33, 50, dtype=torch.bool)
    inside[rows[:, None], columns] = True
    assert bool((full[inside] == 1).all()) and torch.equal(full.view(torch.int32)[~inside], before[~inside])


def slab_pairs() -> list[Pair]:
    """A slab of many tensors, of which some are several tasks."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (700, 300), "down": (300, 700), "bias": (700,), "conv": (90, 130, 3, 3), "whole": (200_000,)}
    kept = {
        name: tuple(picked(n, "half", generator) if n > 3 else None for n in shape) for name, shape in shapes.items()
    }
    kept["whole"] = (None,)
    full = {name: noise(shape, 1) for name, shape in shapes.items()}
    slab = Slab({name: torch.Size(kept_shape(full[name], kept[name])) for name in shapes}, torch.float32)
    return [(slab[name], full[name], kept[name]) for name in shapes]


def test_a_slab_moves_in_one_call_and_its_sum_is_the_same_in_any_number_of_threads() -> None:
    pairs = slab_pairs()
    sums: dict[int, float] = {}
    for threads in (1, 2, 3, 8):
        KERNELS.gather(pairs, threads=threads)
        for dense, full, index in pairs:
            expected = torch.empty_like(dense)
            gather_into(expected, full, index)
            assert torch.equal(dense, expected)
            dense += noise(tuple(dense.shape), 2)
        copies = [(dense, full.clone(), index) for dense, full, index in pairs]
        sums[threads] = KERNELS.scatter(copies, delta=True, threads=threads)
        for dense, full, index in copies:
            back = torch.empty_like(dense)
            gather_into(back, full, index)
            assert torch.equal(back, dense)
    assert len(set(sums.values())) == 1
    plain = sum(scatter_from(*pair, delta=True) for pair in pairs)
    assert sums[1] == pytest.approx(plain, rel=1e-6)
    assert KERNELS.scatter([], delta=True) == 0


def test_what_it_cannot_move() -> None:
    full, half = torch.zeros(4, 6), torch.tensor([0, 2])
    assert Kernels.can_move(torch.zeros(2, 6), full, (half, None))
    for dense, other, index in (
        (torch.zeros(3, 6), full, (half, None)),  # shapes
        (torch.zeros(2, 5), full, (half, None)),
        (torch.zeros(2, 6), full, (half,)),
        (torch.zeros(6, 2).T, full, (half, None)),  # strides
        (torch.zeros(4, 2), full.T.contiguous().T, (None, half)),
        (torch.zeros(2, 6), full, (torch.tensor([0, 1, 2])[::2], None)),
        (torch.zeros(2, 6), full, (half.int(), None)),  # types
        (torch.zeros(2, 6).half(), full.half(), (half, None)),
        (torch.zeros(2, 6).bfloat16(), full, (half, None)),
        (torch.zeros(2, 6), full.bfloat16(), (half, None)),
        (torch.zeros(2, 6, dtype=torch.complex128), full.to(torch.complex128), (half, None)),
        (torch.zeros(2, 6, device="meta"), full, (half, None)),
    ):
        assert not Kernels.can_move(dense, other, index)
        with pytest.raises(ValueError, match="cannot move"):
            KERNELS.gather([(dense, other, index)])


@pytest.mark.parametrize("places", [[2, 0], [1, 1], [0, 4], [-1, 0]])
def test_a_wrong_index_is_an_error_before_anything_moves(places: list[int]) -> None:
    full, dense = torch.zeros(4, 6), torch.ones(2, 6)
    pairs: list[Pair] = [(torch.ones(4, 6), full, (None, None)), (dense, full, (torch.tensor(places), None))]
    with pytest.raises(ValueError, match="not sorted, distinct and in range"):
        KERNELS.scatter(pairs)
    assert not full.any()


def test_no_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_kernels.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler \(no-such-compiler\); memory.transfer: plain does without"):
        load_kernels()
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho starting\necho 'x.cpp:1: error: it is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NotCompiled, match="it is broken"):
        load_kernels()


def test_a_failed_compilation_leaves_nothing_and_names_the_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load_kernels.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = tmp_path / "native.cpp"
    source.write_text("int main( {}")
    (tmp_path / "native_rows.h").touch()
    monkeypatch.setattr(native, "SOURCE", source)
    with pytest.raises(
        NotCompiled, match=r"native.cpp:1:\d+: error: .*; memory.transfer: plain does without"
    ) as raised:
        load_kernels()
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.glob("offload_trainer_*/*")] == ["lock"]


def test_two_processes_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, compiler = tmp_path / "calls", tmp_path / "c++"  # counts what it compiles
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo >> {calls};; esac\nexec {get_cxx_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    load_kernels.cache_clear()

    def started() -> int:
        with warnings.catch_warnings(action="ignore"):  # that this process has threads
            process = os.fork()  # saves importing everything again
        if process == 0:
            try:
                load_kernels()
            except BaseException:
                os._exit(1)
            os._exit(0)
        return process

    assert [os.waitpid(process, 0)[1] for process in [started(), started()]] == [0, 0]
    assert len(calls.read_text()) == 1
    assert sorted(path.name for path in (tmp_path / "built").glob("*/*")) == ["lock", "native.so"]
