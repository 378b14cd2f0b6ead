"""Outputs of the vision tower: computed for a batch, or once for a data set while the tower is frozen.

N tokens of all images of a batch, D hidden.
"""

import inspect
from dataclasses import dataclass

import torch
from datasets import IterableDataset
from datasets.fingerprint import Hasher
from transformers.utils import ModelOutput

from .data_preparation import HELPER_IMAGES, USER_IMAGES, pack, unpack


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


def image_outputs(inputs: dict, core):
    """The vision tower's output for the images among `inputs`, computed or from the cache; `None` without images.

    Args:
        inputs (`dict`): image tensors of a batch, see [`LatentDataCollator`].
        core (`PreTrainedModel`): the backbone without its head.
    """
    if CACHED in inputs:
        deepstack = [[inputs[name]] for name in map(DEEPSTACK.format, range(len(inputs))) if name in inputs]
        return ImageFeatures([inputs[CACHED]], deepstack or None)
    if "pixel_values" not in inputs:
        return None
    accepted = inspect.signature(core.get_image_features).parameters
    return core.get_image_features(**{k: v for k, v in inputs.items() if k in accepted}, return_dict=True)


def flatten_features(features) -> torch.Tensor:
    """(N, D) of the features of several images, however a backbone keeps them."""
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in features])


def without_pixels(inputs: dict) -> dict:
    """What of a batch is still needed where image features are given."""
    return {k: v for k, v in inputs.items() if not k.startswith(("pixel", "image_features", "image_deepstack"))}


def cache_features(dataset, encode_batch, key: str):
    """Replaces the pixels of a prepared data set by the output of the frozen vision tower.

    Args:
        dataset (`Dataset`): prepared with `keep_pixels`.
        encode_batch (`Callable`): image tensors (`dict`) to the output of [`image_outputs`].
        key (`str`): names the model in the fingerprint of the result.

    Raises:
        ValueError: for a streaming data set, and for a backbone whose output is kept in another way.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError("`cache_images` needs the length of the data set; set it to False for a streaming one.")

    def encode(rows: dict) -> dict:
        return {column: _encode_rows(rows[column], encode_batch) for column in (USER_IMAGES, HELPER_IMAGES)}

    return dataset.map(
        encode,
        batched=True,
        batch_size=32,
        keep_in_memory=True,
        new_fingerprint=Hasher.hash([dataset._fingerprint, key]),  # hashing the closure would pickle the model
        desc="Encoding images",
    )


def _encode_rows(rows: list[bytes], encode_batch) -> list[bytes]:
    unpacked = [unpack(row) for row in rows]
    if not any(unpacked):
        return rows
    counts = [int(tensors["image_lengths"].sum()) for tensors in unpacked if tensors]
    outputs = encode_batch([tensors for tensors in unpacked if tensors])
    if not isinstance(outputs.pooler_output, list | tuple):
        raise ValueError("`cache_images` keeps lists of features only, not this backbone's. Set it to False.")
    layers = {CACHED: outputs.pooler_output}
    for i, features in enumerate(getattr(outputs, "deepstack_features", None) or ()):
        layers[DEEPSTACK.format(i)] = [features] if isinstance(features, torch.Tensor) else features
    # One iterator a layer, over the rows that have images.
    split = {name: iter(flatten_features(features).cpu().split(counts)) for name, features in layers.items()}
    dtype = outputs.pooler_output[0].dtype
    return [
        pack({**without_pixels(tensors), **{name: next(own) for name, own in split.items()}}, dtype)
        if tensors
        else b""
        for tensors in unpacked
    ]
