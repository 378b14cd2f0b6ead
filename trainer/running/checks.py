"""What model, processor and arguments must agree on, before anything is prepared."""

from typing import Any


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


def check_batch_size(model: Any, args: Any, eval_dataset: Any) -> None:
    """A backbone with linear attention takes one row at a time."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    batch_size = max(args.per_device_train_batch_size, args.per_device_eval_batch_size if eval_dataset else 1)
    if "linear_attention" in layer_types and batch_size > 1:
        raise ValueError(
            f"A batch of {batch_size} aligns the spans of its rows by padding between words, which changes the state "
            "of linear attention. Set per_device_train_batch_size and per_device_eval_batch_size to 1 and accumulate."
        )
