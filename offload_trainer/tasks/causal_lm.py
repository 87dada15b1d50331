"""Task `causal_lm`: any transformers language model, new or pretrained, on plain text."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, masking_utils

from offload_trainer.errors import UserError
from offload_trainer.tasks.hf_config import save_config, why_no_config
from offload_trainer.tasks.stored import Stored, stored_tensors
from offload_trainer.tasks.task import Shuffle, Task
from offload_trainer.tasks.text import TrainBlocks, blocks, find_documents, pack, read_documents, split
from offload_trainer.tasks.tokens import byte_tokenizer, load_tokenizer, vocabulary
from offload_trainer.tasks.weights import Weights, materialise

if TYPE_CHECKING:
    from offload_trainer.config import CausalLM


def build(config: "CausalLM", seed: int) -> Task:
    """The model on meta, the text packed in memory. A batch is (sequences, sequence + 1) int64 token ids.

    Raises UserError for a model, text or tokenizer that is missing or does not fit the rest, cheapest checks first.
    """
    folder, stored = None, []
    if isinstance(config.model, str):
        folder = Path(config.model).expanduser()
        stored = _check_folder(folder)
        model_config = _folder_config(folder)
    else:
        model_config = _dict_config(config.model)
    documents = find_documents(config.data)
    tokenizer = load_tokenizer(config.tokenizer, folder)
    _check_sizes(config, model_config, vocabulary(tokenizer), tokenizer is None)

    model = _meta_model(model_config, folder)
    weights = Weights.match(stored, model) if folder else None
    train, val = split(read_documents(documents), config.val_fraction)
    train_blocks = _blocks(train, "training", config, tokenizer)
    val_blocks = _blocks(val, "validation", config, tokenizer)
    # The same for every seed, so that runs can be compared.
    val_order = Shuffle(len(val_blocks), config.batch_size, seed=0)
    val_batches = min(config.val_batches, len(val_blocks) // config.batch_size)
    text_config = model_config.get_text_config()
    length = min(11, getattr(text_config, "max_position_embeddings", None) or 11)
    example_inputs = {
        "input_ids": torch.arange(3 * length).view(3, length) % text_config.vocab_size,
        "use_cache": False,
    }
    return Task(
        model=model,
        example_inputs=example_inputs,
        loss_fn=loss,
        metrics_fn=metrics,
        train=TrainBlocks(train_blocks, config.batch_size, seed),
        val=[val_blocks[val_order.indices(step)].long() for step in range(val_batches)],
        unit="tokens",
        count=lambda batch: batch[:, 1:].numel(),
        parted=True,
        derived=perplexity,
        materialise=lambda model: materialise(model, weights.load if weights else None),
        initialise=None if weights else lambda model: materialise(model, None),
        why_no_config=why_no_config,
        save_export=_exporter(byte_tokenizer() if tokenizer is None else tokenizer, example_inputs),
    )


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token, in float32. batch: (sequences, sequence + 1) token ids."""
    return F.cross_entropy(*_predicted(module, batch))


def metrics(module: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """`loss` as above, and `accuracy`: the share of tokens whose most probable prediction is right."""
    logits, targets = _predicted(module, batch)
    hits = logits.argmax(-1) == targets
    return {"loss": F.cross_entropy(logits, targets), "accuracy": hits.float().mean()}


def _predicted(module: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:  # (tokens, vocabulary) float32, (tokens,)
    with _whole_rows():
        logits = module(input_ids=batch[:, :-1], use_cache=False).logits
    return logits.float().flatten(0, 1), batch[:, 1:].flatten()


def _none_packed(position_ids: Tensor) -> None:
    """As the function it stands for says it of whole rows."""


@contextmanager
def _whole_rows() -> Iterator[None]:
    """A row of a batch is one sequence. transformers asks the device in every forward whether that is so, since its
    positions might start anew within a row, and the host would wait for all that the device has been given before."""
    asked = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asked is None:  # a transformers that does not
        yield
        return
    masking_utils.find_packed_sequence_indices = _none_packed  # always the same one: what is compiled depends on it
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


def perplexity(means: Mapping[str, float]) -> dict[str, float]:
    """e to the mean loss: among how many equally probable tokens the model is in doubt. Infinite beyond a float."""
    return {"perplexity": math.inf if means["loss"] > 709 else math.exp(means["loss"])}


def _meta_model(model_config: Any, folder: Path | None) -> Any:
    """The model without memory, in float32 unless the config dict asks for another dtype."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=model_config.dtype or torch.float32)
    except Exception as error:  # values that no check of the config's class caught
        raise UserError(f"task.model: {type(model_config).__name__}: {_first_line(error)}") from error
    if folder and (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # broken JSON, values that its class refuses
            raise UserError(f"task.model ({folder}): generation_config.json: {_first_line(error)}") from error
    return model


def _dict_config(values: dict[str, Any]) -> Any:
    """A transformers config of `values["model_type"]`; a field that type does not have is an error, not ignored."""
    fields = dict(values)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"task.model.model_type ({model_type}) must be a model type of transformers, such as llama")
    try:
        model_config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # validation errors of several libraries, each about a value in the dict
        raise UserError(f"task.model ({model_type}): {_first_line(error)}") from error
    # Attention reads head_dim of any config, declared or not.
    known = {"head_dim", *(field.name for field in dataclasses.fields(model_config))}
    for name in fields:
        # Whatever a config class does not take stays on it as an attribute that nothing reads.
        if name not in known and name in vars(model_config) and not name.startswith("_"):
            raise UserError(f"task.model.{name} is not a field of {type(model_config).__name__}")
    return model_config


def _check_folder(folder: Path) -> list[Stored]:
    """The stored tensors of a folder that has what a pretrained model needs."""
    if not folder.is_dir():
        raise UserError(
            f"task.model ({folder}) is not a folder: give a local model folder, or a config with model_type"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"task.model ({folder}) has no config.json")
    return stored_tensors(folder)


def _folder_config(folder: Path) -> Any:
    where = f"task.model ({folder}): config.json"
    try:
        values = json.loads((folder / "config.json").read_text())
        model_type = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is not a model's config: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = "auto_map" in values
        reason = "needs code of its own, which is never run" if code else "is not one that this transformers knows"
        raise UserError(f"{where}: model_type ({model_type}) {reason}")
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method", "quantization_config") if isinstance(quantized, dict) else quantized
        raise UserError(f"task.model ({folder}) is quantized ({method}): training needs the original weights")
    try:
        # Code that may lie in the folder as well is not run.
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # values that the model type's class refuses
        raise UserError(f"{where}: {_first_line(error)}") from error
    # Stored half precision is widened, exactly: the master takes many small updates, which bfloat16 would round away.
    model_config.dtype = torch.float32
    return model_config


def _check_sizes(config: "CausalLM", model_config: Any, tokens: int, bytewise: bool) -> None:
    text_config = model_config.get_text_config()
    if text_config.vocab_size < tokens:
        raise UserError(
            f"task.model's vocab_size ({text_config.vocab_size}) must be at least the tokenizer's ({tokens}"
            f"{', bytes' if bytewise else ''})"
        )
    for name in ("max_position_embeddings", "max_seq_len"):  # MPT's
        positions = getattr(text_config, name, None)
        if positions is not None and config.sequence > positions:
            raise UserError(f"task.sequence ({config.sequence}) must be at most the model's {name} ({positions})")


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


def _exporter(tokenizer: Any, example_inputs: dict[str, Any]) -> Callable[[nn.Module, Path], str | None]:
    def save_export(module: nn.Module, folder: Path) -> str | None:
        """Config, generation settings and tokenizer, as `from_pretrained` looks for them."""
        generation = getattr(module, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            # Not save_pretrained: it refuses settings that loading accepts, which is no reason to lose an export.
            generation.to_json_file(folder / "generation_config.json")
        tokenizer.save_pretrained(folder)
        return save_config(module, folder, example_inputs)

    return save_export


def _first_line(error: Exception) -> str:
    """The error in one line, without the lists and advice that follow in some messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
