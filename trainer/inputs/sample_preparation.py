"""From one conversation to token ids: it is checked, and an error names the sample, the field and the remedy."""

from typing import Any

from ilvr.data.conversations import ROLES, SampleError, image_roles
from ilvr.data.images import image_size
from ilvr.data.token_counts import SizeTokenizer, check_spans

from .columns import HELPER_IMAGES, USER_IMAGES


def prepare_sample(sample: dict, index: int, *, tokenizer: SizeTokenizer, name: str) -> dict[str, Any]:
    """Checks and tokenizes one conversation.

    Args:
        sample (`dict`): a row, its images not decoded.
        index (`int`), name (`str`): name the sample in errors.
        tokenizer ([`~ilvr.data.token_counts.SizeTokenizer`]).

    Returns:
        `dict` with the columns of [`~ilvr.trainer.inputs.columns.FEATURES`].

    Raises:
        ValueError: names the sample, the field and the remedy.
    """
    where = f"Sample {index} of the {name} data"
    try:
        messages = checked_messages(sample)
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    images = sample.get("images") or []
    user_images, helper_images = assign_images(messages, len(images), where)
    sizes = [image_size(image, f"{where}, image {i}") for i, image in enumerate(images)]
    try:
        input_ids, assistant_mask = tokenizer(messages, sizes)
        check_spans(messages, input_ids, tokenizer.whole)
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    if not any(assistant_mask):
        raise ValueError(f"{where} has no words of the assistant to learn from.")
    return {
        "input_ids": input_ids,
        "assistant_mask": assistant_mask,
        "length": len(input_ids),
        "num_spans": len(helper_images),
        USER_IMAGES: user_images,
        HELPER_IMAGES: helper_images,
    }


def checked_messages(sample: dict) -> list[dict]:
    """The turns of a sample; a prompt or completion that is a plain text is one turn.

    Raises:
        SampleError: if roles, contents or parts are others than TRL's vision conversations have.
    """
    if sample.get("messages") is None and "prompt" in sample:
        turns = zip(("user", "assistant"), ("prompt", "completion"))
        given = [(role, sample[column]) for role, column in turns]
        messages = [
            message
            for role, turn in given
            for message in ([{"role": role, "content": turn}] if isinstance(turn, str) else turn or [])
        ]
    else:
        messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise SampleError("messages", f"must be a list of turns, got {messages!r:.80}. Leave the sample out.")
    for i, message in enumerate(messages):
        role, content = (message.get(key) for key in ("role", "content"))
        if role not in ROLES:
            raise SampleError(f"messages[{i}].role", f"unknown role {role!r}. Use one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise SampleError(f"messages[{i}].content", f"must be a text or a list of parts, got {content!r:.80}.")
        for j, part in enumerate(content):
            kind, text = part.get("type"), part.get("text")
            if kind not in ("text", "image"):
                raise SampleError(f"messages[{i}].content[{j}]", f"unknown type {kind!r}. Use text or image.")
            if kind == "text" and not isinstance(text, str):
                raise SampleError(f"messages[{i}].content[{j}].text", f"must be a text, got {text!r:.80}.")
    return messages


def assign_images(messages: list[dict], num_images: int, where: str) -> tuple[list[int], list[int]]:
    """Which images, by their number, belong to user turns, and which to assistant turns (helper images)."""
    roles = image_roles(messages)
    if len(roles) != num_images:
        raise ValueError(
            f"{where} has {len(roles)} image parts in its messages but {num_images} images. Each image needs one part "
            "{'type': 'image'}, in the same order."
        )
    is_helper = [role == "assistant" for role in roles]
    return [i for i, helper in enumerate(is_helper) if not helper], [i for i, helper in enumerate(is_helper) if helper]
