"""Gather and write-back of a whole slab in one call of compiled code (native.cpp), where the host has a C++ compiler.

They do what `gather_into` and `scatter_from` (elements.py) do, bit for bit, in as many threads as asked for. The call
holds no lock of Python's: a background thread can make it while others train.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_trainer.device.elements import Index, Pair
from offload_trainer.errors import UserError

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread", "-fno-tree-loop-distribute-patterns")
"""The last keeps copies of some kilobytes loops: as calls of memcpy they took twice as long on AMD's Zen 4."""
AXES = 8
"""Of a tensor at most, as in native.cpp."""
SUMMED = (torch.float32, torch.float64, torch.bfloat16)
"""Types of numbers that native.cpp can subtract."""


class NotCompiled(UserError):
    """There are no compiled kernels on this machine, in one line that says why."""


class _Move(ctypes.Structure):
    """One tensor, as in native.cpp."""

    _fields_ = (
        ("dense", ctypes.c_void_p),
        ("full", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("axes", ctypes.c_int64),
        ("shape", ctypes.c_int64 * AXES),
        ("kept", ctypes.c_int64 * AXES),
        ("index", ctypes.c_void_p * AXES),
    )


class Kernels:
    """The compiled code; made by `load_kernels`."""

    def __init__(self, library: Path):
        functions: Any = ctypes.CDLL(str(library))
        self._gather, self._scatter = functions.offload_gather, functions.offload_scatter
        whole, pointer = ctypes.c_int64, ctypes.c_void_p
        self._gather.argtypes, self._gather.restype = (pointer, whole, whole), whole
        self._scatter.argtypes, self._scatter.restype = (pointer, whole, whole, whole, pointer), whole

    @staticmethod
    def can_move(dense: Tensor, full: Tensor, index: Index) -> bool:
        """Whether both lie contiguous on the host, in one type known here, and in shapes that fit the index."""
        return (
            dense.dtype == full.dtype
            and (full.dtype in SUMMED or not full.dtype.is_floating_point)
            and full.element_size() <= 8
            and dense.device.type == full.device.type == "cpu"
            and dense.layout == full.layout == torch.strided
            and dense.is_contiguous()
            and full.is_contiguous()
            and dense.ndim == full.ndim == len(index) <= AXES
            and all(
                kept == size
                if places is None
                else places.dtype == torch.int64
                and places.device.type == "cpu"
                and places.is_contiguous()
                and places.shape == (kept,)
                for kept, size, places in zip(dense.shape, full.shape, index, strict=True)
            )
        )

    def gather(self, pairs: Sequence[Pair], *, threads: int = 1) -> None:
        """dense ← the elements of full at the kept indices, for every pair.

        Raises `ValueError`, and moves nothing, where a pair cannot be moved or an index is not sorted, distinct and in
        range.
        """
        moves = _moves(pairs)
        _check(self._gather(moves, len(pairs), threads), pairs)

    def scatter(self, pairs: Sequence[Pair], *, delta: bool = False, threads: int = 1) -> float:
        """full at the kept indices ← dense, for every pair; all other elements are not touched.

        With `delta`, returns Σ (new − old)² over floating-point tensors, the same number for any number of threads;
        0 otherwise. Raises as `gather` does.
        """
        moves = _moves(pairs)
        squared = ctypes.c_double()
        _check(self._scatter(moves, len(pairs), threads, delta, ctypes.byref(squared)), pairs)
        return squared.value


def _moves(pairs: Sequence[Pair]) -> ctypes.Array[_Move]:
    moves = (_Move * len(pairs))()
    for move, (dense, full, index) in zip(moves, pairs, strict=True):
        if not Kernels.can_move(dense, full, index):
            raise ValueError(f"cannot move {_named(dense)} and {_named(full)}")
        axes = len(index)
        move.dense, move.full = dense.data_ptr(), full.data_ptr()
        move.bytes, move.number, move.axes = full.element_size(), full.dtype in SUMMED, axes
        move.shape[:axes], move.kept[:axes] = full.shape, dense.shape
        move.index[:axes] = [None if places is None else places.data_ptr() for places in index]
    return moves


def _named(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _check(wrong: int, pairs: Sequence[Pair]) -> None:
    if wrong >= 0:
        raise ValueError(f"an index of {_named(pairs[wrong][1])} is not sorted, distinct and in range")


@functools.cache
def load_kernels() -> Kernels:
    """The kernels for this CPU; compiles them first (some seconds) where torch's folder of extensions has none.

    Processes that start at once compile them once: the others wait. Raises `NotCompiled`.
    """
    try:
        return Kernels(_library())
    except (ImportError, OSError, RuntimeError) as error:
        raise _not_compiled(_reason(str(error))) from error


def _library() -> Path:
    from torch.utils import cpp_extension  # here: slow to import

    key = _key(cpp_extension.get_cxx_compiler())
    folder = Path(cpp_extension._get_build_directory(f"offload_trainer_{key}", False))
    library = folder / "native.so"
    with open(folder / "lock", "a") as lock:
        # Processes wait here for the one that compiles. A lock of the system's, for torch's own outlives a killed one.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as built:
                cpp_extension.load(
                    "offload_trainer_native",
                    str(SOURCE),
                    extra_cflags=list(FLAGS),
                    extra_ldflags=["-pthread"],
                    build_directory=built,
                    is_python_module=False,
                )
                os.replace(next(Path(built).glob("*.so")), library)
    return library


def _key(compiler: str) -> str:
    """Of the sources, the flags, and what they mean to the compiler: its version and the features of this CPU."""
    command = [*shlex.split(compiler), *FLAGS, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise _not_compiled(f"no C++ compiler ({compiler})") from error
    except subprocess.CalledProcessError as error:
        raise _not_compiled(f"{compiler} failed: {_reason(error.stderr)}") from error
    sources = [path.read_text() for path in (SOURCE, SOURCE.with_name("native_rows.h"))]
    return hashlib.sha256("\0".join([*sources, " ".join(command), macros]).encode()).hexdigest()[:16]


def _reason(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in lines[1:] if "error:" in line), lines[0])


def _not_compiled(reason: str) -> NotCompiled:
    return NotCompiled(f"the native transfer kernels cannot be compiled: {reason}; memory.transfer: plain does without")
