"""FrozenLake planning as a task: which maps, in which form, are trained and tested on."""

import json
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from PIL import Image

from ilvr.tasks.forms import check_form, check_latent_size
from ilvr.tasks.task import Task

from .board import MAX_SIZE, MOVES, FrozenLakeMap
from .conversations import PROMPTS, WALKS, frozen_lake_dataset, vocabulary
from .rendering import render_board


def board_of(sample: dict[str, Any]) -> FrozenLakeMap:
    """The map that a sample is about."""
    return FrozenLakeMap(tuple(json.loads(sample["metadata"])["board"]))


@dataclass
class FrozenLake(Task):
    """Planning a path to the goal, or telling what a plan leads to; helper images show the board after each move.

    Args:
        maps (`dict[int, int]`): training maps for each size of board, 3 to 8.
        test_maps (`dict[int, int]`): test maps for each size of board.
        base_maps (`dict[int, int]`, *optional*): maps that a small backbone learns to see on.
        base_tasks (`list[str]`, *optional*): what it is asked about them, see [`~conversations.conversation`]; with
            `where`, or `where+describe`, it learns to answer the helper question.
        question (`str`, *optional*, defaults to `"plan"`): or `"outcome"`, whether a given plan reaches the goal,
            falls into a hole or does neither.
        latent_size (`int`, *optional*, defaults to 1): the model's; `text_equal` and `pads` are as long as its spans.
        seed (`int`, *optional*, defaults to 0): fixes maps, splits and traces.

    Raises:
        ValueError: for other sizes and questions.
    """

    maps: dict[int, int]
    test_maps: dict[int, int]
    base_maps: dict[int, int] = field(default_factory=dict)
    base_tasks: list[str] = field(default_factory=list)
    question: str = "plan"
    latent_size: int = 1
    seed: int = 0

    title = "FrozenLake planning"
    metric = "frozen_lake"
    prompt = PROMPTS["plan_trace"]
    helper_question = PROMPTS["where"]

    def __post_init__(self) -> None:
        for name in ("maps", "test_maps", "base_maps"):
            sizes = [int(size) for size in getattr(self, name)]
            if not all(3 <= size <= MAX_SIZE for size in sizes):
                raise ValueError(f"{name} are for boards of size 3 to {MAX_SIZE}, got sizes {sizes}.")
        if self.question not in WALKS:
            raise ValueError(f"question must be 'plan' or 'outcome', got {self.question!r}.")
        check_latent_size(self.latent_size)
        if self.question == "outcome":
            self.title, self.metric = "FrozenLake outcomes", "boxed_exact_match"
            self.prompt = PROMPTS["outcome"].format(plan="R R D")

    def dataset(self, split: str, form: str = "trace") -> Dataset:
        """The samples of a split in one form; see [`~ilvr.tasks.Task.dataset`].

        Raises:
            ValueError: for an unknown split or form, and for tests in the form `base`.
        """
        check_form(split, form)
        maps = self.test_maps if split == "test" else self.base_maps if form == "base" else self.maps
        tasks = self.base_tasks if form == "base" else [WALKS[self.question][form]]
        return frozen_lake_dataset(maps, tasks=tasks, split=split, seed=self.seed, latent_size=self.latent_size)

    def texts(self) -> list[str]:
        return vocabulary()

    def reference(self, sample: dict[str, Any]) -> list[str] | str:
        """The board, on which the metric walks the plan; of an outcome, the answer."""
        return list(board_of(sample).rows) if self.question == "plan" else sample["answer"]

    def followed_patches(self, sample: dict[str, Any]) -> list[int]:
        """The player's cell after each move, in raster order; a patch is as large as a cell."""
        return json.loads(sample["metadata"])["followed"]

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
