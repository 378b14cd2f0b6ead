"""Boards of tiles with dot patterns, what moves do to them, and the drawing of moves.

The state of a tile is bits that have no name, nine or more, so it is dear to write; and what a stamp, a print or an
erasure does depends on what moves have made of another tile, so it cannot be read off the first picture.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

from ilvr.tasks.cells import Cell, all_cells, cell_name, cell_of, patch_of


OFFSETS = ((0, -1), (0, 1), (-1, 0), (1, 0))  # of neighbours: rows down, columns to the right
WAYS = {
    "turn": ("left", "right"),  # by a quarter
    "flip": ("sideways", "over"),  # which sides change places: left and right, top and bottom
}
KINDS = ("swap", *WAYS, "stamp", "print", "erase")  # of moves; those without ways name a neighbour
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

    def neighbours(self, cell: Cell) -> list[Cell]:
        """The cells next to a cell."""
        cells = [(cell[0] + down, cell[1] + right) for down, right in OFFSETS]
        return [near for near in cells if all(0 <= place < self.size for place in near)]

    def move(self, move: str) -> "GlyphBoard":
        """The board after a move.

        Args:
            move (`str`): kind, tile and argument: `"swap b y b x"` (two neighbours change places), `"turn b y right"`
                (by a quarter), `"flip b y over"` (top and bottom change places), or one that takes the dots of a
                neighbour: where a y has a dot, b y loses or gets one (`"stamp b y a y"`), gets one that it lacks
                (`"print b y a y"`) or loses one that it has (`"erase b y a y"`).

        Raises:
            ValueError: if the board has no such move.
        """
        if move not in all_moves(self.size):
            raise ValueError(f"A {self.size}x{self.size} board has no move {move!r}; one is 'turn a x left'.")
        kind, cell, argument = parse_move(move)
        other = cell if kind in WAYS else cell_of(argument)
        if kind == "swap":
            followed = {cell: other, other: cell}.get(self.followed, self.followed)
            return replace(self._with({cell: self[other], other: self[cell]}), followed=followed)
        return self._with({cell: changed(self[cell], kind, argument, self[other])})

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
    kind, row, column, *argument = move.split()
    return kind, cell_of(f"{row} {column}"), " ".join(argument)


@cache
def all_moves(size: int) -> frozenset[str]:
    """The moves of a board. A swap has two names, one from each of its tiles."""
    board = GlyphBoard(("0",) * size**2, (0, 0))
    return frozenset(
        f"{kind} {cell_name(cell)} {argument}"
        for cell in all_cells(size)
        for kind in KINDS
        for argument in WAYS.get(kind) or map(cell_name, board.neighbours(cell))
    )


def turned(pattern: str, way: str) -> str:
    """A pattern turned by a quarter, `left` or `right`."""
    columns = ["".join(column) for column in zip(*rows_of(pattern))]
    return "".join(reversed(columns) if way == "left" else (column[::-1] for column in columns))


def flipped(pattern: str, way: str) -> str:
    """A pattern with left and right (`sideways`) or top and bottom (`over`) changed."""
    rows = rows_of(pattern)
    return "".join(reversed(rows) if way == "over" else (row[::-1] for row in rows))


def changed(pattern: str, kind: str, argument: str, other: str) -> str:
    """A pattern after a move that is no swap.

    Args:
        pattern (`str`): before it.
        kind (`str`), argument (`str`): of the move.
        other (`str`): the pattern of the neighbour that it names; turns and flips do not look at it.
    """
    if kind in WAYS:
        return (turned if kind == "turn" else flipped)(pattern, argument)
    becomes = {"stamp": "10", "print": "11", "erase": "00"}[kind]  # what 0 and 1 are where the neighbour has a dot
    return "".join(becomes[int(bit)] if dot == "1" else bit for bit, dot in zip(pattern, other))


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
            come from. A stamp, a print or an erasure comes from a tile that moves have changed, if one is near.
    """
    steps, unchanged = [], board  # `unchanged`: each tile where it is now, with the pattern that it had at first
    kinds = list(weights)
    for _ in range(number):
        kind = rng.choices(kinds, [weights[name] for name in kinds])[0]
        cell = board.followed if rng.random() < touch else rng.choice(board.neighbours(board.followed))
        if kind in WAYS:
            argument = rng.choice(WAYS[kind])
        else:
            others = board.neighbours(cell)
            altered = [other for other in others if board[other] != unchanged[other]]
            argument = cell_name(rng.choice(altered if kind != "swap" and altered else others))
        move = f"{kind} {cell_name(cell)} {argument}"
        board = board.move(move)
        unchanged = unchanged.move(move) if kind == "swap" else unchanged
        steps.append((move, board))
    return steps
