"""Boards of tiles with dot patterns, what moves do to them, and the drawing of moves.

The state of a tile is bits that have no name, nine or more, so it is dear to write; and what a stamp does depends on
what moves have made of another tile, so it cannot be read off the first picture.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

from ilvr.tasks.cells import Cell, all_cells, cell_name, cell_of, patch_of


DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
ARGUMENTS = {
    "swap": tuple(DIRECTIONS),  # with which neighbour
    "turn": ("left", "right"),  # by a quarter
    "flip": ("sideways", "over"),  # which sides change places: left and right, top and bottom
    "stamp": tuple(DIRECTIONS),  # of which neighbour
}
# So that the largest floor stays below 60 % at six moves, see `floors.py`.
WEIGHTS = {"swap": 0.15, "turn": 0.15, "flip": 0.15, "stamp": 0.55}
TOUCH = 0.6
SPLIT_PERCENT = {"test": 20, "train": 80}


@dataclass(frozen=True)
class GlyphBoard:
    """A square board of tiles, one of which is followed.

    Args:
        tiles (`tuple[str, ...]`): the patterns in raster order, each a square of bits in raster order, such as
            `"010111010"`.
        followed (`tuple[int, int]`): row and column of the tile that is followed.
    """

    tiles: tuple[str, ...]
    followed: Cell

    @property
    def size(self) -> int:
        return isqrt(len(self.tiles))

    def __getitem__(self, cell: Cell) -> str:
        return self.tiles[patch_of(cell, self.size)]

    def neighbours(self, cell: Cell) -> dict[str, Cell]:
        """The cells next to a cell, by direction."""
        cells = {name: (cell[0] + down, cell[1] + right) for name, (down, right) in DIRECTIONS.items()}
        return {name: near for name, near in cells.items() if all(0 <= place < self.size for place in near)}

    def move(self, move: str) -> "GlyphBoard":
        """The board after a move.

        Args:
            move (`str`): kind, tile and argument: `"swap b y left"` (the tiles at b y and to its left change places),
                `"turn b y right"` (by a quarter), `"flip b y over"` (top and bottom change places) or `"stamp b y up"`
                (where the pattern above b y has a dot, that of b y loses or gets one).

        Raises:
            ValueError: if the board has no such move.
        """
        if move not in all_moves(self.size):
            raise ValueError(f"A {self.size}x{self.size} board has no move {move!r}; one is 'swap a x right'.")
        kind, cell, argument = parse_move(move)
        if kind == "swap":
            other = self.neighbours(cell)[argument]
            followed = {cell: other, other: cell}.get(self.followed, self.followed)
            return replace(self._with({cell: self[other], other: self[cell]}), followed=followed)
        if kind == "stamp":
            return self._with({cell: stamped(self[cell], self[self.neighbours(cell)[argument]])})
        return self._with({cell: (turned if kind == "turn" else flipped)(self[cell], argument)})

    def _with(self, patterns: dict[Cell, str]) -> "GlyphBoard":
        tiles = list(self.tiles)
        for cell, pattern in patterns.items():
            tiles[patch_of(cell, self.size)] = pattern
        return replace(self, tiles=tuple(tiles))

    def split(self, seed: int) -> str:
        """The split, `train` or `test`, of boards with these tiles under `seed`, whichever is followed."""
        digest = hashlib.sha256(f"{seed}:{'/'.join(self.tiles)}".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 100 < SPLIT_PERCENT["test"] else "train"


def parse_move(move: str) -> tuple[str, Cell, str]:
    """Kind, cell and argument of a move."""
    kind, row, column, argument = move.split()
    return kind, cell_of(f"{row} {column}"), argument


@cache
def all_moves(size: int) -> frozenset[str]:
    """The moves of a board. A swap has two names, one from each of its tiles."""
    board = GlyphBoard(("0",) * size**2, (0, 0))
    return frozenset(
        f"{kind} {cell_name(cell)} {argument}"
        for cell in all_cells(size)
        for kind, arguments in ARGUMENTS.items()
        for argument in (board.neighbours(cell) if kind in ("swap", "stamp") else arguments)
    )


def turned(pattern: str, way: str) -> str:
    """A pattern turned by a quarter, `left` or `right`."""
    columns = ["".join(column) for column in zip(*rows_of(pattern))]
    return "".join(reversed(columns) if way == "left" else (column[::-1] for column in columns))


def flipped(pattern: str, way: str) -> str:
    """A pattern with left and right (`sideways`) or top and bottom (`over`) changed."""
    rows = rows_of(pattern)
    return "".join(reversed(rows) if way == "over" else (row[::-1] for row in rows))


def stamped(pattern: str, stamp: str) -> str:
    """The exclusive or of two patterns."""
    return "".join("01"[one != other] for one, other in zip(pattern, stamp))


def rows_of(pattern: str) -> list[str]:
    """The rows of a pattern."""
    side = isqrt(len(pattern))
    return [pattern[start : start + side] for start in range(0, len(pattern), side)]


def sample_board(rng: random.Random, size: int, side: int, split: str, seed: int) -> GlyphBoard:
    """A board of a split, with patterns of `side` x `side` dots; each dot, and the tile that is followed, drawn by
    `rng`."""
    while True:
        tiles = tuple(f"{rng.getrandbits(side**2):0{side**2}b}" for _ in range(size**2))
        board = GlyphBoard(tiles, (rng.randrange(size), rng.randrange(size)))
        if board.split(seed) == split:
            return board


def sample_moves(
    rng: random.Random, board: GlyphBoard, number: int, *, weights: Mapping[str, float], touch: float
) -> list[tuple[str, GlyphBoard]]:
    """Moves with the board after each.

    Args:
        rng (`random.Random`): draws.
        board (`GlyphBoard`): before the first move.
        number (`int`): of moves.
        weights (`Mapping[str, float]`): how often each kind of move is drawn.
        touch (`float`): share of moves of the followed tile. The others are of one next to it, which a later stamp may
            come from. A stamp comes from a tile that moves have changed, if one is near.
    """
    steps, unchanged = [], board  # `unchanged`: each tile where it is now, with the pattern that it had at first
    kinds = list(weights)
    for _ in range(number):
        kind = rng.choices(kinds, [weights[name] for name in kinds])[0]
        near = list(board.neighbours(board.followed).values())
        cell = board.followed if rng.random() < touch else rng.choice(near)
        arguments = list(ARGUMENTS[kind])
        if kind in ("swap", "stamp"):
            others = board.neighbours(cell)
            changed = [way for way, other in others.items() if board[other] != unchanged[other]]
            arguments = changed if kind == "stamp" and changed else list(others)
        move = f"{kind} {cell_name(cell)} {rng.choice(arguments)}"
        board = board.move(move)
        unchanged = unchanged.move(move) if kind == "swap" else unchanged
        steps.append((move, board))
    return steps
