"""How the master stores what the device computes with in float32, and how a value gets from one type to the other."""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_trainer.errors import UserError
from offload_trainer.groups.running import is_floating

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""As a config names them."""
LARGEST = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of float32 to bfloat16, to one of the two neighbours so that the expected value is exact.

    The random bits of an element are a hash of these keys and its place, in 32-bit integer arithmetic. So they are the
    same in every process, on every device and however a slab is cut into pieces, and leave no state to be resumed.
    """

    keys: tuple[int, ...]
    """Four signed 32-bit numbers."""

    def narrow(self, values: Tensor, start: int) -> Tensor:
        """`values` (float32, contiguous, any shape) as bfloat16; `start` is the place of the first of them.

        What bfloat16 represents comes back as it is, NaN and infinities among it; what is finite stays finite.
        """
        bits = values.view(torch.int32) + self._random(start, values.numel(), values.device).view(values.shape)
        bits += 2**15  # the random bits came signed
        # A carry out of the lower half takes the value to its neighbour away from zero, across exponents too.
        bits >>= 16
        rounded = bits.to(torch.int16).view(torch.bfloat16)
        # Rare, so a CPU is asked whether it is needed; for a GPU's answer the host would have to wait.
        if values.device.type != "cpu" or not is_ordinary(values):
            nearest = values.where(values.isinf(), values.clamp(-LARGEST, LARGEST)).to(torch.bfloat16)
            rounded = rounded.where(values.abs() <= LARGEST, nearest)
        return rounded

    def _random(self, start: int, count: int, device: torch.device) -> Tensor:
        """16 bits for each of the places from `start` on: (count,) int16, two of them from every hash.

        The hash is Wellons' bijective triple32 (github.com/skeeto/hash-prospector) with a key added at every stage.
        """
        first = start // 2
        words = torch.arange((start + count + 1) // 2 - first, dtype=torch.int32, device=device)
        words += _signed(self.keys[0] + first)
        for shift, factor, key in zip((17, 11, 15), (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB), self.keys[1:], strict=True):
            words ^= (words >> shift).bitwise_and_(2 ** (32 - shift) - 1)  # masked: a shift of unsigned numbers
            words *= _signed(factor)
            words += key
        words ^= (words >> 14).bitwise_and_(2**18 - 1)
        return words.view(torch.int16)[start % 2 :][:count]


@dataclass(frozen=True)
class Precision:
    """Types of the master's large tensors. Vectors (norms, biases, running statistics) stay as they are: few bytes.

    Raises `UserError` for a type other than float32 and bfloat16.
    """

    weights: torch.dtype = torch.float32
    """Of float32 parameters with two axes or more: float32 or bfloat16."""
    moments: torch.dtype = torch.float32
    """Of float32 moments of such parameters: float32 or bfloat16."""
    seed: int = 0
    """Of the random rounding to bfloat16."""

    def __post_init__(self) -> None:
        for key, dtype in (("weights", self.weights), ("moments", self.moments)):
            if dtype not in TYPES.values():
                raise UserError(f"memory.{key} ({dtype}) must be {' or '.join(map(str, TYPES.values()))}")

    @property
    def names(self) -> dict[str, str]:
        """`weights` and `moments`, as a config names them."""
        names = {dtype: name for name, dtype in TYPES.items()}
        return {"weights": names[self.weights], "moments": names[self.moments]}

    def weight(self, dtype: torch.dtype, shape: torch.Size) -> torch.dtype:
        """The stored type of a parameter that computes in `dtype`."""
        return self.weights if dtype == torch.float32 and len(shape) > 1 else dtype

    def moment(self, dtype: torch.dtype, shape: torch.Size) -> torch.dtype:
        """The stored type of a moment that the optimizer keeps in `dtype`."""
        return self.moments if dtype == torch.float32 and len(shape) > 1 else dtype

    def rounding(self, round: int, what: str) -> Rounding:
        """How the write-back at the end of a round rounds `what` it writes: the weights, or a moment by its name."""
        digest = hashlib.sha256(f"{self.seed} {round} {what}".encode()).digest()
        return Rounding(struct.unpack("<4i", digest[:16]))


FP32 = Precision()


def is_ordinary(values: Tensor) -> bool:
    """Whether all are numbers within the range of bfloat16. The host waits for the device."""
    if not values.numel():
        return True
    low, high = values.aminmax()
    return bool(torch.maximum(-low, high) <= LARGEST)  # not so of NaN


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if is_floating(tensor) and tensor.numel():
            low, high = tensor.detach().aminmax()
            if not bool(low.isfinite() & high.isfinite()):
                return name
    return None


def _signed(number: int) -> int:
    """A whole number modulo 2³², as a signed 32-bit one."""
    return (number + 2**31) % 2**32 - 2**31
