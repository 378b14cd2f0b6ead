"""ILVR: interleaved latent visual reasoning as an extension of the Hugging Face ecosystem.

Importing the package registers `ILVRConfig`, `ILVRForConditionalGeneration` and `ILVRProcessor` with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_ilvr import ILVRConfig
from .latent_attention import ColumnFacts, hide_images_after_first_span
from .latent_filling import ChunkGradients
from .latent_spans import is_forced, pad_spans
from .modeling_ilvr import ILVRForConditionalGeneration, ILVRModel, ILVROutput
from .processing_ilvr import ILVRProcessor
from .weight_gradients import GatheredWeightGradients


__version__ = "0.1.0"
__all__ = [
    "ColumnFacts",
    "ILVRConfig",
    "ILVRForConditionalGeneration",
    "ILVRModel",
    "ILVROutput",
    "ILVRProcessor",
    "hide_images_after_first_span",
    "is_forced",
    "pad_spans",
]

AutoConfig.register("ilvr", ILVRConfig)
AutoModel.register(ILVRConfig, ILVRForConditionalGeneration)
AutoModelForImageTextToText.register(ILVRConfig, ILVRForConditionalGeneration)
AutoProcessor.register(ILVRConfig, ILVRProcessor)
ILVRConfig.register_for_auto_class()
ILVRForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
ILVRProcessor.register_for_auto_class()
ChunkGradients.gather = GatheredWeightGradients
