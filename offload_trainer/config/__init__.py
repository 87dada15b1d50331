"""The config of a run: frozen sections that know every rule, and `parse`, which reads YAML and overrides."""

from offload_trainer.config.parsing import parse
from offload_trainer.config.sections import (
    CheckpointConfig,
    Config,
    ExportConfig,
    MemoryConfig,
    OptimizerConfig,
    StructureConfig,
    TrackConfig,
)
from offload_trainer.config.task_sections import CausalLM, Custom, ImageClassification

__all__ = [
    "CausalLM",
    "CheckpointConfig",
    "Config",
    "Custom",
    "ExportConfig",
    "ImageClassification",
    "MemoryConfig",
    "OptimizerConfig",
    "StructureConfig",
    "TrackConfig",
    "parse",
]
