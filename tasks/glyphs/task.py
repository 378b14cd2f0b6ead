"""Glyphs as a task: which boards, with how many moves of which kinds, in which form."""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from PIL import Image

from ilvr.tasks.cells import all_cells
from ilvr.tasks.forms import check_form, check_latent_size
from ilvr.tasks.generation import generate_dataset
from ilvr.tasks.task import Task

from .board import KINDS, TOUCH, WAYS, WEIGHTS, sample_board, sample_moves
from .conversations import (
    alphabet,
    base_conversation,
    board_of,
    conversation,
    question_of,
    vocabulary,
)
from .rendering import render_glyph_board


CONVERSATION_SETTINGS = ("word_bits", "short_word_bits", "state_of", "tell_first", "latent_size")


@dataclass
class Glyphs(Task):
    """Following a tile and the dots on it through swaps, turns, flips, stamps, prints and erasures.

    **What training is told.** `selection_method="answer_gradient"` asks of each helper image what is on the tile that
    is followed, and names the place where it then is: each row's `helper_questions`. So the *place* is a label, which
    the world knows, in training; the pattern there is what the model itself sees, and no question says it. At
    inference nothing is named but the tile's place at first. An answer has 4 tokens more than a pattern has bits: set
    `max_helper_answer_tokens` to that.

    Args:
        boards (`int`), test_boards (`int`): training and test samples, a board each.
        base_boards (`int`, *optional*, defaults to 0): boards that a small backbone learns to see on.
        size (`int`, *optional*, defaults to 4): of a board, 1 to 5; one tile can be turned and flipped only.
        side (`int`, *optional*, defaults to 3): of a pattern, in dots, 2 to 5.
        word_bits (`int`, *optional*, defaults to 1): of a pattern that a word says, in answers and in `text`; as many
            as `side` is a letter for each row. In `text_equal` a word says as many as it takes to say the pattern in
            K + 2 words.
        lengths (`tuple[int, int]`, *optional*, defaults to `(4, 8)`): fewest and most moves of a training sample.
        test_lengths (`tuple[int, int]`, *optional*, defaults to `lengths`): and of a test.
        weights (`Mapping[str, float]`, *optional*, defaults to swap 0.15, turn 0.15, flip 0.15, stamp 0.55):
            How often each kind of move is drawn, `print` and `erase` among them; those left out never. At six moves
            the defaults leave at most 53.5 % to answers without serial work (4,000 episodes, seed 0, see `floors.py`).
        touch (`float`, *optional*, defaults to 0.6): share of moves of the followed tile; the others are of one next
            to it.
        state_of (`str`, *optional*, defaults to `"followed"`): whose pattern a step tells, by latents or in words: of
            the tile that is `"followed"`, or of the one that the move `"moved"`. The first leaves it to the model to
            keep what moves do to tiles whose dots are taken.
        tell_first (`bool`, *optional*, defaults to `False`): whether a step 0 tells the followed tile, whatever
            `state_of` says, as it is in the picture. With it a question may have no moves.
        base_tiles (`int`, *optional*, defaults to 4): tiles of a picture that a small backbone is asked about.
        base_moves (`tuple[int, ...]`, *optional*, defaults to `(1, 1, 2)`): and moves of each question to do at once.
        latent_size (`int`, *optional*, defaults to 1): the model's; `text_equal` and `pads` are as long as its spans.
        seed (`int`, *optional*, defaults to 0): fixes boards, splits and moves.

    Raises:
        ValueError: if there are no such boards, lengths, weights or shares.
    """

    boards: int
    test_boards: int
    base_boards: int = 0
    size: int = 4
    side: int = 3
    word_bits: int = 1
    lengths: tuple[int, int] = (4, 8)
    test_lengths: tuple[int, int] | None = None
    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    touch: float = TOUCH
    state_of: str = "followed"
    tell_first: bool = False
    base_tiles: int = 4
    base_moves: tuple[int, ...] = (1, 1, 2)
    latent_size: int = 1
    seed: int = 0

    title = "Glyphs"
    metric = "glyphs"
    prompt = question_of((1, 2), ["swap b z b y", "stamp b y a y", "turn b y right"], "trace")

    def __post_init__(self) -> None:
        self.test_lengths = self.test_lengths or self.lengths
        if not 1 <= self.size <= 5 or not 2 <= self.side <= 5 or not 0 <= self.touch <= 1:
            raise ValueError(
                "Boards of glyphs have size 1 to 5, patterns side 2 to 5, and touch is a share, got size "
                f"{self.size}, side {self.side}, touch {self.touch}."
            )
        fewest = 0 if self.tell_first else 1
        for name in ("lengths", "test_lengths"):
            values = getattr(self, name)
            if len(values) != 2 or not fewest <= values[0] <= values[1]:
                raise ValueError(
                    f"{name} must be a fewest and a most number of moves, from {fewest} on, got {values}."
                )
        if set(self.weights) - set(KINDS) or min(self.weights.values(), default=0) < 0 or not self._total() > 0:
            raise ValueError(f"weights must name some of {', '.join(KINDS)}, not all 0, got {self.weights}.")
        needs_neighbours = self.touch < 1 or any(self.weights.get(kind) for kind in set(KINDS) - set(WAYS))
        if self.size == 1 and needs_neighbours:
            raise ValueError(
                f"A board of one tile has no neighbours: keep to {' and '.join(WAYS)} in weights and set touch to 1, "
                f"got {self.weights} and {self.touch}."
            )
        if self.state_of not in ("followed", "moved"):
            raise ValueError(f"state_of must be 'followed' or 'moved', got {self.state_of!r}.")
        check_latent_size(self.latent_size)

    def _total(self) -> float:
        return sum(self.weights.values())

    def dataset(self, split: str, form: str = "trace") -> Dataset:
        """The samples of a split in one form; see [`~ilvr.tasks.Task.dataset`].

        Raises:
            ValueError: for an unknown split or form, and for tests in the form `base`.
        """
        check_form(split, form)
        return generate_dataset(_rows, split, {"task": self, "split": split, "form": form})

    @property
    def short_word_bits(self) -> int:
        """Of the words of `text_equal`: a pattern in K + 2 of them."""
        return -(-(self.side**2) // (self.latent_size + 2))

    def texts(self) -> list[str]:
        words = {word: None for bits in (self.word_bits, self.short_word_bits) for word in alphabet(bits)}
        most_moves = max(self.lengths[1], (self.test_lengths or self.lengths)[1], *self.base_moves)
        return vocabulary(self.size, most_moves, list(words))

    def donor_reference(self, sample: dict[str, Any], donor: dict[str, Any]) -> str | None:
        """What the donor's last span tells, if that of the sample tells its answer."""
        own = json.loads(sample["metadata"])
        return json.loads(donor["metadata"])["last_told"] if own["tells_answer"] else None

    def followed_patches(self, sample: dict[str, Any]) -> list[int]:
        """The tile whose state each step tells, in raster order; a patch is as large as a tile."""
        return json.loads(sample["metadata"])["followed"]

    def group(self, sample: dict[str, Any]) -> str:
        return f"{len(json.loads(sample['metadata'])['moves'])} moves"

    def draw(self, sample: dict[str, Any], answer: str) -> list[tuple[str, Image.Image]]:
        """The board after each move, and before them if a step tells it."""
        metadata = json.loads(sample["metadata"])
        board = board_of(metadata)
        pictures = [("at first", render_glyph_board(board))] if self.tell_first else []
        for move in metadata["moves"]:
            board = board.move(move)
            pictures.append((f"after {move}", render_glyph_board(board)))
        return pictures


def _rows(task: Glyphs, split: str, form: str) -> Iterator[dict[str, Any]]:
    is_base = form == "base"
    lengths = (split == "test" and task.test_lengths) or task.lengths
    number = task.test_boards if split == "test" else task.base_boards if is_base else task.boards
    draw = partial(sample_moves, weights=task.weights, touch=task.touch)
    for i in range(number):
        # The forms ask the same questions: what is drawn depends on the split alone.
        rng = random.Random(f"{task.seed}-{'base' if is_base else 'follow'}-{split}-{i}")
        board = sample_board(rng, task.size, task.side, split, task.seed)
        if is_base:
            cells = rng.sample(all_cells(task.size), task.base_tiles)
            questions = [draw(rng, board, n) for n in task.base_moves]
            yield base_conversation(board, cells, questions, word_bits=task.word_bits)
        else:
            steps = draw(rng, board, rng.randint(*lengths))
            settings = {name: getattr(task, name) for name in CONVERSATION_SETTINGS}
            yield conversation(board, steps, form, **settings)
