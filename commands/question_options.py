"""What `ilvr evaluate` and `ilvr audit` are asked in the same words: which questions, and how they are answered."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from ilvr.evaluation import CONTROLS, Questions, load_questions
from ilvr.evaluation.controls import SMALL
from ilvr.tasks import load_task


@dataclass
class QuestionOptions:
    """Which questions, and how they are answered.

    Args:
        output (`str`): folder of what is written.
        task (`str`, *optional*): name of a task.
        task_settings (`str`, *optional*): its settings, as JSON.
        form (`str`, *optional*, defaults to `"trace"`): of the task's questions.
        dataset (`str`, *optional*): file, folder or Hub id with questions.
        format (`str`, *optional*): of its rows.
        image_root (`str`, *optional*): folder of the images.
        split (`str`, *optional*, defaults to `"test"`): of a folder or Hub id.
        name (`str`, *optional*): configuration of a Hub id.
        metric (`str`, *optional*): says what is right.
        samples (`int`, *optional*): how many questions.
        batch_size (`int`, *optional*, defaults to 64): questions answered at once.
        max_new_tokens (`int`, *optional*, defaults to 256): longest answer.
        dtype (`str`, *optional*, defaults to `"auto"`): of the weights.
        attn_implementation (`str`, *optional*): of the model.
        seed (`int`, *optional*, defaults to 0): of noise.
        json (`bool`, *optional*, defaults to `False`): print JSON.
    """

    output: str | None = field(default=None, metadata={"help": "folder of records and results"})
    task: str | None = field(default=None, metadata={"help": "task of ilvr.tasks, or package.module:Class"})
    task_settings: str = field(default="{}", metadata={"help": "settings of the task, as JSON"})
    form: str = field(default="trace", metadata={"help": "form of the task's questions: trace, answer or text"})
    dataset: str | None = field(default=None, metadata={"help": ".jsonl or .json file, folder or Hub id"})
    format: str | None = field(
        default=None,
        metadata={"help": "vsp, native, reference, mirage, zebra_cot or monet; by default recognised from the fields"},
    )
    image_root: str | None = field(
        default=None, metadata={"help": "folder that holds all images; by default that of the data"}
    )
    split: str = field(default="test", metadata={"help": "split of a folder or Hub id"})
    name: str | None = field(default=None, metadata={"help": "configuration of a Hub id"})
    metric: str | None = field(
        default=None, metadata={"help": "boxed_exact_match, multiple_choice or frozen_lake; by default what fits"}
    )
    samples: int | None = field(default=None, metadata={"help": "how many questions, evenly spread; by default all"})
    batch_size: int = field(default=64, metadata={"help": "questions answered at once"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens"})
    dtype: str = field(default="auto", metadata={"help": "of the weights; `auto` is that of the checkpoint"})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, ..."})
    seed: int = field(default=0, metadata={"help": "of noise"})
    json: bool = field(default=False, metadata={"help": "print JSON in place of tables"})

    def questions(self) -> Questions:
        """The questions that are named.

        Raises:
            ValueError: if none are named, or those named cannot be read.
        """
        if (self.task is None) == (self.dataset is None):
            raise ValueError("Name the questions: either --task or --dataset.")
        if self.dataset is not None:
            is_file = self.dataset.endswith((".jsonl", ".json"))
            sources = {} if is_file else {"split": self.split} | ({"name": self.name} if self.name else {})
            return load_questions(
                self.dataset,
                format=self.format,
                image_root=self.image_root,
                metric=self.metric,
                samples=self.samples,
                **sources,
            )
        task = self._load_task()
        if self.metric is not None and self.metric != task.metric:
            raise ValueError(f"--metric: the task {self.task} has its own, {task.metric}. Leave the option out.")
        return Questions.of_task(task, form=self.form, samples=self.samples)

    def _load_task(self) -> Any:
        assert self.task is not None
        try:
            settings = json.loads(self.task_settings)
        except ValueError as error:
            raise ValueError(f"--task_settings: is no JSON: {error}. Write it as '{{\"seed\": 0}}'.") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"--task_settings: must be an object, as '{{\"seed\": 0}}', got {self.task_settings!r:.80}."
            )
        try:
            return load_task(self.task, **settings)
        except TypeError as error:  # an argument that the task's class does not have, or lacks
            raise ValueError(f"--task_settings: {error}. See the task's class.") from error

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        return {"dtype": self.dtype, **attention}

    @property
    def generate_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        return {"max_new_tokens": self.max_new_tokens}


def parse(parser: TrlParser, arguments: list[str], prog: str) -> tuple[Any, Any] | None:
    """Options and positional arguments; `None` if there are unknown ones or no output, which is printed."""
    # Without `return_remaining_strings`, TRL raises a traceback for an option that it does not know.
    options, positional, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        print(f"{prog}: unknown arguments: {' '.join(map(str, unknown))}. --help lists all.", file=sys.stderr)
        return None
    if options.output is None:
        print(f"{prog}: --output: say which folder the results go to.", file=sys.stderr)
        return None
    return options, positional


def controls_of(text: str) -> list[str] | None:
    """Names of controls from an option: `none`, `small`, `all` (as `None`: all that the questions allow) or names."""
    if text == "all":
        return None
    return [] if text == "none" else [*SMALL] if text == "small" else [name.strip() for name in text.split(",")]


CONTROLS_HELP = f"none, small ({', '.join(SMALL)}), all, or names with commas between: {', '.join(CONTROLS)}"
