"""What a teacher is asked of each helper image, so that its answer says which patches matter."""

import json
from functools import cache
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher

from ilvr import ILVRProcessor
from ilvr.data.conversations import SampleError
from ilvr.data.images import image_size
from ilvr.data.sources import undecoded
from ilvr.data.token_counts import SizeTokenizer

from .columns import (
    HELPER_ANSWERS,
    HELPER_IMAGES,
    HELPER_PROMPTS,
    TARGET_INDICES,
    columns_of,
    processor_key,
    side_by_side,
)
from .sample_preparation import checked_messages


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
        dataset: of [`~ilvr.trainer.inputs.data_preparation.prepare_dataset`].
        processor ([`ILVRProcessor`]).
        question (`str`, *optional*): asked of each helper image, unless a row's `metadata` holds `helper_questions`,
            a list with one for each.
        trace_answers (`bool`, *optional*, defaults to `True`): whether a trace may ask and answer itself.
        name (`str`, *optional*, defaults to `"train"`), num_proc (`int`, *optional*): as in that one.

    Raises:
        ValueError: if a row has not as many questions as helper images, if a trace without one says nothing after a
            picture or may not answer, or if the images are cached already.
    """
    columns = columns_of(dataset, name)
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
