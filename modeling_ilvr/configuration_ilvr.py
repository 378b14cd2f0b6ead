"""Configuration of an ILVR model: the config of its vision-language backbone plus what a latent span needs."""

from transformers import AddedToken, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


LATENT_START_TOKEN = "<|latent_start|>"
LATENT_PAD_TOKEN = "<|latent_pad|>"
LATENT_END_TOKEN = "<|latent_end|>"
LATENT_TOKENS = (LATENT_START_TOKEN, LATENT_PAD_TOKEN, LATENT_END_TOKEN)
LATENT_HEADS = ("identity", "linear", "mlp")


class ILVRConfig(PreTrainedConfig):
    r"""
    Configuration of [`ILVRForConditionalGeneration`] (Interleaved Latent Visual Reasoning, arXiv 2512.05665).

    Args:
        vlm_config (`PreTrainedConfig` or `dict`, *optional*, defaults to that of Qwen2.5-VL):
            Config of the image-text-to-text backbone.
        latent_size (`int`, *optional*, defaults to 8):
            K, the number of latents in a span (paper, section 4).
        latent_head (`str`, *optional*, defaults to `"identity"`):
            Map from the last hidden state to the next latent: `"identity"` (the paper), `"linear"` or `"mlp"`.
        latent_start_token_id, latent_pad_token_id, latent_end_token_id (`int`, *optional*):
            Ids of `<|latent_start|>`, `<|latent_pad|>` and `<|latent_end|>`.

    Raises:
        ValueError: if `latent_size` is not positive or `latent_head` is unknown.
    """

    model_type = "ilvr"
    sub_configs_defaults = {"vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_5_vl")}

    vlm_config: dict | PreTrainedConfig | None = None
    latent_size: int = 8
    latent_head: str = "identity"
    latent_start_token_id: int | None = None
    latent_pad_token_id: int | None = None
    latent_end_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.latent_size < 1:
            raise ValueError(f"`latent_size` must be at least 1, got {self.latent_size}.")
        if self.latent_head not in LATENT_HEADS:
            raise ValueError(f"`latent_head` must be one of {LATENT_HEADS}, got {self.latent_head!r}.")

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
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


def latent_token_ids(vlm_config, tokenizer, latent_size: int | None = None) -> tuple[int, int, int, int]:
    """Ids of the latent tokens for a plain backbone, and its latent size.

    Adds the tokens to `tokenizer` if it lacks them. A config of the paper's reference code, with `latent_token_id`,
    `latent_start_id`, `latent_end_id` and `latent_size`, keeps what it was trained with.

    Returns:
        `tuple`: start id, pad id, end id, latent size (8 if neither the caller nor the config names one).

    Raises:
        ValueError: if `latent_size` disagrees with the checkpoint's, or a checkpoint's ids with its tokenizer's.
    """
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in LATENT_TOKENS], True)
    ids = tokenizer.convert_tokens_to_ids(list(LATENT_TOKENS))
    trained_size = getattr(vlm_config, "latent_size", None)
    if hasattr(vlm_config, "latent_token_id"):
        trained_ids = [vlm_config.latent_start_id, vlm_config.latent_token_id, vlm_config.latent_end_id]
        if trained_ids != ids:
            raise ValueError(
                f"The checkpoint was trained with latent ids {trained_ids}, its tokenizer gives {ids}. Use the "
                "tokenizer that was saved with the checkpoint."
            )
    if trained_size is not None and latent_size not in (None, trained_size):
        raise ValueError(
            f"latent_size={latent_size} disagrees with the checkpoint, which was trained with {trained_size}. Leave "
            "latent_size out to use the checkpoint's."
        )
    return *ids, latent_size or trained_size or 8
