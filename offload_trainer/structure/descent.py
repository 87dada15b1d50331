"""Adam on s."""

import torch
from torch import Tensor


class Descent:
    """Moves one flat vector, (n,), in place, against the gradients it is given."""

    def __init__(self, flat: Tensor, lr: float):
        self._flat = flat
        self._adam = torch.optim.Adam([flat], lr=lr)
        # Made here and not by the first step, so that state_dict always has the same keys.
        self._moments: dict[str, Tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        self._adam.state[flat] = self._moments

    def step(self, gradient: Tensor) -> None:
        self._flat.grad = gradient
        self._adam.step()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: moment.clone() for name, moment in self._moments.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, moment in self._moments.items():
            moment.copy_(state[name])
