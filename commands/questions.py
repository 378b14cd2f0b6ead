"""What `ilvr evaluate` and `ilvr audit` are asked in the same words: which questions, and how they are answered."""

import json
from argparse import Namespace
from typing import Any

from ilvr.evaluation import Questions, load_questions
from ilvr.evaluation.controls import SMALL
from ilvr.tasks import Task, load_task


def questions_of(options: Namespace) -> Questions:
    """The questions that are named.

    Raises:
        ValueError: if none are named, or those named cannot be read.
    """
    if (options.task is None) == (options.dataset is None):
        raise ValueError("Name the questions: either --task or --dataset.")
    if options.dataset is not None:
        is_file = options.dataset.endswith((".jsonl", ".json"))
        sources = {} if is_file else {"split": options.split} | ({"name": options.name} if options.name else {})
        return load_questions(
            options.dataset,
            format=options.format,
            image_root=options.image_root,
            metric=options.metric,
            samples=options.samples,
            **sources,
        )
    task = task_of(options)
    if options.metric is not None and options.metric != task.metric:
        raise ValueError(f"--metric: the task {options.task} has its own, {task.metric}. Leave the option out.")
    return Questions.of_task(task, form=options.form, samples=options.samples)


def task_of(options: Namespace) -> Task:
    """The task that is named, with its settings."""
    try:
        settings = json.loads(options.task_settings)
    except ValueError as error:
        raise ValueError(f"--task_settings: is no JSON: {error}. Write it as '{{\"seed\": 0}}'.") from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"--task_settings: must be an object, as '{{\"seed\": 0}}', got {options.task_settings!r:.80}."
        )
    try:
        return load_task(options.task, **settings)
    except TypeError as error:  # an argument that the task's class does not have, or lacks
        raise ValueError(f"--task_settings: {error}. See the task's class.") from error


def model_kwargs(options: Namespace) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    attention = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    return {"dtype": options.dtype, **attention}


def controls_of(text: str) -> list[str] | None:
    """Names of controls from an option: `none`, `small`, `all` (as `None`: all that the questions allow) or names."""
    if text == "all":
        return None
    return [] if text == "none" else [*SMALL] if text == "small" else [name.strip() for name in text.split(",")]
