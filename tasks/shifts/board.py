"""Boards whose rows and columns move round, with a player on them.

A shift is a permutation of the cells: nothing is forgotten, and what it does to the player depends on where the player
is. So the shifts have to be taken one after the other; there is no shortcut through the last few.
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from ilvr.tasks.cells import Cell, cell_name, column_names, row_names


TILES = "FFHHG"  # what a cell is drawn from: frozen, hole, goal
SPLIT_PERCENT = {"test": 20, "train": 80}


@dataclass(frozen=True)
class ShiftBoard:
    """A square board and where its player is.

    Args:
        rows (`tuple[str, ...]`): one string a row, of `F` (frozen), `H` (hole) and `G` (goal).
        player (`tuple[int, int]`): row and column.
    """

    rows: tuple[str, ...]
    player: Cell

    @property
    def size(self) -> int:
        return len(self.rows)

    def shift(self, shift: str) -> "ShiftBoard":
        """The board after a shift such as `"b L"`, row b left, or `"x D"`, column x down; the player moves with it.

        Raises:
            ValueError: if the board has no such shift.
        """
        if shift not in all_shifts(self.size):
            raise ValueError(
                f"A {self.size}x{self.size} board has no shift {shift!r}; its shifts are {all_shifts(self.size)}."
            )
        line, direction = shift.split()
        by = 1 if direction in "RD" else -1
        if direction in "LR":
            return self._shift_row(row_names(self.size).index(line), by)
        turned = ShiftBoard(_transposed(self.rows), self.player[::-1])
        turned = turned._shift_row(column_names(self.size).index(line), by)
        return ShiftBoard(_transposed(turned.rows), turned.player[::-1])

    def after(self, shifts: Iterable[str]) -> list["ShiftBoard"]:
        """The board after each of some shifts, one after the other."""
        return list(accumulate(shifts, ShiftBoard.shift, initial=self))[1:]

    def _shift_row(self, number: int, by: int) -> "ShiftBoard":
        rows = list(self.rows)
        rows[number] = "".join(rows[number][(column - by) % self.size] for column in range(self.size))
        row, column = self.player
        return ShiftBoard(tuple(rows), (row, (column + by) % self.size) if row == number else self.player)

    def split(self, seed: int) -> str:
        """The split, `train` or `test`, of boards with these rows under `seed`, wherever the player is."""
        digest = hashlib.sha256(f"{seed}:{'/'.join(self.rows)}".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 100 < SPLIT_PERCENT["test"] else "train"


def all_shifts(size: int) -> list[str]:
    """The shifts of a board: each row left and right, each column up and down."""
    rows = [f"{row} {direction}" for row in row_names(size) for direction in "LR"]
    return rows + [f"{column} {direction}" for column in column_names(size) for direction in "UD"]


def sample_board(rng: random.Random, size: int, split: str, seed: int) -> ShiftBoard:
    """A board of a split, each cell and the player's place drawn by `rng`."""
    while True:
        rows = tuple("".join(rng.choice(TILES) for _ in range(size)) for _ in range(size))
        board = ShiftBoard(rows, (rng.randrange(size), rng.randrange(size)))
        if board.split(seed) == split:
            return board


def sample_shifts(rng: random.Random, board: ShiftBoard, number: int, touch: float) -> list[str]:
    """Shifts one after the other; a share `touch` of them is drawn from those that move the player."""
    drawn = []
    for _ in range(number):
        row, column = cell_name(board.player).split()
        shifts = all_shifts(board.size)
        if rng.random() < touch:
            shifts = [shift for shift in shifts if shift[0] in (row, column)]
        drawn.append(rng.choice(shifts))
        board = board.shift(drawn[-1])
    return drawn


def _transposed(rows: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("".join(column) for column in zip(*rows))
