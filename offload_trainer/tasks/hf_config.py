"""The Hugging Face config of a sliced module, where one exists: worked out, then proven."""

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from offload_trainer.tasks.knobs import NoConfigError, fit_shapes, model_shapes, shapes_of
from offload_trainer.tasks.weights import materialise

Inputs = Mapping[str, Any] | tuple[Any, ...]


def save_config(module: Any, folder: Path, inputs: Inputs) -> str | None:
    """Writes `config.json` for a sliced `PreTrainedModel`; where there is none, returns a note that says why."""
    try:
        fitted_config(module, inputs).save_pretrained(folder)
    except NoConfigError as error:
        return f"there is no config.json: {error}; offload_trainer.load_export loads it"
    return None


def why_no_config(module: Any) -> str | None:
    """Why no config has the shapes of a sliced `PreTrainedModel`, on meta if you like; None if one has."""
    try:
        shaped_config(module)
    except NoConfigError as error:
        return str(error)
    return None


def fitted_config(module: Any, inputs: Inputs) -> Any:
    """A config from which transformers builds exactly this module, a sliced `PreTrainedModel`.

    That is shown, not assumed: a model built from the config as it is read back must have the same tensors and, with
    the module's own (shared, not copied), the same outputs for `inputs`. Raises NoConfigError where there is none:
    for layers of different widths, widths that the config's class refuses, and models whose forward computes with a
    full width (Gemma scales its embeddings by √hidden_size).
    """
    config = shaped_config(module)
    whole = model_shapes(type(module), module.config) == shapes_of(module)  # nothing is sliced, nothing to prove
    if not whole and not _same_outputs(module, _read_back(config), inputs):
        raise NoConfigError(f"a {type(module).__name__} that is built with these widths computes something else")
    return config


def shaped_config(module: Any) -> Any:
    """A config of whose models the tensors have the module's shapes. Raises NoConfigError."""
    kind, wanted = type(module), shapes_of(module)
    config: Any = copy.deepcopy(module.config)
    config.dtype, config.architectures = module.dtype, [kind.__name__]
    vars(config).pop("auto_map", None)  # names code that lay beside the original and was never run
    if model_shapes(kind, config) == wanted:
        return config  # nothing is sliced
    fit_shapes(kind, config, wanted)
    text = config.get_text_config()
    if getattr(text, "num_experts_per_tok", None) and getattr(text, "num_experts", None):
        text.num_experts_per_tok = min(text.num_experts_per_tok, text.num_experts)
    if model_shapes(kind, _read_back(config)) != wanted:
        raise NoConfigError(f"a {kind.__name__} that is built with these widths has other shapes")
    return config


def _read_back(config: Any) -> Any:
    """The config as it will be read from its file."""
    try:
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            return type(config).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of the several libraries that validate
        reason = " ".join(str(error).split())[:200]
        raise NoConfigError(f"{type(config).__name__} refuses these widths ({reason})") from error


@torch.no_grad()
def _same_outputs(module: Any, config: Any, inputs: Inputs) -> bool:
    """Whether a model of the config, given the module's own tensors, computes what the module does."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(module.config, name):
            setattr(config, name, getattr(module.config, name))
    with torch.device("meta"):
        built = type(module)(config)
    built.load_state_dict(module.state_dict(), assign=True)
    device = next(module.parameters()).device
    for part in built.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:  # never saved, so it has to come from the config
                part._buffers[name] = torch.empty_like(buffer, device=device)
    materialise(built, _mark_stored)
    training = module.training
    outputs = [_run(model, inputs, device) for model in (module, built)]
    module.train(training)
    return all(
        one.shape == other.shape
        and float((one - other).abs().max()) <= 8 * torch.finfo(one.dtype).eps * float(one.abs().max())
        for one, other in zip(*outputs, strict=True)
    )


def _mark_stored(model: nn.Module) -> None:
    """What a state dict holds has its values already."""
    for tensor in model.state_dict(keep_vars=True).values():
        vars(tensor)["_is_hf_initialized"] = True


def _run(model: Any, inputs: Inputs, device: torch.device) -> list[Tensor]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    model.eval()
    if isinstance(inputs, Mapping):
        outputs = model(**{name: move(value) for name, value in inputs.items()})
    else:
        outputs = model(*map(move, inputs))
    found = [value for value in outputs.to_tuple() if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise NoConfigError(f"{type(model).__name__} returns no tensor by which to compare")
    return found
