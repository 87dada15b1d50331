"""Networks to measure on, with made-up data: how fast they train does not depend on what they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from offload_trainer.groups import Groups, find_groups
from offload_trainer.tasks.vision_models import build_model

LossFn = Callable[[nn.Module, Any], Tensor]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

CLASSES = 10
VOCABULARY = 256


@dataclass(frozen=True)
class Workload:
    """A model, what it trains on and how."""

    name: str
    build: Callable[[], nn.Module]
    example_inputs: dict[str, Tensor]
    loss_fn: LossFn
    optimizer: OptimizerFactory
    batch: Callable[[], tuple[Tensor, Tensor]]  # inputs and targets, host

    def build_empty(self) -> nn.Module:
        """Parameters on meta, for whoever fills them faster than the model does; buffers as the model makes them."""
        with init_empty_weights(include_buffers=False):
            return self.build()

    def groups(self, model: nn.Module) -> Groups:
        return find_groups(model, self.example_inputs)


def llama(
    *, hidden: int, intermediate: int, heads: int, layers: int, batch: int, sequence: int, seed: int = 0
) -> Workload:
    """A byte-level Llama of transformers, trained by AdamW on `batch` sequences a step."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=sequence,
        use_cache=False,
    )
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> tuple[Tensor, Tensor]:  # both (batch, sequence)
        text = torch.randint(VOCABULARY, (batch, sequence + 1), generator=generator)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return Workload(
        "llama",
        build=lambda: LlamaForCausalLM(config),
        example_inputs={"input_ids": torch.zeros(3, 11, dtype=torch.long)},
        loss_fn=lambda module, batch: cross_entropy(
            module(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten()
        ),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        batch=tokens,
    )


def vision(model: str, *, width: float, batch: int, image: int = 32, seed: int = 0) -> Workload:
    """One of the paper's convolutional networks, trained by SGD with momentum on `batch` images a step."""
    generator = torch.Generator().manual_seed(seed)

    def images() -> tuple[Tensor, Tensor]:  # (batch, 3, image, image), (batch,)
        return (
            torch.randn(batch, 3, image, image, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )

    return Workload(
        model,
        build=lambda: build_model(model, CLASSES, width=width),
        example_inputs={"images": torch.zeros(3, 3, image, image)},
        loss_fn=lambda module, batch: cross_entropy(module(batch[0]), batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        batch=images,
    )


def training_step(
    module: nn.Module, workload: Workload, batches: list[tuple[Tensor, Tensor]], accelerator: Accelerator
) -> Callable[[], None]:
    """Plain training of a module that lies on the device: each call is forward, backward and optimizer step."""
    optimizer = workload.optimizer(list(module.parameters()))
    taken = 0

    def step() -> None:
        nonlocal taken
        with accelerator.autocast():
            loss = workload.loss_fn(module, batches[taken % len(batches)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken += 1

    return step


def on_device(workload: Workload, count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """A few batches, there before the clock starts."""
    return [(inputs.to(device), targets.to(device)) for inputs, targets in (workload.batch() for _ in range(count))]
