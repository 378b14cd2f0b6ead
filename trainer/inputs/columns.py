"""The columns that preparation adds to a data set, and what all of preparation does with data sets."""

from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from ilvr import ILVRProcessor


USER_IMAGES, HELPER_IMAGES = "user_images", "helper_images"
# What some ways of selecting targets add: the ids of what is asked of each helper image and, where the trace answers,
# of the answer; and what was selected.
HELPER_PROMPTS, HELPER_ANSWERS, TARGET_INDICES = "helper_prompts", "helper_answers", "target_indices"
# Of tasks that know it: the patch of each helper image that its latents should hold.
FOLLOWED_PATCHES = "followed_patches"
# Of tasks that know it: whether the words after the last span follow from its latents alone.
TELLS_ANSWER = "tells_answer"
# Of data for a ladder: how difficult a sample is, from 0.
LEVEL = "level"
# What preparation adds to a data set: ids, and which of its images are the user's and which are helper images.
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "assistant_mask": List(Value("bool")),
        "length": Value("int32"),
        "num_spans": Value("int32"),
        USER_IMAGES: List(Value("int32")),
        HELPER_IMAGES: List(Value("int32")),
    }
)
_ADDED = (HELPER_PROMPTS, HELPER_ANSWERS, TARGET_INDICES, FOLLOWED_PATCHES, TELLS_ANSWER)
PREPARED_COLUMNS = (*FEATURES, *_ADDED, "images")


def columns_of(dataset: Any, name: str) -> list[str]:
    """The columns of the data set that is called `name`.

    Raises:
        ValueError: if it is none, has no samples or has neither conversations nor what preparation makes of them.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"The {name} data must be a `datasets.Dataset` or `IterableDataset`, got {type(dataset).__name__}. Make "
            "one with `ilvr.data.load_conversations`, or with `Dataset.from_list` of rows."
        )
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The {name} data has no samples.")
    known = ({"messages"}, {"prompt", "completion"}, set(FEATURES))
    if not any(needed <= set(columns) for needed in known):
        raise ValueError(
            f"The {name} data set needs a column `messages` (or `prompt` and `completion`), it has {columns}."
        )
    return columns


def side_by_side(dataset: Dataset, added: Dataset) -> Dataset:
    """A data set with the columns of another of as many rows; what it holds already is not written again."""
    joined = concatenate_datasets([dataset, added], axis=1)
    return Dataset(joined.data, joined.info, joined.split, fingerprint=f"{added._fingerprint}-ilvr")


def processor_key(processor: ILVRProcessor) -> str:
    """Names a processor's settings: what it makes of a conversation follows from these."""
    return Hasher.hash(
        [processor.to_json_string(), processor.chat_template, sorted(processor.tokenizer.get_vocab().items())]
    )
