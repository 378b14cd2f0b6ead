"""From conversations to token ids, before training starts: every sample is checked, every error names its sample.

No pixel is touched here: tokens are counted from the headers of the images.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ilvr import ILVRProcessor
from ilvr.data.sources import undecoded
from ilvr.data.token_counts import SizeTokenizer

from ..ilvr_training_config import ILVRTrainingConfig
from ..selection import SELECTORS
from .columns import FEATURES, FOLLOWED_PATCHES, TELLS_ANSWER, columns_of, processor_key, side_by_side
from .helper_prompts import add_helper_prompts
from .sample_preparation import prepare_sample


logger = logging.get_logger(__name__)


def prepare_for(
    dataset: Any, processor: ILVRProcessor, args: ILVRTrainingConfig, *, name: str = "train"
) -> Dataset | IterableDataset:
    """A data set as a run with these `args` trains on it: see [`prepare_dataset`], [`add_helper_prompts`] and
    [`add_followed_patches`]; `args` say which of them it takes."""
    selector, workers = SELECTORS[args.selection_method], args.dataset_num_proc
    sizes: dict[str, Any] = {"stage": 1 if args.aligns else 2, "max_length": args.max_length}
    dataset = prepare_dataset(dataset, processor, name=name, num_proc=workers, **sizes)
    if args.aligns and selector.asks_teacher:
        asked: dict[str, Any] = {"question": args.helper_question, "trace_answers": selector.trace_answers}
        dataset = add_helper_prompts(dataset, processor, **asked, name=name, num_proc=workers)
    if args.aligns:
        dataset = add_followed_patches(dataset, required=selector.reads_followed, name=name, num_proc=workers)
    return dataset


def prepare_dataset(
    dataset: Any,
    processor: ILVRProcessor,
    *,
    stage: int,
    max_length: int | None = None,
    name: str = "train",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenizes conversations and checks them.

    Args:
        dataset (`Dataset` or `IterableDataset`): with `messages` (or `prompt` and `completion`) and `images`.
        processor ([`ILVRProcessor`]).
        stage (`int`): 1, and all that aligns latents, needs helper images; samples without any train as text.
        max_length (`int`, *optional*): longest sequence kept, in tokens. Longer samples are dropped, counted and
            listed in a warning: a sequence is never cut, for the cut could fall into a latent span or an image.
        name (`str`, *optional*, defaults to `"train"`): of the data set, for messages.
        num_proc (`int`, *optional*): processes to use.

    Returns:
        The data set with the columns of `FEATURES` beside its own; images stay as they are and where they are. One
        that has these columns already is taken as it is.

    Raises:
        ValueError: names the first bad sample, what is wrong with it and how to mend it; also if a data set was
            prepared before, with a processor of another latent size or of other latent tokens.
    """
    columns = columns_of(dataset, name)
    if set(FEATURES) <= set(columns):
        prepared = dataset
        _check_prepared(dataset, processor, name)
    else:
        prepared = _prepare(dataset, columns, processor, name, num_proc)
    if isinstance(prepared, IterableDataset):
        limits = {"max_length": max_length, "name": name}
        return prepared if max_length is None else prepared.filter(_is_kept, with_indices=True, fn_kwargs=limits)
    if stage == 1 and not any(prepared["num_spans"]):
        raise ValueError(
            f"No sample of the {name} data has an image in an assistant turn, so there is nothing to align latents "
            "with. Add helper images, or train in stage 2 without alignment_weight."
        )
    return prepared if max_length is None else _drop_long(prepared, max_length, name)


def _check_prepared(dataset: Any, processor: ILVRProcessor, name: str) -> None:
    """The spans of samples that were prepared before must be those of this processor; of a stream, the first one's."""
    read = ["input_ids", "num_spans"]
    if isinstance(dataset, IterableDataset):
        tables = (pa.table({column: [row[column]] for column in read}) for row in dataset.take(1))
    else:
        tables = dataset.select_columns(read).with_format("arrow").iter(batch_size=1000)
    start_id, pad_id, _ = processor.latent_token_ids
    seen = 0
    for table in tables:
        spans, ids = table["num_spans"].to_numpy(), table["input_ids"].combine_chunks()
        ends = np.cumsum(ids.value_lengths().to_numpy())
        for token_id, expected in ((start_id, spans), (pad_id, spans * processor.latent_size)):
            places = np.flatnonzero(ids.flatten().to_numpy() == token_id)
            found = np.bincount(np.searchsorted(ends, places, side="right"), minlength=len(spans))
            if (wrong := np.flatnonzero(found != expected)).size:
                row = wrong[0]
                raise ValueError(
                    f"Sample {seen + row} of the {name} data was prepared with another processor: its {spans[row]} "
                    f"spans have {found[row]} times token {token_id}, where this processor, with latent_size="
                    f"{processor.latent_size}, gives {expected[row]}. Prepare it from its messages again."
                )
        seen += len(spans)


def _prepare(dataset: Any, columns: list[str], processor: ILVRProcessor, name: str, num_proc: int | None):
    if "images" in columns:
        # Not decoded by `datasets`, whose error for a broken file does not say which sample it is in.
        dataset = undecoded(dataset, "images")
    arguments = {"tokenizer": SizeTokenizer(processor), "name": name}
    read = [c for c in ("messages", "prompt", "completion", "images") if c in columns]
    if isinstance(dataset, IterableDataset):
        return dataset.map(prepare_sample, with_indices=True, fn_kwargs=arguments)
    added = dataset.select_columns(read).map(
        prepare_sample,
        with_indices=True,
        fn_kwargs=arguments,
        remove_columns=read,
        features=FEATURES,
        num_proc=num_proc,
        new_fingerprint=Hasher.hash([dataset._fingerprint, processor_key(processor)]),
        desc=f"Preparing {name} data",
    )
    return side_by_side(dataset.remove_columns([c for c in FEATURES if c in columns]), added)


def add_followed_patches(
    dataset: Any, *, required: bool, name: str = "train", num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Adds which patch of each helper image is followed, from the list `followed` in a row's `metadata`; -1 where a
    row says nothing.

    Args:
        dataset: of [`prepare_dataset`].
        required (`bool`): whether each row with helper images has to say it.
        name (`str`, *optional*, defaults to `"train"`), num_proc (`int`, *optional*): as there.

    Raises:
        ValueError: if a row lacks what is required, or its list is not one number for each helper image.
    """
    columns = columns_of(dataset, name)
    if FOLLOWED_PATCHES in columns or ("metadata" not in columns and not required):
        return dataset
    arguments = {"required": required, "name": name}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_followed_patches, with_indices=True, fn_kwargs=arguments)
    read = [column for column in ("num_spans", "metadata") if column in columns]
    added = dataset.select_columns(read).map(
        _followed_patches,
        with_indices=True,
        fn_kwargs=arguments,
        remove_columns=read,
        features=Features({FOLLOWED_PATCHES: List(Value("int32"))}),
        num_proc=num_proc,
        desc=f"Reading what {name} samples follow",
    )
    return side_by_side(dataset, added)


def _followed_patches(sample: dict, index: int, *, required: bool, name: str) -> dict[str, list]:
    number, followed = sample["num_spans"], json.loads(sample.get("metadata") or "{}").get("followed")
    if followed is None and not (required and number):
        return {FOLLOWED_PATCHES: [-1] * number}
    is_list = isinstance(followed, list) and all(type(patch) is int and patch >= 0 for patch in followed)
    if not is_list or len(followed) != number:
        raise ValueError(
            f"Sample {index} of the {name} data has {number} helper images and its metadata says followed="
            f"{followed!r:.80}. Give a list with the number of a patch for each, from 0 in raster order, or, if the "
            "task does not know it, choose another selection_method than 'followed' and leave it out."
        )
    return {FOLLOWED_PATCHES: followed}


def add_tells_answer(dataset: Any, *, name: str = "train") -> Dataset | IterableDataset:
    """Adds whether the last span of a row tells its answer, from `tells_answer` in a row's `metadata`.

    Args:
        dataset: of [`prepare_dataset`].
        name (`str`, *optional*, defaults to `"train"`): of the data set, for messages.

    Raises:
        ValueError: if no row says so; of a stream, if it has no `metadata`.
    """
    columns = columns_of(dataset, name)
    if TELLS_ANSWER in columns:
        return dataset
    missing = (
        f"No sample of the {name} data says in its metadata that its last span tells the answer, so swap_latents has "
        "no answer to train on. Set it to 0, or, if the words after the last span follow from its latents alone, "
        'write {"tells_answer": true} into `metadata` before images are cached.'
    )
    if "metadata" not in columns:
        raise ValueError(missing)
    if isinstance(dataset, IterableDataset):
        return dataset.map(_tells_answer)
    added = dataset.select_columns(["metadata"]).map(
        _tells_answer,
        remove_columns=["metadata"],
        features=Features({TELLS_ANSWER: Value("bool")}),
        desc=f"Reading what {name} samples tell",
    )
    if not any(added[TELLS_ANSWER]):
        raise ValueError(missing)
    return side_by_side(dataset, added)


def _tells_answer(sample: dict) -> dict[str, bool]:
    return {TELLS_ANSWER: bool(json.loads(sample["metadata"] or "{}").get("tells_answer"))}


def _is_kept(sample: dict, index: int, *, max_length: int, name: str) -> bool:
    kept = sample["length"] <= max_length
    if not kept:
        logger.warning(f"Sample {index} of the {name} data is dropped: {sample['length']} tokens, {max_length=}.")
    return kept


def _drop_long(dataset: Dataset, max_length: int, name: str) -> Dataset:
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
