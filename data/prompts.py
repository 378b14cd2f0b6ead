"""The question of a sample, as a processor takes it."""

from collections.abc import Iterator

from PIL.Image import Image

from .conversations import image_roles
from .images import open_image


def prompt_of(sample: dict) -> list[dict]:
    """The turns before the first assistant turn, with their images in their parts.

    Args:
        sample (`dict`): `messages`, whose contents are texts or lists of parts, and `images` in the order of the image
            parts; these are PIL images, paths or `datasets`' undecoded dicts.

    Returns:
        `list[dict]`: a conversation for `apply_chat_template`; its images are decoded.

    Raises:
        ValueError: if there are fewer images than image parts, or one cannot be read.
    """
    turns = [message["role"] for message in sample["messages"]]
    messages = sample["messages"][: turns.index("assistant") if "assistant" in turns else None]
    images, num_parts = sample.get("images") or [], len(image_roles(messages))
    if len(images) < num_parts:
        raise ValueError(f"The prompt has {num_parts} image parts for {len(images)} images. Add the missing images.")
    opened = iter([open_image(image, f"Image {i}") for i, image in enumerate(images[:num_parts])])
    return [{"role": message["role"], "content": _fill(message["content"], opened)} for message in messages]


def _fill(content: str | list[dict], images: Iterator[Image]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "image", "image": next(images)} if part["type"] == "image" else {"type": "text", "text": part["text"]}
        for part in content
    ]
