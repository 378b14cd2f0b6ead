"""Arguments of `ILVRGRPOTrainer`."""

import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig


@dataclass
class ILVRGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`ILVRGRPOTrainer`]. All arguments of [`~trl.GRPOConfig`] apply; those named here are added.

    Args:
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether the vision tower and merger are frozen.

    Raises:
        ValueError: for settings of rollouts that cannot have latents.
    """

    freeze_vision_tower: bool = field(
        default=True, metadata={"help": "Whether the vision tower and merger are frozen."}
    )

    def __post_init__(self):
        with warnings.catch_warnings():
            # TRL sets `gradient_checkpointing`, transformers has renamed it: nothing a user can act on.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated")
            super().__post_init__()
        refused = {
            "use_vllm": "vLLM feeds no latents back",
            "use_transformers_continuous_batching": "continuous batching feeds no latents back",
            "use_liger_kernel": "Liger knows the layers of no ILVR model",
            "cast_lm_head_to_fp32": "the head of an ILVR model is its backbone's, which TRL does not find",
        }
        for name, reason in refused.items():
            if getattr(self, name):
                raise ValueError(f"{name}=True does not work with latents: {reason}. Set it to False.")
