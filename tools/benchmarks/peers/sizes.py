"""The models to compare on: Llamas of transformers, drawn at random, on random tokens. Speed depends on neither."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

Batch = tuple[Tensor, Tensor]
"""Token ids and what follows each; both (batch, sequence), int64."""


@dataclass(frozen=True)
class Size:
    """A model and what a step of training it reads."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int
    """Sequences in a step."""
    sequence: int
    """Tokens of each."""
    checkpointing: bool
    """Keep each layer's input only and compute the rest again in the backward."""

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.sequence

    def as_config(self) -> dict[str, Any]:
        """As keyword arguments of `LlamaConfig`."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": max(64, self.sequence),
        }


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, vocabulary=256, batch=2, sequence=32, checkpointing=False),
    "small": Size(512, 1536, 4, 8, 4, vocabulary=4096, batch=4, sequence=128, checkpointing=True),
    "1B": Size(2048, 5632, 21, 32, 8, vocabulary=8192, batch=4, sequence=1024, checkpointing=True),
    "3B": Size(3072, 8192, 29, 24, 8, vocabulary=8192, batch=4, sequence=1024, checkpointing=True),
}
"""Named by their parameters: 156 thousand, 19 million, 1.0 and 3.0 billion."""


def architecture(size: Size) -> LlamaForCausalLM:
    """The model before training, its parameters on the meta device and its buffers (rotary frequencies) real."""
    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM(LlamaConfig(use_cache=False, **size.as_config())).train()


def save_activations(model: LlamaForCausalLM, size: Size) -> None:
    """Turn checkpointing on where the size asks for it; after tracing, which it would hide layers from."""
    if size.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def materialise(model: nn.Module, device: torch.device, *, buffers: torch.device | None = None) -> None:
    """Memory on a device for parameters that are on meta, their values left to `fill`; buffers are moved as they are.

    buffers: where they go, by default to the parameters.
    """
    values = {name: buffer.to(buffers or device) for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, value)


@torch.no_grad()
def fill(parameters: Iterable[Tensor], device: torch.device) -> None:
    """The same initial values for every contender, drawn on `device`: a GPU is a hundred times faster than a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    for parameter in parameters:
        if parameter.ndim == 1:
            parameter.fill_(1)  # gains of norms
        else:
            parameter.copy_(torch.empty(parameter.shape, device=device).normal_(std=0.02, generator=generator))


def batches(size: Size, count: int, device: torch.device) -> list[Batch]:
    """The same for every contender, on the device before the clock starts."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(size.vocabulary, (count, size.batch, size.sequence + 1), generator=generator).to(device)
    return [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in text]


def loss_fn(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats a token, in float32."""
    return cross_entropy(module(input_ids=batch[0]).logits.float().flatten(0, 1), batch[1].flatten())
