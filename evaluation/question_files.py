"""Questions from files: public layouts for evaluation, and any format that is trained on."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from ilvr.data.choices import is_choices, read_choices_question
from ilvr.data.conversations import FEATURES, SampleError
from ilvr.data.images import locate_image
from ilvr.data.reference_jsonl import read_question
from ilvr.data.sources import describe, find_image_root, iterate_rows, load_conversations
from ilvr.data.vsp import read_vsp_question

from .questions import Questions, spread


# Rows that hold a question and what is right, but no answer to train on.
LAYOUTS: dict[str, Callable] = {
    "vsp": read_vsp_question,
    "choices": read_choices_question,
    "reference": read_question,
}


def load_questions(
    path: str,
    *,
    format: str | None = None,
    image_root: str | None = None,
    metric: str | None = None,
    samples: int | None = None,
    **kwargs: Any,
) -> Questions:
    """Questions of a file, folder or Hub id, with their right answers.

    Args:
        path (`str`): see [`~ilvr.data.load_conversations`].
        format (`str`, *optional*): `vsp`, the planning questions of VSP as published, `choices`, multiple choice
            with `question`, `options` and `answer`, or a format of [`~ilvr.data.load_conversations`]; rows of
            `reference` need no `sequence_plan`. Recognised by default.
        image_root (`str`, *optional*, defaults to the folder of the data): holds all images.
        metric (`str`, *optional*): for [`load_metric`]; `frozen_lake` for `vsp`, `multiple_choice` for
            `choices`, else `boxed_exact_match`.
        samples (`int`, *optional*, defaults to all): how many, evenly spread.
        kwargs: for `load_conversations`, such as `split` or `name`.

    Returns:
        [`Questions`].

    Raises:
        ValueError: names the first bad sample, its field and the remedy.
    """
    root = find_image_root(path, image_root)
    layout = _layout(path, format, **kwargs)
    name = Path(path).stem
    if layout is None:
        dataset: Any = load_conversations(path, format=format, image_root=image_root, **kwargs)
        return Questions.of_dataset(dataset, metric=metric or "boxed_exact_match", name=name, samples=samples)
    locate = partial(locate_image, image_root=root)
    rows = []
    for number, row, _ in iterate_rows(path, **kwargs):
        try:
            if isinstance(row, SampleError):
                raise row
            rows.append(LAYOUTS[layout](row, locate))
        except SampleError as error:
            raise ValueError(f"{describe(path, number)}: {error}") from error
    dataset = spread(Dataset.from_list(rows, features=FEATURES), samples)
    if layout == "vsp" and metric in (None, "frozen_lake"):
        boards = [json.loads(metadata)["board"] for metadata in dataset["metadata"]]
        return Questions(dataset, boards, "frozen_lake", name)
    default = "multiple_choice" if layout == "choices" else "boxed_exact_match"
    return Questions.of_dataset(dataset, metric=metric or default, name=name)


def _layout(path: str, format: str | None, **kwargs: Any) -> str | None:
    """The layout of questions without answers that the first row is of, if it is of one."""
    first = next(iterate_rows(path, **kwargs), None)
    if first is None:
        raise ValueError(f"{path} has no rows. Correct the path or the data.")
    row = first[1]
    present = set() if isinstance(row, SampleError) else {name for name, value in row.items() if value is not None}
    if format == "vsp" or (format is None and "map_desc" in present and "sequence_plan" not in present):
        return "vsp"
    if format == "choices" or (format is None and is_choices(present)):
        return "choices"
    is_question = {"text_input", "original_final_answer"} <= present and "sequence_plan" not in present
    return "reference" if format in (None, "reference") and is_question else None
