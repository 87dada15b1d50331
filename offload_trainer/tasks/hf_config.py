"""The Hugging Face config of a sliced module, where one exists."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

# Config key → (end of a parameter's name, its axis): the key is that axis' size, in heads where the key counts heads.
_WIDTHS = {
    "hidden_size": ("embed_tokens.weight", 1),
    "intermediate_size": ("mlp.down_proj.weight", 1),
    "num_attention_heads": ("self_attn.q_proj.weight", 0),
    "num_key_value_heads": ("self_attn.k_proj.weight", 0),
}


def fitted_config(module: nn.Module) -> Any | None:
    """A config from which transformers builds exactly this module; None when no config known here does.

    That is shown, not assumed: a model built from the config must have the same parameters and, with the module's own
    weights, the same logits. Layers of different widths have no config; nor has a model whose forward computes with a
    full width (Gemma scales its embeddings by √hidden_size).
    """
    config: Any = copy.deepcopy(module.config)
    state = module.state_dict()
    if getattr(config, "num_attention_heads", None) and getattr(config, "hidden_size", None):
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, (ending, axis) in _WIDTHS.items():
        sizes = {tensor.shape[axis] for name, tensor in state.items() if name.endswith(ending)}
        if not sizes or getattr(config, key, None) is None:
            continue
        size = sizes.pop()
        setattr(config, key, size // config.head_dim if "heads" in key else size)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (ValueError, RuntimeError):
        return None  # transformers itself refuses such widths
    shapes = {name: tensor.shape for name, tensor in state.items()}
    if type(built) is not type(module) or {n: t.shape for n, t in built.state_dict().items()} != shapes:
        return None
    return config if _same_logits(module, AutoModelForCausalLM.from_config(config), state) else None


@torch.no_grad()
def _same_logits(module: Any, built: Any, state: dict[str, Tensor]) -> bool:
    """Whether `built`, given the module's weights, computes what the module does on a few tokens."""
    device = next(module.parameters()).device
    built.load_state_dict(state, assign=True)
    built.tie_weights()
    tokens = torch.arange(16, device=device).view(2, 8) % module.config.get_text_config().vocab_size
    training = module.training
    logits = [model.to(device).eval()(input_ids=tokens, use_cache=False).logits.float() for model in (module, built)]
    module.train(training)
    scale = max(float(logits[0].abs().max()), 1e-6)
    return float((logits[0] - logits[1]).abs().max()) <= 1e-3 * scale
