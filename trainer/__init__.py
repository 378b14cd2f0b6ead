"""Training of latent visual reasoning."""

from .ilvr_grpo_config import ILVRGRPOConfig
from .ilvr_grpo_trainer import ILVRGRPOTrainer
from .ilvr_trainer import ILVRTrainer
from .ilvr_training_config import ILVRTrainingConfig
from .inputs.data_collator import LatentDataCollator
from .inputs.prompts import make_prompts
from .watching.selection_drawing import SelectionDrawingCallback


__all__ = [
    "ILVRGRPOConfig",
    "ILVRGRPOTrainer",
    "ILVRTrainer",
    "ILVRTrainingConfig",
    "LatentDataCollator",
    "SelectionDrawingCallback",
    "make_prompts",
]
