"""What a trainer is given by name: checkpoints, and adapters over their backbone."""

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.peft_utils import find_adapter_config_file

from ilvr import ILVRForConditionalGeneration, ILVRProcessor


def load_model(name_or_path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """The model of an ILVR checkpoint, or a trainable adapter over its backbone.

    Args:
        name_or_path (`str`): Hub id or folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether the checkpoint's own code may run.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: for a plain backbone.
    """
    if find_adapter_config_file(name_or_path) is not None:
        return ILVRForConditionalGeneration.from_pretrained(name_or_path, is_trainable=True, **kwargs)
    _refuse_backbone(name_or_path, trust_remote_code, "ILVRForConditionalGeneration")
    return AutoModelForImageTextToText.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **kwargs)


def load_processor(name_or_path: str, *, trust_remote_code: bool = False) -> Any:
    """The processor that was saved with an ILVR checkpoint or adapter.

    Raises:
        ValueError: for a plain backbone.
    """
    if find_adapter_config_file(name_or_path) is not None:
        return ILVRProcessor.from_pretrained(name_or_path)
    _refuse_backbone(name_or_path, trust_remote_code, "ILVRProcessor")
    return AutoProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)


def _refuse_backbone(name_or_path: str, trust_remote_code: bool, class_name: str):
    model_type = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code).model_type
    if model_type != "ilvr":
        raise ValueError(
            f"{name_or_path} is a plain {model_type} backbone, not an ILVR checkpoint. Start from it with "
            f'`{class_name}.from_backbone("{name_or_path}", latent_size=K)`, and give the trainer what that returns.'
        )
