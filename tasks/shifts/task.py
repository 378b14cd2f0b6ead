"""Shifts as a task: which boards, with how many shifts, in which form."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, NamedSplit
from PIL import Image

from ilvr.data.conversations import FEATURES
from ilvr.tasks.task import Task

from .board import ShiftBoard, sample_board, sample_shifts
from .conversations import BASE_SHIFTS, SUFFIXES, WHERE, base_conversation, conversation, question_of, vocabulary
from .rendering import render_shift_board


@dataclass
class Shifts(Task):
    """Following a player over rows and columns that move round, one after the other.

    Args:
        boards (`int`), test_boards (`int`): training and test samples, a board each.
        base_boards (`int`, *optional*, defaults to 0): boards that a small backbone learns to see on.
        size (`int`, *optional*, defaults to 3): of a board, 2 to 5.
        lengths (`list[int]`, *optional*, defaults to `[4, 10]`): fewest and most shifts of a training sample.
        test_lengths (`list[int]`, *optional*, defaults to `lengths`): and of a test.
        touch (`float`, *optional*, defaults to 0.6): share of shifts drawn from those that move the player.
        seed (`int`, *optional*, defaults to 0): fixes boards, splits and shifts.
    """

    boards: int
    test_boards: int
    base_boards: int = 0
    size: int = 3
    lengths: tuple[int, int] = (4, 10)
    test_lengths: tuple[int, int] | None = None
    touch: float = 0.6
    seed: int = 0

    title = "Shifts"
    metric = "boxed_exact_match"
    prompt = question_of(["b L", "x D", "b R"], "trace")
    helper_question = WHERE

    def __post_init__(self) -> None:
        self.test_lengths = self.test_lengths or self.lengths
        ranges = (self.lengths, self.test_lengths)
        if not 2 <= self.size <= 5 or any(len(r) != 2 or not 1 <= r[0] <= r[1] for r in ranges):
            raise ValueError(
                f"Shifts has boards of size 2 to 5 and a fewest and a most number of shifts, got size {self.size}, "
                f"lengths {self.lengths} and test_lengths {self.test_lengths}."
            )

    def dataset(self, split: str, form: str = "trace") -> Dataset:
        """The samples of a split in one form; see [`~ilvr.tasks.Task.dataset`].

        Raises:
            ValueError: for an unknown split or form, and for tests in the form `base`.
        """
        if split not in ("train", "test") or form not in (*SUFFIXES, "base") or (form, split) == ("base", "test"):
            raise ValueError(f"There is no form {form!r} of the split {split!r}; choose trace, answer or text.")
        settings = {"split": split, "form": form, "task": {**vars(self)}}
        return Dataset.from_generator(_rows, gen_kwargs=settings, features=FEATURES, split=NamedSplit(split))

    def texts(self) -> list[str]:
        return vocabulary(self.size, max(self.lengths[1], (self.test_lengths or self.lengths)[1]))

    def donor_reference(self, sample: dict[str, Any], donor: dict[str, Any]) -> str:
        """The donor's answer: a span's latents should hold where the player is, and nothing comes after the last."""
        return donor["answer"]

    def followed_patches(self, sample: dict[str, Any]) -> list[int]:
        """The player's cell, in raster order; one patch is one cell."""
        return json.loads(sample["metadata"])["followed"]

    def group(self, sample: dict[str, Any]) -> str:
        return f"{len(json.loads(sample['metadata'])['shifts'])} shifts"

    def draw(self, sample: dict[str, Any], answer: str) -> list[tuple[str, Image.Image]]:
        """The board after each shift."""
        metadata = json.loads(sample["metadata"])
        row, column = metadata["player"]
        board, pictures = ShiftBoard(tuple(metadata["board"]), (row, column)), []
        for shift in metadata["shifts"]:
            board = board.shift(shift)
            pictures.append((f"after {shift}", render_shift_board(board)))
        return pictures


def _rows(split: str, form: str, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    number = task["test_boards"] if split == "test" else task["base_boards"] if form == "base" else task["boards"]
    fewest, most = task["test_lengths"] if split == "test" else task["lengths"]
    kind = "base" if form == "base" else "follow"  # the forms ask the same
    for i in range(number):
        rng = random.Random(f"{task['seed']}-{kind}-{split}-{i}")
        board = sample_board(rng, task["size"], split, task["seed"])
        if form == "base":
            asked = [sample_shifts(rng, board, n, task["touch"]) for n in BASE_SHIFTS]
            yield base_conversation(board, asked)
        else:
            yield conversation(board, sample_shifts(rng, board, rng.randint(fewest, most), task["touch"]), form)
