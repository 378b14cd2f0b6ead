"""FrozenLake maps: cells, moves, shortest paths, symmetries, and the sampling of maps into disjoint splits.

Rules (VSP spatial planning, arXiv 2407.01863): a hole ends the walk, leaving the board leaves the player where it is.
"""

import hashlib
import random
from collections import deque
from dataclasses import dataclass
from functools import cached_property


START, GOAL, SAFE, HOLE = "S", "G", "F", "H"
VSP_CODES = {1: START, 2: GOAL, 0: SAFE, -1: HOLE}
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
SPLIT_PERCENT = {"test": 20, "validation": 5, "train": 75}
MAX_SIZE = 8  # gymnasium shrinks the cells of larger boards

Cell = tuple[int, int]


@dataclass(frozen=True)
class FrozenLakeMap:
    """A square board.

    Args:
        rows (`tuple[str, ...]`): one string a row, of `S` (start), `G` (goal), `F` (frozen, safe) and `H` (hole);
            exactly one start and one goal.

    Raises:
        ValueError: if the board is not square, holds another letter, or has not one start and one goal.
    """

    rows: tuple[str, ...]

    def __post_init__(self):
        text = "".join(self.rows)
        if not 2 <= self.size <= MAX_SIZE or any(len(row) != self.size for row in self.rows):
            raise ValueError(
                f"A map must be square with 2 to {MAX_SIZE} rows, got row lengths {[len(r) for r in self.rows]}."
            )
        if set(text) - {START, GOAL, SAFE, HOLE}:
            raise ValueError(f"A map may hold the letters S, G, F and H only, got {self.rows}.")
        if text.count(START) != 1 or text.count(GOAL) != 1:
            raise ValueError(f"A map needs exactly one start S and one goal G, got {self.rows}.")

    @classmethod
    def from_vsp_codes(cls, codes: list[list[int]]) -> "FrozenLakeMap":
        """Builds a map from VSP's integers (1 start, 2 goal, 0 safe, -1 hole)."""
        return cls(tuple("".join(VSP_CODES[code] for code in row) for row in codes))

    @property
    def size(self) -> int:
        return len(self.rows)

    @cached_property
    def start(self) -> Cell:
        return self._find(START)

    @cached_property
    def goal(self) -> Cell:
        return self._find(GOAL)

    def _find(self, letter: str) -> Cell:
        return next((r, row.index(letter)) for r, row in enumerate(self.rows) if letter in row)

    def __getitem__(self, cell: Cell) -> str:
        return self.rows[cell[0]][cell[1]]

    def step(self, cell: Cell, move: str) -> Cell:
        """The cell that `move` (one of `U`, `D`, `L`, `R`) leads to; the same one at the edge of the board."""
        row, column = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
        inside = 0 <= row < self.size and 0 <= column < self.size
        return (row, column) if inside else cell

    def walk(self, plan: str) -> list[Cell]:
        """The cells visited by `plan`, the start first; the walk ends in the first hole."""
        cells = [self.start]
        for move in plan:
            if self[cells[-1]] == HOLE:
                break
            cells.append(self.step(cells[-1], move))
        return cells

    @cached_property
    def distances(self) -> dict[Cell, int]:
        """Number of moves to the goal, for each cell from which it can be reached."""
        found, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            cell = queue.popleft()
            for move in MOVES:
                near = self.step(cell, move)
                if near not in found and self[near] != HOLE:
                    found[near] = found[cell] + 1
                    queue.append(near)
        return found

    def best_moves(self, cell: Cell) -> list[str]:
        """The moves that bring the player closer to the goal; none on the goal or where it is out of reach."""
        distance = self.distances.get(cell)
        if distance is None:
            return []
        return [move for move in MOVES if self.distances.get(self.step(cell, move)) == distance - 1]

    def shortest_path(self, rng: random.Random) -> str:
        """A shortest path from start to goal as letters, ties broken by `rng`."""
        if self.start not in self.distances:
            raise ValueError(f"The goal cannot be reached from the start of {self.rows}.")
        cell, plan = self.start, ""
        while cell != self.goal:
            plan += rng.choice(self.best_moves(cell))
            cell = self.step(cell, plan[-1])
        return plan

    def canonical(self) -> tuple[str, ...]:
        """The same key for the eight boards that are turns and mirror images of each other."""
        images, rows = [], self.rows
        for _ in range(4):
            rows = tuple("".join(column) for column in zip(*rows[::-1]))
            images += [rows, rows[::-1]]
        return min(images)

    def split(self, seed: int) -> str:
        """The split (`train`, `validation` or `test`) that this map belongs to under `seed`, a hash of `canonical`.

        Splits are disjoint by construction, also under the eight symmetries of the square.
        """
        key = f"{seed}:{'/'.join(self.canonical())}".encode()
        percentile = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 100
        for name, percent in SPLIT_PERCENT.items():
            if percentile < percent:
                return name
            percentile -= percent
        raise AssertionError("the percentages of the splits add up to 100")


def sample_map(rng: random.Random, size: int, max_hole_fraction: float) -> FrozenLakeMap:
    """A solvable map with start, goal and 0 to `max_hole_fraction * size**2` holes, each placed uniformly."""
    while True:
        num_holes = rng.randint(0, int(max_hole_fraction * size**2))
        start, goal, *holes = rng.sample(range(size**2), 2 + num_holes)
        cells = [SAFE] * size**2
        cells[start], cells[goal] = START, GOAL
        for hole in holes:
            cells[hole] = HOLE
        board = FrozenLakeMap(tuple("".join(cells[i : i + size]) for i in range(0, size**2, size)))
        if board.start in board.distances:
            return board


def sample_maps(num_maps: int, *, size: int, split: str, seed: int, max_hole_fraction: float) -> list[FrozenLakeMap]:
    """Distinct maps of one split, fixed by `seed`.

    Raises:
        ValueError: if the split is unknown or holds fewer distinct maps of this size than asked for.
    """
    if split not in SPLIT_PERCENT:
        raise ValueError(f"Unknown split {split!r}; choose one of {list(SPLIT_PERCENT)}.")
    rng = random.Random(f"{seed}-{split}-{size}")
    maps: dict[FrozenLakeMap, None] = {}
    tries = 0
    while len(maps) < num_maps:
        board = sample_map(rng, size, max_hole_fraction)
        if board.split(seed) == split:
            maps[board] = None
        tries += 1
        if tries > 1000 + 400 * num_maps:
            raise ValueError(
                f"Found only {len(maps)} of {num_maps} distinct {size}x{size} maps of the {split} split in {tries} "
                f"draws. Ask for fewer maps or raise max_hole_fraction (now {max_hole_fraction})."
            )
    return list(maps)
