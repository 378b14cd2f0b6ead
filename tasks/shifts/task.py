"""Shifts as a task: which boards, with how many shifts, in which form."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers.utils import logging

from ilvr.tasks.forms import check_form, check_latent_size
from ilvr.tasks.generation import generate_dataset
from ilvr.tasks.task import Task

from .board import ShiftBoard, sample_board, sample_shifts
from .conversations import BASE_SHIFTS, WHERE, Asked, base_conversation, conversation, question_of, vocabulary
from .rendering import render_shift_board


logger = logging.get_logger(__name__)

Range = tuple[int, int]  # fewest and most, both included


@dataclass
class Shifts(Task):
    """Following a player over rows and columns that move round, one after the other.

    Args:
        boards (`int`), test_boards (`int`): training and test samples, a board each.
        base_boards (`int`, *optional*, defaults to 0): boards that a small backbone learns to see on.
        size (`int`, *optional*, defaults to 3): of a board, 2 to 5.
        lengths (`tuple[int, int]`, *optional*, defaults to `(4, 10)`): fewest and most shifts of a training sample.
        test_lengths (`tuple[int, int]`, *optional*, defaults to `lengths`): and of a test.
        listed (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
            Fewest and most shifts that the question of a training sample lists: those that it asks for, which are
            never left out, and others before and behind them. A model finds the shifts of long lists by their numbers
            if it has seen such lists.
        test_listed (`tuple[int, int]`, *optional*, defaults to `listed`): and of a test.
        number_from (`tuple[int, int]`, *optional*, defaults to `(1, 1)`):
            Least and greatest number of the first shift of a training sample; the others count on from it. Tests that
            are longer than the training samples have numbers that were trained if this reaches far enough: with
            lengths of 4 to 10, `(1, 13)` trains all numbers up to 22.
        test_number_from (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): and of a test.
        touch (`float`, *optional*, defaults to 0.6): share of shifts drawn from those that move the player.
        names_shifts (`bool`, *optional*, defaults to `True`): whether steps name the shift, or its number alone, so
            that it has to be looked up in the question.
        latent_size (`int`, *optional*, defaults to 1): the model's; `text_equal` and `pads` are as long as its spans.
        seed (`int`, *optional*, defaults to 0): fixes boards, splits and shifts.

    Raises:
        ValueError: if there are no such boards, ranges or shares.
    """

    boards: int
    test_boards: int
    base_boards: int = 0
    size: int = 3
    lengths: Range = (4, 10)
    test_lengths: Range | None = None
    listed: Range = (1, 1)
    test_listed: Range | None = None
    number_from: Range = (1, 1)
    test_number_from: Range = (1, 1)
    touch: float = 0.6
    names_shifts: bool = True
    latent_size: int = 1
    seed: int = 0

    title = "Shifts"
    metric = "boxed_exact_match"
    prompt = question_of(Asked(("b L", "x D", "b R"), 0, 3), "trace")
    helper_question = WHERE

    def __post_init__(self) -> None:
        self.test_lengths = self.test_lengths or self.lengths
        self.test_listed = self.test_listed or self.listed
        if not 2 <= self.size <= 5 or not 0 <= self.touch <= 1:
            raise ValueError(
                f"Boards of shifts have size 2 to 5, and touch is a share, got size {self.size}, touch {self.touch}."
            )
        for name in ("lengths", "test_lengths", "listed", "test_listed", "number_from", "test_number_from"):
            values = getattr(self, name)
            if len(values) != 2 or not 1 <= values[0] <= values[1]:
                raise ValueError(f"{name} must be a least and a greatest number, from 1 on, got {values}.")
        check_latent_size(self.latent_size)
        trained, tested = self._greatest_number("train"), self._greatest_number("test")
        if tested > trained:
            logger.warning(
                f"Tests number their shifts up to {tested}, training samples up to {trained}: numbers that no model "
                f"has learned. Raise number_from, now {tuple(self.number_from)}, by {tested - trained}."
            )

    def _ranges(self, split: str) -> tuple[Range, Range, Range]:
        """The lengths of a split, how many shifts its questions list, and its first numbers."""
        if split == "train":
            return self.lengths, self.listed, self.number_from
        return self.test_lengths or self.lengths, self.test_listed or self.listed, self.test_number_from

    def _greatest_number(self, split: str) -> int:
        lengths, listed, first_numbers = self._ranges(split)
        return first_numbers[1] + max(lengths[1], listed[1]) - 1

    def dataset(self, split: str, form: str = "trace") -> Dataset:
        """The samples of a split in one form; see [`~ilvr.tasks.Task.dataset`].

        Raises:
            ValueError: for an unknown split or form, and for tests in the form `base`.
        """
        check_form(split, form)
        return generate_dataset(_rows, split, {"task": self, "split": split, "form": form})

    def texts(self) -> list[str]:
        return vocabulary(self.size, max(map(self._greatest_number, ("train", "test"))))

    def donor_reference(self, sample: dict[str, Any], donor: dict[str, Any]) -> str:
        """The donor's answer: a span's latents should hold where the player is, and nothing comes after the last."""
        return donor["answer"]

    def followed_patches(self, sample: dict[str, Any]) -> list[int]:
        """The player's cell after each shift, in raster order; a patch is as large as a cell."""
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


def _rows(task: Shifts, split: str, form: str) -> Iterator[dict[str, Any]]:
    is_base = form == "base"
    lengths, listed, first_numbers = task._ranges(split)
    number = task.test_boards if split == "test" else task.base_boards if is_base else task.boards
    for i in range(number):
        # The forms ask the same questions: what is drawn depends on the split alone.
        rng = random.Random(f"{task.seed}-{'base' if is_base else 'follow'}-{split}-{i}")
        board = sample_board(rng, task.size, split, task.seed)
        draw = partial(_asked, rng, board, touch=task.touch, first_numbers=first_numbers)
        if is_base:
            repeats = listed[1] > lengths[1]  # questions list more than they ask for
            at_once = [draw(number, (1, 1)) for number in BASE_SHIFTS * (1 if repeats else 2)]
            repeated = draw(rng.randint(lengths[0], listed[1]), listed) if repeats else None
            yield base_conversation(board, at_once, repeated)
        else:
            asked = draw(rng.randint(*lengths), listed)
            yield conversation(board, asked, form, names_shifts=task.names_shifts, latent_size=task.latent_size)


def _asked(
    rng: random.Random, board: ShiftBoard, number: int, listed: Range, *, touch: float, first_numbers: Range
) -> Asked:
    """`number` shifts from `board` on, at a place drawn in a list as long as `listed` says."""
    shifts = sample_shifts(rng, board, number, touch)
    unasked = sample_shifts(rng, board, max(0, rng.randint(*listed) - number), touch)
    first = rng.randint(0, len(unasked))
    return Asked((*unasked[:first], *shifts, *unasked[first:]), first, number, rng.randint(*first_numbers))
