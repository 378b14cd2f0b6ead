"""A task: questions with known answers, a metric, and pictures of what is meant.

A metric of its own is a file in `metric/` of the task's folder; `load_metric` finds it by the folder's name.

Example:

```python
>>> from datasets import Dataset
>>> from PIL import Image
>>> from ilvr.data.conversations import FEATURES, ConversationBuilder
>>> from ilvr.tasks import Task
>>> from ilvr.tasks.images import as_png

>>> def strip(number):
...     return Image.new("RGB", (32 * number, 32), "red")

>>> class Strips(Task):
...     title, metric, prompt = "Strips", "boxed_exact_match", "How many squares long is the strip?"
...
...     def dataset(self, split, form="trace"):
...         numbers = [2, 4] if split == "test" else [1, 3, 5]
...         return Dataset.from_list([self.sample(number, form) for number in numbers], features=FEATURES)
...
...     def sample(self, number, form):
...         builder = ConversationBuilder(as_png)
...         builder.add_turn("user", "question")
...         builder.add_image(strip(number), "question")
...         builder.add_text(self.prompt, "question")
...         builder.add_turn("assistant", form)
...         for length in range(1, number + 1) if form == "trace" else ():
...             builder.add_text(f" {length}", "step")
...             builder.add_image(strip(length), "step")
...         builder.add_text(f" \\boxed{{{number}}}", "answer")
...         return builder.finish({}, set(), answer=number)
...
...     def texts(self):
...         return [self.prompt, " 1 2 3 4 5", " \\boxed{1}"]
```
"""

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

from datasets import Dataset
from PIL import Image


class Task(ABC):
    """Questions about pictures whose answers are known; a folder in `tasks/`, or a class of one's own.

    A question comes in several forms, which differ in what the assistant says, not in what is asked for; each is an
    arm of a comparison, see `tasks/forms.py`: `trace` (words and helper images, then the answer), `answer` (the answer
    alone), `text` (the state in words where a trace has a helper image), `text_equal` (the same in as many words as a
    latent span has positions) and `pads` (as many words without a meaning). `base` is what teaches a small backbone to
    see, of the training split only. A task has `trace` and `answer`, and as many of the others as it can say; `form`
    may name further ones, and a form that a task does not have is refused.
    """

    title: str  # of its results, such as "FrozenLake planning"
    metric: str  # for `ilvr.evaluation.load_metric`: a name, or the path of a file of one's own
    prompt: str  # an example of a question, for a model card
    helper_question: str | None = None  # what to ask of a helper image, for `selection_method="answer_occlusion"`

    @abstractmethod
    def dataset(self, split: str, form: str = "trace") -> Dataset:
        """The samples of a split in one form.

        Args:
            split (`str`): `train` or `test`.
            form (`str`, *optional*, defaults to `"trace"`): one of those above, or the task's own.

        Returns:
            `Dataset` with the columns of [`~ilvr.data.load_conversations`]. All forms of a split but `base` have the
            same questions in the same order.

        Raises:
            ValueError: for a split or a form that the task does not have.
        """

    @abstractmethod
    def texts(self) -> list[str]:
        """Texts that hold every word of the task, to train the tokenizer of a small backbone on."""

    def reference(self, sample: dict[str, Any]) -> Any:
        """What the metric compares an answer to a sample with; the right answer by default."""
        return sample["answer"]

    def group(self, sample: dict[str, Any]) -> str:
        """The group of a sample, such as the size of its board; results are pictured for each. One by default."""
        return ""

    def donor_reference(self, sample: dict[str, Any], donor: dict[str, Any]) -> Any | None:
        """As [`Task.reference`], if the last span of latents of `sample` were that of `donor`; `None` if unknown.

        Where it is the donor's own answer for all pairs of some samples, their `metadata` may say `tells_answer`: then
        `swap_latents` trains on it.
        """
        return None

    def followed_patches(self, sample: dict[str, Any]) -> list[int] | None:
        """The patch of each helper image, in raster order, that its latents should hold; `None` if unknown."""
        return None

    def draw(self, sample: dict[str, Any], answer: str) -> list[tuple[str, Image.Image]]:
        """What the spans of an answer are about, in their order: a caption and a picture of each, to lay latents over.

        The question's own image is taken for spans that this leaves out, which by default are all.
        """
        return []


def load_task(name: str, **settings: Any) -> Task:
    """A task by name, with its settings.

    Args:
        name (`str`): a folder of `ilvr.tasks`, such as `"frozen_lake"`, or `"package.module:Class"`.
        settings: arguments of its class.

    Raises:
        ValueError: if there is no such task.

    Example:

    ```python
    >>> task = load_task("frozen_lake", maps={3: 1000}, test_maps={3: 500})
    >>> train, test = task.dataset("train"), task.dataset("test")
    ```
    """
    module, _, cls = (name if ":" in name else f"ilvr.tasks.{name}:TASK").partition(":")
    try:
        cls = getattr(import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the task itself needs
        raise ValueError(
            f"There is no task {name!r}: {error}. Name a folder of ilvr.tasks, or a class as 'package.module:Class'."
        ) from error
    return cls(**settings)
