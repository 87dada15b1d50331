"""The Hugging Face config of a sliced module, where one exists."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

# Config key → (end of a parameter's name, its axis): the key is that axis' size, in heads where the key counts heads.
_WIDTHS = {
    "hidden_size": ("embed_tokens.weight", 1),
    "intermediate_size": ("mlp.down_proj.weight", 1),
    "num_attention_heads": ("self_attn.q_proj.weight", 0),
    "num_key_value_heads": ("self_attn.k_proj.weight", 0),
}


def fitted_config(module: nn.Module) -> Any | None:
    """A config from which transformers builds exactly this module; None when no config can express its widths.

    That is shown, not assumed: a model built from the config (on the meta device) must have the same parameters.
    Layers of different widths, for one, have no config.
    """
    config: Any = copy.deepcopy(module.config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if getattr(config, "num_attention_heads", None) and getattr(config, "hidden_size", None):
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, (ending, axis) in _WIDTHS.items():
        sizes = {shape[axis] for name, shape in shapes.items() if name.endswith(ending)}
        if not sizes or getattr(config, key, None) is None:
            continue
        size = sizes.pop()
        setattr(config, key, size // config.head_dim if "heads" in key else size)
    with torch.device("meta"):
        try:
            built = AutoModelForCausalLM.from_config(config)
        except (ValueError, RuntimeError):
            return None  # transformers itself refuses such widths
    expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return config if expected == shapes and type(built) is type(module) else None
