"""Task `causal_lm`: any transformers language model, new or pretrained, on plain text."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from offload_trainer.errors import UserError
from offload_trainer.tasks.hf_config import fitted_config
from offload_trainer.tasks.task import Shuffle, Task
from offload_trainer.tasks.text import BYTES, TrainBlocks, blocks, find_documents, pack, read_documents, split
from offload_trainer.tasks.weights import Weights, weight_files

if TYPE_CHECKING:
    from offload_trainer.config import CausalLM


def build(config: "CausalLM", seed: int) -> Task:
    """The model on meta, the text packed in memory. A batch is (sequences, sequence + 1) int64 token ids.

    Raises UserError for a model, text or tokenizer that is missing or does not fit the rest, cheapest checks first.
    """
    folder, files = None, []
    if isinstance(config.model, str):
        folder = Path(config.model).expanduser()
        files = _check_folder(folder)
        model_config = _folder_config(folder)
    else:
        model_config = _dict_config(config.model)
    documents = find_documents(config.data)
    tokenizer = _load_tokenizer(config.tokenizer)
    _check_sizes(config, model_config, BYTES if tokenizer is None else len(tokenizer))

    model = _meta_model(model_config, folder)
    weights = Weights.match(files, model) if folder else None
    train, val = split(read_documents(documents), config.val_fraction)
    train_blocks = _blocks(train, "training", config, tokenizer)
    val_blocks = _blocks(val, "validation", config, tokenizer)
    # The same for every seed, so that runs can be compared.
    val_order = Shuffle(len(val_blocks), config.batch_size, seed=0)
    val_batches = min(config.val_batches, len(val_blocks) // config.batch_size)
    text_config = model_config.get_text_config()
    length = min(11, getattr(text_config, "max_position_embeddings", None) or 11)
    return Task(
        model=model,
        example_inputs={
            "input_ids": torch.arange(3 * length).view(3, length) % text_config.vocab_size,
            "use_cache": False,
        },
        loss_fn=loss,
        metrics_fn=metrics,
        train=TrainBlocks(train_blocks, config.batch_size, seed),
        val=[val_blocks[val_order.indices(step)].long() for step in range(val_batches)],
        unit="tokens",
        count=lambda batch: batch[:, 1:].numel(),
        materialise=lambda model: materialise(model, weights),
        save_export=_exporter(tokenizer),
    )


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, in float32. batch: (sequences, sequence + 1) token ids."""
    return metrics(module, batch)["loss"]


def metrics(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """`loss` as above, and `accuracy`: the share of tokens whose most probable prediction is right."""
    logits = module(input_ids=batch[:, :-1], use_cache=False).logits.float().flatten(0, 1)  # (tokens, vocabulary)
    targets = batch[:, 1:].flatten()
    return {
        "loss": F.cross_entropy(logits, targets),
        "accuracy": (logits.detach().argmax(-1) == targets).float().mean(),
    }


@torch.no_grad()
def materialise(model: Any, weights: Weights | None) -> None:
    """Fills a transformers model in place whose tensors, built on meta, are now real: stored weights or a fresh start.

    What no file holds is initialised as transformers does it, buffers that are never saved (rotary frequencies)
    included, and random from torch's seed; tied tensors end as one.
    """
    # Undefined memory, not an error, is what a tensor left on meta would be later.
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"materialise needs real memory for every tensor; on meta: {', '.join(left)}")
    model.tie_weights()
    _forget_initialised(model)
    for name in getattr(model, "all_tied_weights_keys", {}):
        # The source's initialisation counts: the module that only borrows the tensor must not draw it again.
        borrower = model.get_submodule(name.rpartition(".")[0])
        if len(list(borrower.parameters(recurse=False))) == 1:
            borrower._is_hf_initialized = True
    if weights is not None:
        weights.load(model)
    model.initialize_weights()
    _forget_initialised(model)


def _forget_initialised(model: nn.Module) -> None:
    """Removes the marks by which transformers skips what is initialised already."""
    for item in [*model.modules(), *model.parameters(), *model.buffers()]:
        vars(item).pop("_is_hf_initialized", None)


def _meta_model(model_config: Any, folder: Path | None) -> Any:
    """The model without memory, in float32 unless the config dict asks for another dtype."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=model_config.dtype or torch.float32)
    except (ValueError, ImportError) as error:
        raise UserError(f"task.model: {_first_line(error)}") from error
    if folder and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _dict_config(values: dict[str, Any]) -> Any:
    """A transformers config of `values["model_type"]`; a field that type does not have is an error, not ignored."""
    fields = dict(values)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"task.model.model_type ({model_type}) must be a model type of transformers, such as llama")
    try:
        model_config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # validation errors of several libraries, each about a value in the dict
        raise UserError(f"task.model ({model_type}): {_first_line(error)}") from error
    known = {field.name for field in dataclasses.fields(model_config)}
    for name in fields:
        # Whatever a config class does not take stays on it as an attribute that nothing reads.
        if name not in known and name in vars(model_config) and not name.startswith("_"):
            raise UserError(f"task.model.{name} is not a field of {type(model_config).__name__}")
    return model_config


def _check_folder(folder: Path) -> list[Path]:
    """The weight files of a folder that has what a pretrained model needs."""
    if not folder.is_dir():
        raise UserError(
            f"task.model ({folder}) is not a folder: give a local model folder, or a config with model_type"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"task.model ({folder}) has no config.json")
    return weight_files(folder)


def _folder_config(folder: Path) -> Any:
    try:
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken JSON, an unknown model type, values that its class refuses
        raise UserError(f"task.model ({folder}): config.json: {_first_line(error)}") from error
    if getattr(model_config, "quantization_config", None):
        raise UserError(f"task.model ({folder}) is quantized: training needs the original weights")
    # Stored half precision is widened, exactly: the master takes many small updates, which bfloat16 would round away.
    model_config.dtype = torch.float32
    return model_config


def _load_tokenizer(folder: str | None) -> Any | None:
    if folder is None:
        return None
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"task.tokenizer ({folder}) is not a folder: give a local tokenizer folder, or null for bytes")
    try:
        return AutoTokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True)
    except Exception as error:  # whatever is wrong with the files in it
        raise UserError(f"task.tokenizer ({folder}) does not load: {_first_line(error)}") from error


def _check_sizes(config: "CausalLM", model_config: Any, tokens: int) -> None:
    text_config = model_config.get_text_config()
    if text_config.vocab_size < tokens:
        raise UserError(
            f"task.model's vocab_size ({text_config.vocab_size}) must be at least the tokenizer's ({tokens}"
            f"{'' if config.tokenizer else ', bytes'})"
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and config.sequence > positions:
        raise UserError(
            f"task.sequence ({config.sequence}) must be at most the model's max_position_embeddings ({positions})"
        )


def _blocks(documents: list[bytes], part: str, config: "CausalLM", tokenizer: Any | None) -> Tensor:
    """(blocks, sequence + 1) of one part of the text; at least one batch."""
    tokens = pack(documents, tokenizer) if documents else torch.empty(0, dtype=torch.uint8)
    cut = blocks(tokens, config.sequence)
    if len(cut) < config.batch_size:
        raise UserError(
            f"task.data ({config.data}) gives {len(cut)} {part} sequences of task.sequence ({config.sequence}) tokens; "
            f"one batch (task.batch_size) is {config.batch_size}"
        )
    return cut


def _exporter(tokenizer: Any | None) -> Callable[[nn.Module, Path], str | None]:
    def save_export(module: nn.Module, folder: Path) -> str | None:
        """Config, generation settings and tokenizer, as `from_pretrained` looks for them."""
        config = fitted_config(module)
        if config is not None:
            config.save_pretrained(folder)
        generation = getattr(module, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            # Not save_pretrained: it refuses settings that loading accepts, which is no reason to lose an export.
            generation.to_json_file(folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if config is None:
            return (
                f"there is no config.json: no {type(module.config).__name__} known here expresses these widths (layers "
                "that differ need structure.budget per_group); offload_trainer.load_export loads it"
            )
        return None

    return save_export


def _first_line(error: Exception) -> str:
    """The error in one line, without the lists and advice that follow in some messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
