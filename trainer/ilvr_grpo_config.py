"""Arguments of `ILVRGRPOTrainer`."""

import warnings
from dataclasses import dataclass, field

from trl import GRPOConfig


POLICIES = ("recompute", "replay", "gaussian")


@dataclass
class ILVRGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`ILVRGRPOTrainer`]. All arguments of [`~trl.GRPOConfig`] apply; those named here are added.

    Args:
        latent_policy (`str`, *optional*, defaults to `"recompute"`):
            What the latents of a rollout are to the models that score it. `"recompute"`: a function of the ids, which
            each model computes anew, with exact gradients. `"replay"`: constants, put in as they were. `"gaussian"`:
            actions. Rollouts add normal noise to each latent; it is put in as it was, and its log-density under each
            model's own prediction takes the place of the log-probability of its `<|latent_pad|>` in the ratio (after
            VLPO, Monet, arXiv 2511.21395, whose released rollouts add no noise: the density is then at its peak, and
            the latents have no gradient at the first update). The KL divergence is that of the words.
        latent_sigma (`float`, *optional*, defaults to `None`):
            Standard deviation of that noise in each of the D coordinates; for `"gaussian"`, which needs it. The noise
            of a latent is then about `latent_sigma * sqrt(D)` long. Monet's 10.0 is of a density without noise.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Whether the vision tower and merger are frozen.

    Raises:
        ValueError: for settings of rollouts that cannot have latents.
    """

    latent_policy: str = field(
        default="recompute",
        metadata={"help": "What the latents of a rollout are to the models that score it.", "choices": [*POLICIES]},
    )
    latent_sigma: float | None = field(
        default=None, metadata={"help": "Standard deviation of the noise on latents in rollouts, for 'gaussian'."}
    )

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
        if self.latent_policy not in POLICIES:
            raise ValueError(f"`latent_policy` must be one of {POLICIES}, got {self.latent_policy!r}.")
        if self.samples_latents != (self.latent_sigma is not None) or (self.latent_sigma or 1) <= 0:
            raise ValueError(
                "`latent_sigma`, above 0, belongs to latent_policy='gaussian' and to no other, got "
                f"{self.latent_sigma} with {self.latent_policy!r}."
            )
        if self.samples_latents and (self.top_entropy_quantile < 1 or self.entropy_coef or self.use_adaptive_entropy):
            raise ValueError(
                "With latent_policy='gaussian' latents are among the actions, and their entropy is a constant beside "
                "that of words. Leave top_entropy_quantile, entropy_coef and use_adaptive_entropy at their defaults."
            )

    @property
    def samples_latents(self) -> bool:
        """Whether latents are actions, drawn in rollouts, and not a function of the ids."""
        return self.latent_policy == "gaussian"
