"""From conversations to token ids, before training starts: every sample is checked, every error names its sample.

No pixel is touched here: tokens are counted from the headers of the images.
"""

import json
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers.utils import logging

from ilvr import ILVRProcessor
from ilvr.data.conversations import ROLES, SampleError, image_roles
from ilvr.data.images import image_size
from ilvr.data.sources import undecoded
from ilvr.data.token_counts import SizeTokenizer, check_spans

from ..ilvr_training_config import ILVRTrainingConfig
from ..selection import SELECTORS


logger = logging.get_logger(__name__)

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
    columns = _columns(dataset, name)
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


def _columns(dataset: Any, name: str) -> list[str]:
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


def add_helper_prompts(
    dataset: Any,
    processor: ILVRProcessor,
    *,
    question: str | None,
    trace_answers: bool = True,
    name: str = "train",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Adds what is asked of each helper image, as ids: the picture, the question, and the start of an answer.

    Where nobody names a question, the trace itself asks and answers: the conversation up to the picture, which opens
    the user's turn in place of the user's own, and the words that follow it in the assistant's turn.

    Args:
        dataset: of [`prepare_dataset`].
        processor ([`ILVRProcessor`]).
        question (`str`, *optional*): asked of each helper image, unless a row's `metadata` holds `helper_questions`,
            a list with one for each.
        trace_answers (`bool`, *optional*, defaults to `True`): whether a trace may ask and answer itself.
        name (`str`, *optional*, defaults to `"train"`), num_proc (`int`, *optional*): as there.

    Raises:
        ValueError: if a row has not as many questions as helper images, if a trace without one says nothing after a
            picture or may not answer, or if the images are cached already.
    """
    columns = _columns(dataset, name)
    if HELPER_PROMPTS in columns or TARGET_INDICES in columns:
        return dataset
    if "images" not in columns:
        raise ValueError(
            f"The images of the {name} data are cached, without the questions to ask of them. Cache them with the "
            "selection_method that asks."
        )
    dataset = undecoded(dataset, "images")
    asked = {"question": question, "trace_answers": trace_answers}
    arguments = {"tokenizer": SizeTokenizer(processor), "name": name, **asked}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_helper_prompts, with_indices=True, fn_kwargs=arguments)
    known = ("messages", "prompt", "completion", "images", HELPER_IMAGES, "metadata")
    read = [column for column in known if column in columns]
    added = dataset.select_columns(read).map(
        _helper_prompts,
        with_indices=True,
        fn_kwargs=arguments,
        remove_columns=read,
        features=Features(dict.fromkeys((HELPER_PROMPTS, HELPER_ANSWERS), List(List(Value("int32"))))),
        num_proc=num_proc,
        new_fingerprint=Hasher.hash([dataset._fingerprint, processor_key(processor), asked]),
        desc=f"Asking of {name} helper images",
    )
    return side_by_side(dataset, added)


def _helper_prompts(
    sample: dict, index: int, *, tokenizer: SizeTokenizer, question: str | None, trace_answers: bool, name: str
) -> dict[str, list]:
    own = json.loads(sample.get("metadata") or "{}").get("helper_questions")
    helpers, where = sample[HELPER_IMAGES], f"Sample {index} of the {name} data"
    sizes = [image_size(sample["images"][i], f"{where}, image {i}") for i in helpers]
    if own is None and question is None and trace_answers:
        if all(sample.get(column) is None for column in ("messages", "completion")):
            raise ValueError(f"{where} has no messages left that could ask. Set helper_question, or keep them.")
        try:
            messages = checked_messages(sample)
            asked = [_rest_of_trace(messages, number, sizes, tokenizer) for number in range(len(sizes))]
        except SampleError as error:
            raise ValueError(f"{where}: {error}") from error
        said = [tokenizer.whole.tokenizer.decode(answer, skip_special_tokens=True) for _, answer in asked]
        if silent := [number for number, words in enumerate(said) if not words.strip()]:
            raise ValueError(
                f"{where}: nothing is said after helper image {silent[0]}, so the trace does not tell what it is for. "
                "Set helper_question, give each row's metadata a list `helper_questions`, or end it with words."
            )
        return {HELPER_PROMPTS: [prompt for prompt, _ in asked], HELPER_ANSWERS: [answer for _, answer in asked]}
    questions = [question] * len(helpers) if own is None else own
    if len(questions) != len(helpers) or not all(isinstance(text, str) and text for text in questions):
        raise ValueError(
            f"{where} has {len(helpers)} helper images and the questions {questions!r:.80}. Set helper_question, or "
            "give each row's metadata a list `helper_questions`, one text for each image. Without a question, "
            "'answer_gradient' and 'attention' read the trace."
        )
    ask = _asker(tokenizer)
    return {
        HELPER_PROMPTS: [ask(text, size) for text, size in zip(questions, sizes)],
        HELPER_ANSWERS: [[] for _ in helpers],
    }


def _rest_of_trace(
    messages: list[dict], number: int, sizes: list[tuple[int, int]], tokenizer: SizeTokenizer
) -> tuple[list[int], list[int]]:
    """The ids of a conversation up to its helper image `number`, which is the only picture and opens the user's last
    turn before it, and of the words behind it in the assistant's turn; both without spans."""
    turns: list[dict[str, Any]] = []
    seen = 0  # helper images
    for message in messages:
        content, is_own = message["content"], message["role"] == "assistant"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = [part for part in parts if is_own or part["type"] == "text"]
        turns.append({"role": message["role"], "content": kept})
        seen += sum(part["type"] == "image" for part in kept)
        if seen > number:
            break
    asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if asked is None:
        raise SampleError("messages", "no user's turn comes before a helper image. Add one, or set helper_question.")
    before = sum(part["type"] == "image" for turn in turns[:asked] for part in turn["content"])
    turns[asked]["content"].insert(0, {"type": "image"})
    ids, own = tokenizer(turns, [*sizes[:before], sizes[number], *sizes[before:seen]])
    latent_ids = tokenizer.whole.latent_token_ids
    start, end = ([i for i, token in enumerate(ids) if token == mark][number] for mark in latent_ids[::2])
    turn_end = next((i for i in range(end, len(ids)) if not own[i]), len(ids))
    parts = ids[:start], ids[end + 1 : turn_end]
    prompt, answer = ([token for token in part if token not in latent_ids] for part in parts)
    return prompt, answer


@cache
def _asker(tokenizer: SizeTokenizer):
    @cache
    def ask(question: str, size: tuple[int, int]) -> list[int]:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return tokenizer(asked, [size], add_generation_prompt=True)[0]

    return ask


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
    columns = _columns(dataset, name)
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
    columns = _columns(dataset, name)
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


def side_by_side(dataset: Dataset, added: Dataset) -> Dataset:
    """A data set with the columns of another of as many rows; what it holds already is not written again."""
    joined = concatenate_datasets([dataset, added], axis=1)
    return Dataset(joined.data, joined.info, joined.split, fingerprint=f"{added._fingerprint}-ilvr")


def processor_key(processor: ILVRProcessor) -> str:
    """Names a processor's settings: what it makes of a conversation follows from these."""
    return Hasher.hash(
        [processor.to_json_string(), processor.chat_template, sorted(processor.tokenizer.get_vocab().items())]
    )


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


def prepare_sample(sample: dict, index: int, *, tokenizer: SizeTokenizer, name: str) -> dict[str, Any]:
    """Checks and tokenizes one conversation.

    Args:
        sample (`dict`): a row, its images not decoded.
        index (`int`), name (`str`): name the sample in errors.
        tokenizer ([`~ilvr.data.token_counts.SizeTokenizer`]).

    Returns:
        `dict` with the columns of `FEATURES`.

    Raises:
        ValueError: names the sample, the field and the remedy.
    """
    where = f"Sample {index} of the {name} data"
    try:
        messages = checked_messages(sample)
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    images = sample.get("images") or []
    user_images, helper_images = assign_images(messages, len(images), where)
    sizes = [image_size(image, f"{where}, image {i}") for i, image in enumerate(images)]
    try:
        input_ids, assistant_mask = tokenizer(messages, sizes)
        check_spans(messages, input_ids, tokenizer.whole)
    except SampleError as error:
        raise ValueError(f"{where}: {error}") from error
    if not any(assistant_mask):
        raise ValueError(f"{where} has no words of the assistant to learn from.")
    return {
        "input_ids": input_ids,
        "assistant_mask": assistant_mask,
        "length": len(input_ids),
        "num_spans": len(helper_images),
        USER_IMAGES: user_images,
        HELPER_IMAGES: helper_images,
    }


def checked_messages(sample: dict) -> list[dict]:
    """The turns of a sample; a prompt or completion that is a plain text is one turn.

    Raises:
        SampleError: if roles, contents or parts are others than TRL's vision conversations have.
    """
    if sample.get("messages") is None and "prompt" in sample:
        turns = zip(("user", "assistant"), ("prompt", "completion"))
        given = [(role, sample[column]) for role, column in turns]
        messages = [
            message
            for role, turn in given
            for message in ([{"role": role, "content": turn}] if isinstance(turn, str) else turn or [])
        ]
    else:
        messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise SampleError("messages", f"must be a list of turns, got {messages!r:.80}. Leave the sample out.")
    for i, message in enumerate(messages):
        role, content = (message.get(key) for key in ("role", "content"))
        if role not in ROLES:
            raise SampleError(f"messages[{i}].role", f"unknown role {role!r}. Use one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise SampleError(f"messages[{i}].content", f"must be a text or a list of parts, got {content!r:.80}.")
        for j, part in enumerate(content):
            kind, text = part.get("type"), part.get("text")
            if kind not in ("text", "image"):
                raise SampleError(f"messages[{i}].content[{j}]", f"unknown type {kind!r}. Use text or image.")
            if kind == "text" and not isinstance(text, str):
                raise SampleError(f"messages[{i}].content[{j}].text", f"must be a text, got {text!r:.80}.")
    return messages


def assign_images(messages: list[dict], num_images: int, where: str) -> tuple[list[int], list[int]]:
    """Which images, by their number, belong to user turns, and which to assistant turns (helper images)."""
    roles = image_roles(messages)
    if len(roles) != num_images:
        raise ValueError(
            f"{where} has {len(roles)} image parts in its messages but {num_images} images. Each image needs one part "
            "{'type': 'image'}, in the same order."
        )
    is_helper = [role == "assistant" for role in roles]
    return [i for i, helper in enumerate(is_helper) if not helper], [i for i, helper in enumerate(is_helper) if helper]
