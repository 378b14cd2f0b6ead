"""A user's own data set as a task: what is trained on, what is held out, and what is right."""

from typing import Any

from datasets import Dataset

from ilvr.data import load_conversations
from ilvr.evaluation import Questions, load_questions, scores_by_group
from ilvr.tasks import Task

from .recipe import Recipe


class OwnData(Task):
    """Conversations to train on, and questions to test with.

    Args:
        train (`Dataset`): of [`~ilvr.data.load_conversations`].
        questions ([`~ilvr.evaluation.Questions`]): those of the test, whose samples have what is right in `answer`.
    """

    def __init__(self, train: Dataset, questions: Questions) -> None:
        if questions.references != questions.dataset["answer"][:]:
            raise ValueError(
                f"{questions.name} is scored by {questions.metric_name}, which reads more than an answer. Train with "
                "test_size=0, and test with `ilvr evaluate`."
            )
        scores_by_group(questions.score([""] * len(questions)))  # raises for a metric that the table cannot show
        self.title, self.metric = questions.name, questions.metric_name
        self.prompt = _texts(questions.samples[0], "user")[-1].strip()
        self._splits = {"train": train, "test": questions.dataset}

    def dataset(self, split: str, form: str = "trace") -> Dataset:
        if form != "trace":
            raise ValueError(f"{self.title} has conversations as they are, form 'trace', and no form {form!r}.")
        return self._splits[split]

    def texts(self) -> list[str]:
        return [text for sample in self._splits["train"].remove_columns("images") for text in _texts(sample)]


def _texts(sample: dict[str, Any], role: str | None = None) -> list[str]:
    turns = [message for message in sample["messages"] if role in (None, message["role"])]
    return [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"] or [""]


def load_own_data(recipe: Recipe) -> tuple[Any, OwnData | None]:
    """The training data of a recipe, and the task that tests them, if there is a test.

    Without test data a share of the samples is held out, drawn by the recipe's seed.

    Args:
        recipe ([`Recipe`]): with a `dataset`.

    Returns:
        `tuple[Dataset | IterableDataset, OwnData | None]`.

    Raises:
        ValueError: if the data cannot be read, if a test sample has no answer, or if there is nothing to hold out.
    """
    assert recipe.dataset is not None
    data: Any = load_conversations(recipe.dataset, **recipe.dataset_kwargs)
    if recipe.test_dataset is not None:
        kwargs = {**recipe.dataset_kwargs, **recipe.test_dataset_kwargs}
        questions = load_questions(recipe.test_dataset, metric=recipe.metric, **kwargs)
        return data, OwnData(data, questions)
    if not recipe.test_size:
        return data, None
    if not isinstance(data, Dataset):
        raise ValueError("Nothing can be held out of data that are streamed. Name a test_dataset, or set test_size=0.")
    size = int(recipe.test_size) if recipe.test_size >= 1 else recipe.test_size
    parts = data.train_test_split(size, seed=recipe.seed)
    try:
        questions = Questions.of_dataset(parts["test"], metric=recipe.metric, name=f"{recipe.dataset}, held out")
    except ValueError as error:
        raise ValueError(f"{error} Or name a test_dataset, or train without a test: test_size=0.") from error
    return parts["train"], OwnData(parts["train"], questions)
