"""What the latents of a `generate` of one's own resemble, as a figure.

B batch, S spans, K latents a span, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.image_utils import load_image

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data.conversations import last_boxed

from .generation import encode_prompts
from .pictures import LatentFigure, Panel, latent_figure, patch_similarity, shorten


SOURCES = ("image", "path", "url", "base64")  # where a part of a message may have its image, as for the chat template


def show_latents(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    messages: list[Any],
    output: Any,
    *,
    pictures: Sequence[Any] | None = None,
    max_spans: int = 6,
) -> LatentFigure:
    """Draws what each generated span of latents resembles.

    A line for each image of each conversation: the image under the answer, then a panel for each span. It says what
    the latents resemble, not that the answer depends on them: for that, replace them. And a latent that stands for
    something that has moved resembles it where it was in the question's image; to see where it is meant to be now,
    pass pictures of that.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        messages (`list`): the conversation, or the list of conversations, that `apply_chat_template` was given.
        output (`GenerateOutput`): of `generate` with `return_dict_in_generate=True` and `output_latents=True`, on what
            `apply_chat_template` made of `messages`; a row for each conversation.
        pictures (`list`, *optional*): for each conversation a caption and a picture for each span, to be drawn over
            in place of the images that were asked about, such as [`~ilvr.tasks.Task.draw`] gives; of one
            conversation, its own.
        max_spans (`int`, *optional*, defaults to 6): spans drawn of each answer.

    Returns:
        `matplotlib.figure.Figure`: a notebook shows it; `figure.savefig("latents.png")` writes it.

    Raises:
        ValueError: if the output has no latents, or is not of these conversations, or one of them shows no image.

    Example:

    ```python
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=128, return_dict_in_generate=True, output_latents=True)
    show_latents(model, processor, messages, output)
    ```
    """
    single = not isinstance(messages[0], list)
    conversations = [messages] if single else messages
    meant = [[]] * len(conversations) if pictures is None else [pictures] if single else pictures
    latents = getattr(output, "latents", None)
    if latents is None:
        raise ValueError(
            "The output has no latents. Call generate with return_dict_in_generate=True and output_latents=True."
        )
    if not len(latents) == len(conversations) == len(meant):
        raise ValueError(
            f"There are {len(conversations)} conversations, {len(latents)} rows in the output and {len(meant)} lists "
            "of pictures. Pass one of each."
        )
    lines = []
    rows = zip(conversations, answers_in(processor, conversations, output), latents, meant)
    for number, (turns, text, spans, own) in enumerate(rows):
        images = images_of(turns)
        if not images:
            raise ValueError(f"Conversation {number} shows no image, which latents could resemble. Leave it out.")
        box = last_boxed(text)
        titles = [shorten((text if box is None else box).strip() or "no words")]
        titles += [f"image {place + 2}" for place in range(len(images) - 1)]
        spans = spans[:max_spans]
        for title, image in list(zip(titles, images))[: 1 if own else None]:
            under = [*own[: len(spans)]]
            under += [(f"span {i + 1}", image) for i in range(len(under), len(spans))]
            line = [Panel(title, image)]
            for (caption, picture), span in zip(under, spans):
                line.append(Panel(caption, picture, patch_similarity(model, processor, picture, span)))
            lines.append(line)
    return latent_figure(lines)


def images_of(conversation: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """The images that the turns before an answer show, as the processor sees them."""
    parts = [
        part
        for message in conversation
        if message["role"] != "assistant" and not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    return [load_image(next(part[source] for source in SOURCES if part.get(source) is not None)) for part in parts]


def answers_in(processor: ILVRProcessor, conversations: list[Any], output: Any) -> list[str]:
    """The generated words of each row, which begins with the prompt made of its conversation."""
    prompts = encode_prompts(processor, conversations)["input_ids"]  # (B, T)
    starts = output.sequences[:, : prompts.shape[1]].to(prompts.device)
    if not torch.equal(starts, prompts):
        raise ValueError(
            "The output does not begin with these conversations. Pass those that `generate` was asked, as "
            "`apply_chat_template(…, add_generation_prompt=True)` took them."
        )
    return processor.batch_decode(output.sequences[:, prompts.shape[1] :], skip_special_tokens=True)
