"""What a model is asked, and is not told: the turns of a sample before the first answer."""

from .conversations import image_roles
from .images import open_image


def prompt_of(sample: dict) -> list[dict]:
    """The turns before the first assistant turn, as a conversation for the processor.

    Args:
        sample (`dict`): with `messages` and `images`, which may be decoded or as `datasets` stores them.

    Returns:
        `list[dict]`: turns with their image parts filled in, upright and RGB.
    """
    roles = [message["role"] for message in sample["messages"]]
    turns = sample["messages"][: roles.index("assistant") if "assistant" in roles else None]
    asked = (sample.get("images") or [])[: len(image_roles(turns))]
    images = iter([open_image(image, f"Image {i} of the prompt") for i, image in enumerate(asked)])
    prompt = []
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            content = [{"type": "image", "image": next(images)} if p["type"] == "image" else p for p in content]
        prompt.append({"role": turn["role"], "content": content})
    return prompt
