"""Token ids of a conversation from the sizes of its images alone: no pixel is touched."""

import copy
from types import MethodType
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from .conversations import SampleError, image_roles


logger = logging.get_logger(__name__)

Size = tuple[int, int]  # width and height in pixels
PROBE_SIZES: tuple[Size, ...] = ((32, 32), (96, 64), (64, 160), (333, 200))


class SizeTokenizer:
    """
    Tokenizes conversations as the processor does, given the sizes of their images in place of the images.

    A backbone's processor first lays its images out (grids of patches, rows and columns of tiles) and then writes as
    many placeholders into the text; the layout depends on an image's size only. Here the layout comes from the
    processor's own arithmetic for sizes. Whether it agrees is checked once, on a few blank images; where it does not,
    or a processor has no such arithmetic, blank images of the right size are processed, which is exact and slow.

    Args:
        processor ([`~ilvr.ILVRProcessor`]).
    """

    def __init__(self, processor: Any) -> None:
        self.whole = processor
        self.processor = copy.copy(processor)
        self.processor._backbone = copy.copy(processor._backbone)
        self.processor._backbone._process_images = MethodType(_lay_out_images, self.processor._backbone)
        self.by_size = self._agrees()
        if not self.by_size:
            logger.warning(
                f"The sizes of images do not tell the tokens of {type(processor._backbone).__name__}: blank images "
                "are processed to count them, which takes as long as processing the images."
            )

    def __call__(
        self, messages: list[dict[str, Any]], image_sizes: list[Size], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Tokenizes a conversation.

        Args:
            messages (`list[dict]`): turns with content parts.
            image_sizes (`list[tuple[int, int]]`): (width, height) of all its images, in order.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): whether an answer is to follow.

        Returns:
            `tuple`: the token ids, and for each whether it is the assistant's.

        Raises:
            SampleError: if an image has a shape that the processor does not take, or a text holds a placeholder.
        """
        sizes = iter(enumerate(image_sizes))
        filled: list[dict[str, Any]] = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                parts: list[dict[str, Any]] = []
                for part in content:
                    if part["type"] == "image":
                        number, size = next(sizes)
                        self._measure(size, f"images[{number}]")
                        part = {"type": "image"} if message["role"] == "assistant" else self._blank_part(size)
                    parts.append(part)
                content = parts
            filled.append({"role": message["role"], "content": content})
        try:
            encoded = (self.processor if self.by_size else self.whole).apply_chat_template(
                filled,
                tokenize=True,
                add_generation_prompt=add_generation_prompt,
                return_dict=True,
                return_tensors=None,
                return_assistant_tokens_mask=True,
            )
        except ValueError as error:
            raise SampleError("messages", f"{error}") from error
        return list(encoded["input_ids"][0]), [bool(own) for own in encoded["assistant_masks"][0]]

    def _blank_part(self, size: Size) -> dict:
        width, height = size
        blank = np.broadcast_to(np.uint8(0), (height, width, 3)) if self.by_size else Image.new("RGB", size)
        return {"type": "image", "image": blank}

    def _measure(self, size: Size, field: str):
        """Helper images are not in the text, but the processor has to take them, too."""
        try:
            if self.by_size:
                _layout(self.processor._backbone, [size])
            else:
                self.whole.image_processor([Image.new("RGB", size)])
        except ValueError as error:
            raise SampleError(field, f"{error} Change its shape ({size[0]}x{size[1]}) or leave it out.") from error

    def _agrees(self) -> bool:
        text = [self.whole.image_token * 2]
        for size in PROBE_SIZES:
            try:
                blank = [Image.new("RGB", size)] * 2
                found = self.processor(images=[[np.asarray(image) for image in blank]], text=text)["input_ids"]
            except (AttributeError, KeyError, NotImplementedError, TypeError):
                return False
            if list(found[0]) != list(self.whole(images=[blank], text=text)["input_ids"][0]):
                return False
        return True


def count_tokens(messages: list[dict[str, Any]], image_sizes: list[Size], tokenizer: SizeTokenizer) -> int:
    """Length of a sample in tokens, as the trainer counts it.

    Args:
        messages (`list[dict]`): a conversation.
        image_sizes (`list[tuple[int, int]]`): (width, height) of all its images, in order.
        tokenizer ([`SizeTokenizer`]).

    Raises:
        SampleError: see [`SizeTokenizer`]; also if its texts make latent spans that no image does.
    """
    input_ids, _ = tokenizer(messages, image_sizes)
    check_spans(messages, input_ids, tokenizer.whole)
    return len(input_ids)


def check_spans(messages: list[dict[str, Any]], input_ids: list[int], processor: Any) -> None:
    """Each image of an assistant turn must have become a latent span, and nothing else.

    Raises:
        SampleError: if the numbers of start, pad and end tokens are others.
    """
    num_helpers = image_roles(messages).count("assistant")
    found = [input_ids.count(token_id) for token_id in processor.latent_token_ids]
    expected = [num_helpers, num_helpers * processor.latent_size, num_helpers]
    if found != expected:
        raise SampleError(
            "messages",
            f"{num_helpers} helper images make {expected} start, pad and end tokens, but the text has {found}. Remove "
            "latent tokens from the texts, or correct the chat template.",
        )


def _lay_out_images(backbone: Any, images: Any, **kwargs: Any) -> tuple[dict, list[str]]:
    """In place of `ProcessorMixin._process_images`: the same texts, without the pixels."""
    (own,) = images  # of one conversation
    sizes = [(image.shape[1], image.shape[0]) for image in own]
    layout = _layout(backbone, sizes, **kwargs)
    return layout, [backbone.replace_image_token(layout, image_idx=i, **kwargs) for i in range(len(sizes))]


def _layout(backbone: Any, sizes: list[Size], **kwargs: Any) -> dict[str, Any]:
    """What a backbone's image processor says of images of these sizes, under the names of all families."""
    processor = backbone.image_processor
    layout: dict[str, Any] = {
        "image_sizes": [(height, width) for width, height in sizes],  # LLaVA-OneVision
        "batch_num_images": [len(sizes)],
    }
    if hasattr(processor, "get_number_of_image_patches"):
        patches = [processor.get_number_of_image_patches(height, width, kwargs) for width, height in sizes]
        if isinstance(patches[0], tuple):  # Idefics3, SmolVLM
            layout["rows"] = [[rows for _, rows, _ in patches]]
            layout["cols"] = [[columns for *_, columns in patches]]
        else:
            layout["image_grid_thw"] = np.array([[1, 1, number] for number in patches])  # Qwen
            layout["num_patches"] = patches  # InternVL
            layout["pixel_values"] = np.empty((sum(patches), 0))
    else:
        size = processor.size
        height, width = (size.get(side) or size.get("shortest_edge") for side in ("height", "width"))
        layout["pixel_values"] = [np.broadcast_to(np.uint8(0), (1, 3, height, width))]
        if not getattr(processor, "do_pan_and_scan", None):
            layout["num_crops"] = [0] * len(sizes)  # Gemma 3
    return layout
