"""How the master stores what the device computes with in float32."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Types of the master's large tensors. Vectors (norms, biases, running statistics) stay as they are: few bytes."""

    weights: torch.dtype = torch.float32
    """Of float32 parameters with two axes or more: float32 or bfloat16."""
    moments: torch.dtype = torch.float32
    """Of float32 moments of such parameters: float32 or bfloat16."""

    def weight(self, dtype: torch.dtype, shape: torch.Size) -> torch.dtype:
        """The stored type of a parameter that computes in `dtype`."""
        return self.weights if dtype == torch.float32 and len(shape) > 1 else dtype

    def moment(self, dtype: torch.dtype, shape: torch.Size) -> torch.dtype:
        """The stored type of a moment that the optimizer keeps in `dtype`."""
        return self.moments if dtype == torch.float32 and len(shape) > 1 else dtype
