"""Training of latent visual reasoning."""

from .data_collator import LatentDataCollator
from .ilvr_trainer import ILVRTrainer
from .ilvr_training_config import ILVRTrainingConfig
from .selection_drawing import SelectionDrawingCallback


__all__ = ["ILVRTrainer", "ILVRTrainingConfig", "LatentDataCollator", "SelectionDrawingCallback"]
