"""What is trained: model, data, loss and metric, one file a task."""

from offload_trainer.config import CausalLM, Custom, ImageClassification
from offload_trainer.tasks import causal_lm, custom, image_classification
from offload_trainer.tasks.custom import rehearse, rehearse_narrow
from offload_trainer.tasks.task import Task

__all__ = ["Task", "build_task", "rehearse", "rehearse_narrow"]


def build_task(config: CausalLM | ImageClassification | Custom, seed: int) -> Task:
    """The task of a config section; its data is opened and checked, its model (if large) still on the meta device."""
    match config:
        case CausalLM():
            return causal_lm.build(config, seed)
        case ImageClassification():
            return image_classification.build(config, seed)
        case Custom():
            return custom.build(config, seed)
