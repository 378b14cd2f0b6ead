"""Traces of Monet (Hub: NOVAglow646/Monet-SFT-125K, arXiv 2511.21395): turns with images in their parts.

The layout is the one that Monet's published training code reads: JSON arrays (`train.json`, one a subset) of
`{"data": [{"role": …, "content": [part, …]}, …], "metadata": {"dataset_name": …, "sample_id": …}}` with parts
`{"type": "text", "text": …}` and `{"type": "image", "image": path}`, paths relative to the data set's folder.
"""

import re

from .conversations import ConversationBuilder, Locate, SampleError, as_list, last_boxed, required


FIELDS = frozenset({"data"})
# Where Monet puts its latents, before each helper image, and which words it aligns: marks for its own losses.
_TAGS = re.compile(r"<abs_vis_token></abs_vis_token>|</?observation>")
_SPAN = "<abs_vis_token></abs_vis_token>"


def read_monet(row: dict, locate: Locate) -> dict:
    r"""A row with `data`; Monet's tags are removed from the assistant's texts, the words between them are kept.

    Args:
        row (`dict`): the row. The answer is what the last `\boxed{…}` of the assistant holds.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, `images`, `answer` and `metadata`.

    Raises:
        SampleError: names the bad field; also if there are not as many latent tags as helper images.
    """
    builder, said, num_spans, num_helpers = ConversationBuilder(locate), "", 0, 0
    for i, message in enumerate(as_list(required(row, "data"), "data", dict)):
        role = message.get("role")
        builder.add_turn(role, f"data[{i}].role")
        for j, part in enumerate(as_list(message.get("content"), f"data[{i}].content", dict)):
            field, text = f"data[{i}].content[{j}]", part.get("text")
            if part.get("type") == "image":
                num_helpers += role == "assistant"
                builder.add_image(part.get("image"), f"{field}.image")
            elif part.get("type") == "text":
                if role == "assistant" and isinstance(text, str):
                    num_spans += text.count(_SPAN)
                    text = _TAGS.sub("", text)
                    said += text
                builder.add_text(text, f"{field}.text")
            else:
                raise SampleError(field, f"unknown type {part.get('type')!r}. Use text or image.")
    if num_spans != num_helpers:
        raise SampleError("data", f"has {num_spans} times {_SPAN} for {num_helpers} helper images. Make them equal.")
    return builder.finish(row, set(FIELDS), last_boxed(said))
