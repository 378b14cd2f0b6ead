"""From conversations to token ids, before training starts: every sample is checked, every error names its sample."""

import torch
from datasets import Features, Image, IterableDataset, List, Value
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from transformers.utils import logging

from ilvr.data.images import open_image


logger = logging.get_logger(__name__)

USER_IMAGES, HELPER_IMAGES = "user_images", "helper_images"  # columns of a prepared data set
PREPARED_COLUMNS = ("input_ids", "assistant_mask", "length", "num_spans", USER_IMAGES, HELPER_IMAGES)
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def prepare_dataset(dataset, processor, *, stage, max_length=None, name="train", keep_pixels=None, num_proc=None):
    """Tokenizes conversations and checks them.

    Args:
        dataset (`Dataset` or `IterableDataset`): with `messages` (or `prompt` and `completion`) and `images`.
        processor ([`ILVRProcessor`]).
        stage (`int`): 1 needs helper images; samples without any train as text.
        max_length (`int`, *optional*): longest sequence kept, in tokens. Longer samples are dropped, counted and
            listed in a warning: a sequence is never cut, for the cut could fall into a latent span or an image.
        name (`str`, *optional*, defaults to `"train"`): of the data set, for messages.
        keep_pixels (`torch.dtype`, *optional*): whether, and in what precision, processed images are kept.
        num_proc (`int`, *optional*): processes to use.

    Returns:
        The data set with `input_ids`, `assistant_mask`, `length`, `num_spans`, `user_images` and `helper_images`: the
        images as they were or, with `keep_pixels`, the tensors that the processor makes of them, serialised.

    Raises:
        ValueError: names the first bad sample, what is wrong with it and how to mend it.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if "input_ids" in columns:
        return dataset
    if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"The {name} data set needs a column `messages` (or `prompt` and `completion`), it has {columns}."
        )
    if "images" in columns:
        # Not decoded by `datasets`, whose error for a broken file does not say which sample it is in.
        dataset = dataset.cast_column("images", List(Image(decode=False)))
    arguments = {
        "processor": processor,
        "stage": stage,
        "name": name,
        "keep_pixels": keep_pixels,
    }
    image_column = Value("binary") if keep_pixels is not None else List(Image(decode=False))
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "assistant_mask": List(Value("bool")),
            "length": Value("int32"),
            "num_spans": Value("int32"),
            USER_IMAGES: image_column,
            HELPER_IMAGES: image_column,
        }
    )
    shared = {"with_indices": True, "fn_kwargs": arguments, "remove_columns": columns, "features": features}
    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(prepare_sample, **shared)
        limits = {"max_length": max_length, "name": name}
        return dataset if max_length is None else dataset.filter(_is_kept, with_indices=True, fn_kwargs=limits)
    dataset = dataset.map(prepare_sample, **shared, num_proc=num_proc, desc=f"Preparing {name} data")
    if stage == 1 and not any(dataset["num_spans"]):
        raise ValueError(
            f"No sample of the {name} data has an image in an assistant turn, so stage 1 has nothing to align latents "
            "with. Add helper images, or train in stage 2."
        )
    return dataset if max_length is None else _drop_long(dataset, max_length, name)


def _is_kept(sample: dict, index: int, *, max_length: int, name: str) -> bool:
    kept = sample["length"] <= max_length
    if not kept:
        logger.warning(f"Sample {index} of the {name} data is dropped: {sample['length']} tokens, {max_length=}.")
    return kept


def _drop_long(dataset, max_length: int, name: str):
    lengths = list(dataset["length"])
    kept = [i for i, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise ValueError(
            f"All {len(lengths)} samples of the {name} data are longer than {max_length=}: they have "
            f"{min(lengths)} to {max(lengths)} tokens. Raise max_length or shrink the images."
        )
    dropped = [f"{i} ({length} tokens)" for i, length in enumerate(lengths) if length > max_length]
    if dropped:
        logger.warning(
            f"{len(dropped)} of {len(lengths)} samples of the {name} data are longer than {max_length=} and are "
            f"dropped: {', '.join(dropped)}."
        )
    return dataset.select(kept)


def prepare_sample(sample: dict, index: int, *, processor, stage, name, keep_pixels=None) -> dict:
    """Checks and tokenizes one conversation, see [`prepare_dataset`]."""
    where = f"Sample {index} of the {name} data"
    messages = sample["messages"] if "messages" in sample else [*sample["prompt"], *sample["completion"]]
    user_order, helper_order = assign_images(messages, len(sample.get("images") or []), where)
    used = user_order + (helper_order if stage == 1 else [])  # stage 2 does not look at helper images
    images = {i: open_image(sample["images"][i], f"{where}, image {i}") for i in used}
    try:
        encoded = processor.apply_chat_template(
            fill_in(messages, [images[i] for i in user_order]),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    input_ids, assistant_mask = encoded.pop("input_ids")[0], encoded.pop("assistant_masks")[0]
    if not assistant_mask.any():
        raise ValueError(f"{where} has no words of the assistant to learn from.")
    prepared = {
        "input_ids": input_ids.tolist(),
        "assistant_mask": assistant_mask.bool().tolist(),
        "length": len(input_ids),
        "num_spans": int((input_ids == processor.latent_token_ids[0]).sum()),
    }
    helper_order = helper_order if stage == 1 else []
    if keep_pixels is None:
        prepared[USER_IMAGES] = [sample["images"][i] for i in user_order]
        prepared[HELPER_IMAGES] = [sample["images"][i] for i in helper_order]
    else:
        user = encode_images([images[i] for i in user_order], processor)
        helper = encode_helper_images([images[i] for i in helper_order], processor)
        prepared[USER_IMAGES], prepared[HELPER_IMAGES] = pack(user, keep_pixels), pack(helper, keep_pixels)
    return prepared


def assign_images(messages: list[dict], num_images: int, where: str) -> tuple[list[int], list[int]]:
    """Which images, by their number, belong to user turns, and which to assistant turns (helper images)."""
    parts = [(m["role"], p["type"]) for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    roles = [role for role, kind in parts if kind == "image"]
    if len(roles) != num_images:
        raise ValueError(
            f"{where} has {len(roles)} image parts in its messages but {num_images} images. Each image needs one part "
            "{'type': 'image'}, in the same order."
        )
    is_helper = [role == "assistant" for role in roles]
    return [i for i, helper in enumerate(is_helper) if not helper], [i for i, helper in enumerate(is_helper) if helper]


def fill_in(messages: list[dict], user_images: list) -> list[dict]:
    """The messages with the images of the user's turns in their parts; the assistant's become latent spans."""
    remaining = iter(user_images)
    filled = []
    for message in messages:
        content = message["content"]
        if message["role"] != "assistant" and not isinstance(content, str):
            content = [{**part, "image": next(remaining)} if part["type"] == "image" else part for part in content]
        filled.append({**message, "content": content})
    return filled


def encode_images(images: list, processor) -> dict[str, torch.Tensor]:
    """The backbone's image tensors for the images of one conversation, empty for none.

    With `image_lengths` (1,), the number of tokens that they have together.
    """
    if not images:
        return {}
    encoded = processor(images=images, text=[processor.image_token * len(images)], return_tensors="pt")
    placeholders = encoded["input_ids"] == processor.placeholder_id
    pixels = {k: torch.as_tensor(v) for k, v in encoded.items() if k not in TEXT_INPUTS}
    return {**pixels, "image_lengths": placeholders.sum().view(1)}


def encode_helper_images(images: list, processor) -> dict[str, torch.Tensor]:
    """As [`encode_images`], of each image by itself, with `image_lengths` (images,)."""
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
        padding = [[n for size, to in zip(t.shape[:0:-1], shape[::-1]) for n in (0, to - size)] for t in tensors]
        merged[name] = torch.cat([torch.nn.functional.pad(t, p) for t, p in zip(tensors, padding)])
    return merged


def pack(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    """Serialises tensors for a column of a data set; floating-point ones in `dtype`."""
    cast = {k: (t.to(dtype) if t.is_floating_point() else t).contiguous() for k, t in tensors.items()}
    return save_tensors(cast) if cast else b""


def unpack(data: bytes) -> dict[str, torch.Tensor]:
    return load_tensors(data) if data else {}
