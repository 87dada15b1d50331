"""The config of a run: frozen sections that know every rule, and `parse`, which reads YAML and overrides."""

from offload_trainer.config.parsing import parse
from offload_trainer.config.sections import (
    CausalLM,
    CheckpointConfig,
    Config,
    Custom,
    ImageClassification,
    MemoryConfig,
    OptimizerConfig,
    StructureConfig,
    TrackConfig,
)

__all__ = [
    "CausalLM",
    "CheckpointConfig",
    "Config",
    "Custom",
    "ImageClassification",
    "MemoryConfig",
    "OptimizerConfig",
    "StructureConfig",
    "TrackConfig",
    "parse",
]
