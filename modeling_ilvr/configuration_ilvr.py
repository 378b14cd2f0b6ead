"""Configuration of an ILVR model: the config of its vision-language backbone plus what a latent span needs."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


LATENT_START_TOKEN = "<|latent_start|>"
LATENT_PAD_TOKEN = "<|latent_pad|>"
LATENT_END_TOKEN = "<|latent_end|>"
LATENT_TOKENS = (LATENT_START_TOKEN, LATENT_PAD_TOKEN, LATENT_END_TOKEN)
LATENT_HEADS = ("identity", "rescale", "linear", "mlp")
MAX_LATENT_SIZE = 4096  # a span is written out token by token: more is a damaged config


class ILVRConfig(PreTrainedConfig):
    r"""
    Configuration of [`ILVRForConditionalGeneration`] (Interleaved Latent Visual Reasoning, arXiv 2512.05665).

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*, defaults to that of Qwen2.5-VL):
            Config of the image-text-to-text backbone.
        latent_size (`int`, *optional*, defaults to 8):
            K, the number of latents in a span (paper, section 4).
        latent_head (`str`, *optional*, defaults to `"identity"`):
            Map from the last hidden state to the next latent: `"identity"` (the paper), `"rescale"` (to the norm
            `latent_norm`; ours), `"linear"` or `"mlp"`. New models, of `from_backbone`, have `"rescale"`, for which a
            norm has to be measured; a config that names no head means the one that needs nothing.
        latent_norm (`float`, *optional*, defaults to 1.0):
            L2 norm of each latent under `"rescale"`. Stage 1 sets it to the mean norm of its targets, so that what the
            model feeds back is of the size of what it was trained on.
        latent_start_token_id, latent_pad_token_id, latent_end_token_id (`int`, *optional*):
            Ids of `<|latent_start|>`, `<|latent_pad|>` and `<|latent_end|>`.

    Raises:
        ValueError: if `latent_size` is no number from 1 to 4096, `latent_head` is unknown, `latent_norm` is not above
            0, or the three ids are not different numbers.
    """

    model_type = "ilvr"
    sub_configs_defaults = {"vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_5_vl")}

    vlm_config: dict | PreTrainedConfig | None = None
    latent_size: int = 8
    latent_head: str = "identity"
    latent_norm: float = 1.0
    latent_start_token_id: int | None = None
    latent_pad_token_id: int | None = None
    latent_end_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if type(self.latent_size) is not int or not 1 <= self.latent_size <= MAX_LATENT_SIZE:
            raise ValueError(
                f"`latent_size` must be a whole number from 1 to {MAX_LATENT_SIZE}, got {self.latent_size}."
            )
        if self.latent_head not in LATENT_HEADS:
            raise ValueError(f"`latent_head` must be one of {LATENT_HEADS}, got {self.latent_head!r}.")
        if not 0 < self.latent_norm < float("inf"):
            raise ValueError(f"`latent_norm` must be a number above 0, got {self.latent_norm}.")
        ids = (self.latent_start_token_id, self.latent_pad_token_id, self.latent_end_token_id)
        are_ids = all(type(i) is int and i >= 0 for i in ids) and len(set(ids)) == 3
        if ids != (None, None, None) and not are_ids:
            raise ValueError(f"The ids of start, pad and end of a span must be three different numbers, got {ids}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        if not isinstance(config_dict.get("vlm_config"), dict) or not config_dict["vlm_config"].get("model_type"):
            # The default would be a model of eight billion parameters.
            raise ValueError("The config has no `vlm_config` with a `model_type`, which says what backbone it has.")
        return super().from_dict(config_dict, **kwargs)

    @property
    def latent_token_ids(self) -> tuple[int, int, int]:
        """Ids of `<|latent_start|>`, `<|latent_pad|>` and `<|latent_end|>`.

        Raises:
            ValueError: if the config has none.
        """
        start, pad, end = self.latent_start_token_id, self.latent_pad_token_id, self.latent_end_token_id
        if start is None or pad is None or end is None:
            raise ValueError("The config has no ids of the latent tokens. Start from a backbone with `from_backbone`.")
        return start, pad, end

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.vlm_config.get_text_config(*args, **kwargs)

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.get_text_config()

    @property
    def image_token_id(self) -> int | None:
        return getattr(self.vlm_config, "image_token_id", None)

    @property
    def video_token_id(self) -> int | None:
        return getattr(self.vlm_config, "video_token_id", None)
