"""FrozenLake planning as a task: which maps, in which form, are trained and tested on."""

import json
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from PIL import Image

from ilvr.tasks.task import Task

from .board import MOVES, FrozenLakeMap
from .conversations import PROMPTS, frozen_lake_dataset, vocabulary
from .rendering import render_board


def board_of(sample: dict[str, Any]) -> FrozenLakeMap:
    """The map that a sample is about."""
    return FrozenLakeMap(tuple(json.loads(sample["metadata"])["board"]))


@dataclass
class FrozenLake(Task):
    """Planning a path to the goal; helper images show the board after each move.

    Args:
        maps (`dict[int, int]`): training maps for each size of board.
        test_maps (`dict[int, int]`): test maps for each size of board.
        base_maps (`dict[int, int]`, *optional*): maps that a small backbone learns to see on.
        base_tasks (`list[str]`, *optional*): what it is asked about them, see [`~conversations.conversation`].
        seed (`int`, *optional*, defaults to 0): fixes maps, splits and traces.
    """

    maps: dict[int, int]
    test_maps: dict[int, int]
    base_maps: dict[int, int] = field(default_factory=dict)
    base_tasks: list[str] = field(default_factory=list)
    seed: int = 0

    title = "FrozenLake planning"
    metric = "frozen_lake"
    prompt = PROMPTS["plan_trace"]

    def dataset(self, split: str, form: str = "trace") -> Dataset:
        """The samples of a split in one form; see [`~ilvr.tasks.Task.dataset`].

        Raises:
            ValueError: for an unknown form, and for tests in the form `base`.
        """
        tasks = {"trace": ["plan_trace"], "answer": ["plan"], "base": self.base_tasks}
        if form not in tasks or (form == "base" and split == "test"):
            raise ValueError(f"There is no form {form!r} of the split {split!r}; choose trace or answer.")
        maps = self.test_maps if split == "test" else self.base_maps if form == "base" else self.maps
        return frozen_lake_dataset(maps, tasks=tasks[form], split=split, seed=self.seed)

    def texts(self) -> list[str]:
        return vocabulary()

    def reference(self, sample: dict[str, Any]) -> list[str]:
        """The board, on which the metric walks the plan."""
        return list(board_of(sample).rows)

    def group(self, sample: dict[str, Any]) -> str:
        size = board_of(sample).size
        return f"{size}x{size}"

    def draw(self, sample: dict[str, Any], answer: str) -> list[tuple[str, Image.Image]]:
        """The board after each move that the trace says."""
        board = board_of(sample)
        cell, pictures = board.start, []
        for move in (letter for letter in answer.split("\\boxed")[0] if letter in MOVES):
            cell = board.step(cell, move)
            pictures.append((f"after {move}", render_board(board, cell, move)))
        return pictures
