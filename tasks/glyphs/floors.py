"""How many answers are right without following the tile through the moves one after the other?

    python -m ilvr.tasks.glyphs.floors --episodes 4000 --seed 0

Each floor knows which tile a move is of, and lacks one part of the work:

| floor | what it does |
|---|---|
| `first_pattern` | says what is on the tile in the picture |
| `order_free` | takes turns, flips, stamps, prints and erasures in this order, of the first patterns |
| `without_stamps` | takes turns and flips in their order, and leaves out what takes dots of another tile |
| `last_two` | takes only the last two moves of the tile; another tile's dots are read off the picture, at its place |
| `stamps_of_places` | takes all moves in their order; another tile's dots are read off the picture, at its place |
| `stamps_of_tiles` | the same, off the tile's first place: all is followed but what moves did to the other tiles |

A model that answers more often than the largest has to do serial work on more than one tile. With the default weights,
4,000 episodes and seed 0, the six are right on 7.2, 30.5, 18.7, 19.2, 46.6 and 53.5 % of the questions of six moves.
"""

import argparse
import json
import random
from typing import NamedTuple

from ilvr.tasks.cells import cell_of

from .board import KINDS, TOUCH, WAYS, WEIGHTS, GlyphBoard, changed, parse_move, sample_board, sample_moves


class Effect(NamedTuple):
    """A move of the followed tile that is no swap, with the first patterns of the neighbour that it names: of the one
    that was at its place at first, and of the tile itself."""

    kind: str
    argument: str
    at_its_place: str
    on_its_tile: str


def effects_on_the_followed(board: GlyphBoard, moves: list[str]) -> list[Effect]:
    """The moves of the followed tile that are no swaps, in their order."""
    first, found = board, []  # `board`: each tile where it is now, as it was at first
    for move in moves:
        kind, cell, argument = parse_move(move)
        if kind == "swap":
            board = board.move(move)
        elif cell == board.followed:
            source = cell if kind in WAYS else cell_of(argument)
            found.append(Effect(kind, argument, first[source], board[source]))
    return found


def floor_answers(board: GlyphBoard, moves: list[str]) -> dict[str, str]:
    """The pattern that each floor gives for a question.

    Args:
        board (`GlyphBoard`): in the picture.
        moves (`list[str]`): that are listed.
    """
    first, effects = board[board.followed], effects_on_the_followed(board, moves)
    sorted_effects = sorted(effects, key=lambda effect: KINDS.index(effect.kind))
    return {
        "first_pattern": first,
        "order_free": _apply(first, sorted_effects, "at_its_place"),
        "without_stamps": _apply(first, [effect for effect in effects if effect.kind in WAYS], "at_its_place"),
        "last_two": _apply(first, effects[-2:], "at_its_place"),
        "stamps_of_places": _apply(first, effects, "at_its_place"),
        "stamps_of_tiles": _apply(first, effects, "on_its_tile"),
    }


def _apply(pattern: str, effects: list[Effect], source: str) -> str:
    for effect in effects:
        pattern = changed(pattern, effect.kind, effect.argument, getattr(effect, source))
    return pattern


def measure_floors(
    number_of_moves: int,
    *,
    episodes: int = 4000,
    seed: int = 0,
    size: int = 4,
    side: int = 3,
    weights: dict[str, float] = WEIGHTS,
    touch: float = TOUCH,
) -> dict[str, tuple[float, float]]:
    """What each floor scores on questions of test boards.

    Args:
        number_of_moves (`int`): of each question, 1 or more.
        episodes (`int`, *optional*, defaults to 4000): questions.
        seed (`int`, *optional*, defaults to 0): of boards and moves.
        size (`int`), side (`int`), weights (`dict`), touch (`float`): as those of [`~glyphs.Glyphs`].

    Returns:
        `dict`: by floor, the share of patterns that are right as a whole, and that of their dots.
    """
    rng, rates = random.Random(f"floors-{seed}"), {}
    for _ in range(episodes):
        board = sample_board(rng, size, side, "test", seed)
        steps = sample_moves(rng, board, number_of_moves, weights=weights, touch=touch)
        end = steps[-1][1]
        right = end[end.followed]
        for name, pattern in floor_answers(board, [move for move, _ in steps]).items():
            whole, dots = rates.get(name, (0.0, 0.0))
            same = sum(one == other for one, other in zip(pattern, right)) / len(right)
            rates[name] = (whole + (same == 1) / episodes, dots + same / episodes)
    return rates


def main() -> None:
    """Prints a table of the floors at several numbers of moves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moves", type=int, nargs="+", default=[2, 4, 6, 8, 10])
    settings = "size, side, weights and touch of the task, as JSON"
    parser.add_argument("--task_settings", type=json.loads, default={}, help=settings)
    options = parser.parse_args()
    given = {"episodes": options.episodes, "seed": options.seed, **options.task_settings}
    columns = [measure_floors(number, **given) for number in options.moves]
    print("| floor | " + " | ".join(f"{number} moves" for number in options.moves) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in columns[0]:
        cells = (f"{100 * whole:.1f} ({100 * dots:.1f})" for whole, dots in (column[name] for column in columns))
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
