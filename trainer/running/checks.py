"""What model, processor and arguments must agree on, before anything is prepared."""

from typing import Any

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# As `torch.cpu.get_capabilities` calls them: of x86, and of ARM.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def check_agreement(model: Any, processor: Any) -> None:
    """Model and processor must have the same latent size and ids, and the chat template must render them.

    Raises:
        ValueError: if they do not.
    """
    config = model.config
    if config.latent_size != processor.latent_size:
        raise ValueError(
            f"The model's latent_size is {config.latent_size}, the processor's {processor.latent_size}. Build both "
            "with the same latent_size."
        )
    ids = config.latent_token_ids
    if ids != processor.latent_token_ids:
        raise ValueError(
            f"The model's latent ids are {ids}, the processor's {processor.latent_token_ids}. Use the processor that "
            "was saved with the model."
        )
    processor.check_chat_template()


def _has_linear_attention(model: Any) -> bool:
    return "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())


def check_rows_of_any_length(model: Any) -> None:
    """Reinforcement learning pads rows on both sides, which changes the state of linear attention.

    Raises:
        ValueError: for a backbone with linear attention.
    """
    if _has_linear_attention(model):
        raise ValueError(
            "Rollouts are scored in batches with padding on both sides, which changes the state of linear attention. "
            "Choose a backbone without it."
        )


def check_batch_size(model: Any, args: Any, eval_dataset: Any) -> None:
    """A backbone with linear attention takes one row at a time."""
    batch_size = max(args.per_device_train_batch_size, args.per_device_eval_batch_size if eval_dataset else 1)
    if _has_linear_attention(model) and batch_size > 1:
        raise ValueError(
            f"A batch of {batch_size} aligns the spans of its rows by padding between words, which changes the state "
            "of linear attention. Set per_device_train_batch_size and per_device_eval_batch_size to 1 and accumulate."
        )


def warn_of_slow_bf16(model: Any, args: Any) -> None:
    """A CPU without instructions for bf16 takes some sixty times as long with it as with fp32."""
    if args.device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch 2.8 cannot tell for ARM
        return
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in BF16_INSTRUCTIONS):
        return
    remedies = ["bf16=False in the config"] if args.bf16 else []
    remedies += ["dtype=torch.float32 where the model is loaded"] if model.dtype == torch.bfloat16 else []
    if remedies:
        logger.warning_once(
            "This CPU has no instructions for bf16, and takes some sixty times as long with it as with fp32. Set "
            f"{' and '.join(remedies)}."
        )
