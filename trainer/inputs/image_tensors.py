"""Image tensors of conversations: made by the backbone's processor, joined to batches, kept as bytes."""

from collections.abc import Iterable

import torch
from PIL import Image as PILImage
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ilvr import ILVRProcessor


TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets")


def encode_images(images: Iterable[PILImage.Image], processor: ILVRProcessor) -> dict[str, torch.Tensor]:
    """The backbone's image tensors for the images of one conversation, empty for none.

    With `image_lengths` (images,), the number of tokens of each.
    """
    images = list(images)
    if not images:
        return {}
    text = [processor.image_token * len(images)]
    encoded = processor(images=[images], text=text, return_tensors="pt", return_text_replacement_offsets=True)
    placeholder = processor.tokenizer.convert_ids_to_tokens(processor.placeholder_id)
    lengths = [offset["replacement"].count(placeholder) for offset in encoded["text_replacement_offsets"][0]]
    pixels = {k: torch.as_tensor(v) for k, v in encoded.items() if k not in TEXT_INPUTS}
    return {**pixels, "image_lengths": torch.tensor(lengths)}


def encode_helper_images(images: Iterable[PILImage.Image], processor: ILVRProcessor) -> dict[str, torch.Tensor]:
    """As [`encode_images`], but each image by itself: next to others a processor may pad it, or cut it otherwise."""
    if "image_grid_thw" in processor.model_input_names:  # patches of all images in a row, each with its own grid
        return encode_images(images, processor)
    return merge_images([encode_images([image], processor) for image in images])


def merge_images(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins the image tensors of several conversations, as a backbone's processor does for a batch.

    Where their further dimensions differ (tiles of an image, pixels of a tile), the smaller are filled up with zeros.
    """
    parts = [part for part in parts if part]
    merged = {}
    for name in parts[0] if parts else ():
        tensors = [part[name] for part in parts]
        shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors))]
        merged[name] = torch.cat([_pad_to(tensor, shape) for tensor in tensors])
    return merged


def _pad_to(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Fills all dimensions but the first up to `shape`, at their ends; `pad` counts them from the last."""
    missing = [to - size for size, to in zip(tensor.shape[1:], shape)]
    return torch.nn.functional.pad(tensor, [n for amount in reversed(missing) for n in (0, amount)])


def pack(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """Serialises tensors for a column of a data set; floating-point ones in `dtype`."""
    cast = {k: (t.to(dtype) if t.is_floating_point() else t).contiguous() for k, t in tensors.items()}
    return save_tensors(cast) if cast else b""


def unpack(data: bytes) -> dict[str, torch.Tensor]:
    """What [`pack`] serialised."""
    return load_tensors(data) if data else {}
