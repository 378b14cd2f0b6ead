"""Questions with their right answers: of a task, or of any data set whose samples have an `answer`."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import evaluate
from datasets import Dataset

from ilvr.data.conversations import last_boxed
from ilvr.data.sources import undecoded
from ilvr.tasks import Task

from .metrics import load_metric, score_each


@dataclass
class Questions:
    """What is asked, what is right, and the metric that tells.

    Args:
        dataset (`Dataset`): with `messages` and `images`; the first question of each sample is asked.
        references (`list`): what the metric compares the answer to each sample with.
        metric_name (`str`, *optional*, defaults to `"boxed_exact_match"`): for [`load_metric`].
        name (`str`, *optional*): of the data, for tables and cards.
        task ([`~ilvr.tasks.Task`], *optional*): knows what its latents should hold.
    """

    dataset: Dataset
    references: list[Any]
    metric_name: str = "boxed_exact_match"
    name: str = "questions"
    task: Task | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.references) != len(self.dataset) or not self.references:
            raise ValueError(
                f"There are {len(self.dataset)} questions and {len(self.references)} references. Give one for each."
            )

    @classmethod
    def of_task(cls, task: Task, *, form: str = "trace", samples: int | None = None) -> "Questions":
        """The test questions of a task.

        Args:
            task ([`~ilvr.tasks.Task`]).
            form (`str`, *optional*, defaults to `"trace"`): see [`~ilvr.tasks.Task.dataset`].
            samples (`int`, *optional*, defaults to all): how many, evenly spread over the test split.
        """
        dataset = spread(task.dataset("test", form), samples)
        references = [task.reference(sample) for sample in dataset.remove_columns("images")]
        return cls(dataset, references, task.metric, task.title, task)

    @classmethod
    def of_dataset(
        cls,
        dataset: Dataset,
        *,
        metric: str = "boxed_exact_match",
        name: str = "questions",
        samples: int | None = None,
    ) -> "Questions":
        """Questions of a data set with a column `answer`.

        Args:
            dataset (`Dataset`): of [`~ilvr.data.load_conversations`].
            metric (`str`, *optional*, defaults to `"boxed_exact_match"`): for [`load_metric`].
            name (`str`, *optional*): of the data.
            samples (`int`, *optional*, defaults to all): how many, evenly spread.

        Raises:
            ValueError: names the first sample without an answer.
        """
        dataset = spread(dataset, samples)
        answers = dataset["answer"][:] if "answer" in dataset.column_names else [None] * len(dataset)
        if None in answers:
            raise ValueError(
                f"answer: sample {answers.index(None)} of {name} has none, so that nothing is right or wrong. Add the "
                "answers, or leave such samples out."
            )
        questions = cls(dataset, answers, metric, name)
        questions.is_right([""] * len(answers), answers)  # a metric refuses references that it cannot read
        return questions

    def select(self, samples: int) -> "Questions":
        """Some of the questions, evenly spread."""
        dataset, references = (spread(rows, samples) for rows in (self.dataset, self.references))
        return Questions(dataset, references, self.metric_name, self.name, self.task)

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def metric(self) -> evaluate.Metric:
        """Scores the answers."""
        return load_metric(self.metric_name)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The samples without their images."""
        return list(self.dataset.remove_columns("images"))

    def parse(self, answer: str) -> str | None:
        """What the metric reads in an answer: its own `parse`, if it has one, or the content of the last box."""
        return getattr(self.metric, "parse", last_boxed)(answer)

    def is_right(self, answers: list[str], references: list[Any]) -> list[bool]:
        """Whether each answer is right by a reference."""
        return score_each(self.metric, answers, references)

    def score(self, answers: list[str]) -> dict[str, float]:
        """What the metric finds for the answers to all questions."""
        return self.metric.compute(predictions=answers, references=self.references) or {}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the questions, their pictures and references, wherever they were loaded from."""
        digest = hashlib.blake2b(digest_size=16)
        for sample, reference in zip(undecoded(self.dataset, "images"), self.references):
            digest.update(json.dumps([sample["messages"], reference]).encode())
            for image in sample["images"] or []:
                digest.update(image["bytes"] or Path(image["path"]).read_bytes())
        return digest.hexdigest()


def spread(rows: Any, samples: int | None) -> Any:
    """Some of the rows of a data set or a list, evenly spread, for test splits may be sorted by difficulty."""
    if samples is None or samples >= len(rows):
        return rows
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    chosen = [i * len(rows) // samples for i in range(samples)]
    return rows.select(chosen) if isinstance(rows, Dataset) else [rows[i] for i in chosen]
