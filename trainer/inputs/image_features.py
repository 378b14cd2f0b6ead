"""Outputs of the vision tower: computed for a batch, or once for a data set while the tower is frozen.

N tokens of all images of a batch, D hidden.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, Value, config
from datasets.fingerprint import Hasher
from transformers.utils import ModelOutput

from ilvr.data.images import open_image

from .columns import (
    FEATURES,
    FOLLOWED_PATCHES,
    HELPER_ANSWERS,
    HELPER_IMAGES,
    HELPER_PROMPTS,
    LEVEL,
    TELLS_ANSWER,
    USER_IMAGES,
    processor_key,
)
from .image_tensors import encode_helper_images, encode_images, merge_images, pack


CACHED, DEEPSTACK = "image_features", "image_deepstack_{}"


@dataclass
class ImageFeatures(ModelOutput):
    """What the text decoder reads of the vision tower's output.

    Args:
        pooler_output (`list[torch.Tensor]`): features (N, D) after the merger.
        deepstack_features (`list[list[torch.Tensor]]`, *optional*): features (N, D) for each of the first decoder
            layers (Qwen3-VL).
    """

    pooler_output: list[torch.Tensor] | None = None
    deepstack_features: list[list[torch.Tensor]] | None = None


def image_outputs(inputs: dict[str, torch.Tensor], core: Any) -> Any:
    """The vision tower's output for the images among `inputs`, computed or from the cache; `None` without images.

    Args:
        inputs (`dict`): image tensors of a batch, see [`LatentDataCollator`].
        core (`PreTrainedModel`): the backbone without its head.
    """
    if CACHED in inputs:
        layers = takewhile(inputs.__contains__, map(DEEPSTACK.format, count()))
        # Qwen3-VL reads a list also where it has no such layers.
        return ImageFeatures([inputs[CACHED]], [[inputs[name]] for name in layers])
    if "pixel_values" not in inputs:
        return None
    accepted = inspect.signature(core.get_image_features).parameters
    return core.get_image_features(**{k: v for k, v in inputs.items() if k in accepted}, return_dict=True)


def flatten_features(features: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """(N, D) of the features of several images, however a backbone keeps them."""
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in features])


def without_pixels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a batch is still needed where image features are given."""
    return {k: v for k, v in inputs.items() if not k.startswith(("pixel", "image_features", "image_deepstack"))}


def cache_images(
    dataset: Any,
    processor: Any,
    *,
    encode_batch: Callable[[dict[str, torch.Tensor]], Any] | None,
    dtype: torch.dtype,
    helper_images: bool,
    key: str,
) -> Dataset:
    """A prepared data set with what is needed of its images in their place: made once, a few samples at a time.

    It is written to the cache of `datasets` as it is made, and found there by later runs over the same data with the
    same vision tower and processor.

    Args:
        dataset (`Dataset`): of [`prepare_dataset`].
        processor ([`ILVRProcessor`]).
        encode_batch (`Callable`, *optional*): image tensors of a batch to the output of [`image_outputs`], whose
            features are kept. Without it the processed pixels are kept.
        dtype (`torch.dtype`): of what is kept.
        helper_images (`bool`): whether helper images are needed.
        key (`str`): names what `encode_batch` computes, such as [`weights_key`] of the vision tower.

    Raises:
        ValueError: for a streaming data set, and for a backbone whose features are of another form.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("`cache_images` needs the length of the data set; set it to False for a streaming one.")
    if isinstance(dataset.features[USER_IMAGES], Value):
        return dataset  # cached already

    def encode(rows: dict[str, list]) -> dict[str, list[bytes]]:
        images = rows.get("images") or [[]] * len(rows[USER_IMAGES])
        encoded = {}
        for column, by_row in ((USER_IMAGES, encode_images), (HELPER_IMAGES, encode_helper_images)):
            wanted = rows[column] if column == USER_IMAGES or helper_images else [[]] * len(images)
            opened = ((open_image(own[i], "An image") for i in chosen) for own, chosen in zip(images, wanted))
            tensors = [by_row(row, processor) for row in opened]
            encoded[column] = [pack(row, dtype) for row in _features(tensors, encode_batch)]
        return encoded

    kept = (*FEATURES, HELPER_PROMPTS, HELPER_ANSWERS, FOLLOWED_PATCHES, TELLS_ANSWER, LEVEL)
    kept = [name for name in kept if name not in (USER_IMAGES, HELPER_IMAGES)]
    kept = [name for name in kept if name in dataset.column_names]
    binary = {USER_IMAGES: Value("binary"), HELPER_IMAGES: Value("binary")}
    settings = [dataset._fingerprint, key, str(dtype), helper_images, encode_batch is None, processor_key(processor)]
    fingerprint = Hasher.hash(settings)  # hashing the function would pickle the model
    folder = Path(config.HF_DATASETS_CACHE) / "ilvr_images"
    folder.mkdir(parents=True, exist_ok=True)
    return dataset.map(
        encode,
        batched=True,
        batch_size=32,
        writer_batch_size=32,
        remove_columns=[name for name in dataset.column_names if name not in kept],
        features=Features({**{name: dataset.features[name] for name in kept}, **binary}),
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),  # for data in memory, too
        desc="Encoding images",
    )


def weights_key(modules: list[torch.nn.Module]) -> str:
    """A digest of the weights of some modules."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, weight in module.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _features(rows: list[dict[str, torch.Tensor]], encode_batch: Callable | None) -> list[dict[str, torch.Tensor]]:
    """The rows' features in place of their pixels; rows without images stay empty."""
    with_images = [tensors for tensors in rows if tensors]
    if encode_batch is None or not with_images:
        return rows
    outputs = encode_batch(merge_images(with_images))
    if not isinstance(outputs.pooler_output, list | tuple):
        raise ValueError("`cache_images` keeps lists of features only, not this backbone's. Set it to False.")
    layers = {CACHED: outputs.pooler_output}
    for i, features in enumerate(getattr(outputs, "deepstack_features", None) or ()):
        layers[DEEPSTACK.format(i)] = [features] if isinstance(features, torch.Tensor) else features
    lengths = [int(tensors["image_lengths"].sum()) for tensors in with_images]
    # One iterator a layer, over the rows that have images.
    split = {name: iter(flatten_features(features).cpu().split(lengths)) for name, features in layers.items()}
    return [
        {**without_pixels(tensors), **{name: next(own) for name, own in split.items()}} if tensors else {}
        for tensors in rows
    ]
