"""FrozenLake tasks as conversations in TRL's vision format: `messages` with content parts, `images` in their order.

An image in the assistant's turn is a helper image: the board after a move.
"""

import random
from collections.abc import Iterator
from typing import Any, cast

from datasets import Dataset, NamedSplit

from ilvr.data.conversations import FEATURES, ConversationBuilder
from ilvr.tasks.images import as_png

from .board import HOLE, MAX_SIZE, MOVES, FrozenLakeMap, sample_maps
from .rendering import render_board


OUTCOMES = {"goal": "A", "hole": "B", "neither": "C"}
PROMPTS = {
    "describe": "Describe the board.",
    "distances": "How far is each cell from the goal?",
    "moves": "What is the best move from each cell?",
    "plan": "Plan a path to the goal. Answer directly.",
    "plan_trace": "Plan a path to the goal. Think step by step.",
    "outcome": "Does this plan reach the goal (A), fall into a hole (B) or neither (C)? Plan: {plan}",
}


def vocabulary() -> list[str]:
    """Texts that hold every word of the tasks, to train a tokenizer on."""
    cells = "\n".join(f"{a} {b}\n{b}" for letters in ("SFHG", "UDLR-") for a in letters for b in letters)
    numbers = "\n".join(f"{n} {n}\n{n}" for n in range(MAX_SIZE**2 // 2))
    moves = " ".join(f"\\boxed{{{a} {b}}}" for a in MOVES for b in MOVES)
    return [*PROMPTS.values(), cells, numbers, moves, "\\boxed{A} \\boxed{B} \\boxed{C}"]


def conversation(board: FrozenLakeMap, task: str, rng: random.Random) -> dict[str, Any]:
    """One sample about one board.

    Args:
        board (`FrozenLakeMap`): the map; its goal can be reached.
        task (`str`): `describe` (the letters of the cells), `distances` (moves to the goal from each cell), `moves`
            (a best move from each cell), `plan` (a shortest path, answered directly), `plan_trace` (the same, with the
            board after each move as helper image) or `outcome` (what a given plan leads to, likewise with helper
            images). Several, joined by `+`, are asked one after the other about the same picture.
        rng (`random.Random`): breaks ties between shortest paths and draws the plans of `outcome`.

    Returns:
        `dict` with the columns of `FEATURES`; `answer` is that of the last question, `metadata` holds task and board.
    """
    builder = ConversationBuilder(cast(Any, as_png))  # images are here, not located
    for number, name in enumerate(task.split("+")):
        if name not in PROMPTS:
            raise ValueError(f"Unknown FrozenLake task {name!r}; choose from {list(PROMPTS)}.")
        plan, outcome = _plan_with_outcome(board, rng) if name == "outcome" else ("", "")
        builder.add_turn("user", name)
        if number == 0:
            builder.add_image(render_board(board), "board")
        builder.add_text(PROMPTS[name].format(plan=" ".join(plan)), name)
        builder.add_turn("assistant", name)
        if name == "outcome":
            _append_walk(builder, board, plan)
            answer = OUTCOMES[outcome]
            builder.add_text(f"\\boxed{{{answer}}}", name)
        elif name in ("plan", "plan_trace"):
            plan = board.shortest_path(rng)
            if name == "plan_trace":
                _append_walk(builder, board, plan)
            answer = " ".join(plan)
            builder.add_text(f"\\boxed{{{answer}}}", name)
        else:
            answer = _cells(board, name, rng)
            builder.add_text(answer, name)
    return builder.finish({"task": task, "board": list(board.rows)}, set(), answer)


def _cells(board: FrozenLakeMap, task: str, rng: random.Random) -> str:
    """What is asked about each cell, a line for each row."""
    say = {
        "describe": lambda cell: board[cell],
        "distances": lambda cell: str(board.distances.get(cell, "-")),
        "moves": lambda cell: rng.choice(board.best_moves(cell) or ["-"]),
    }[task]
    return "\n".join(" ".join(say((r, c)) for c in range(board.size)) for r in range(board.size))


def _append_walk(builder: ConversationBuilder, board: FrozenLakeMap, plan: str):
    for move, cell in zip(plan, board.walk(plan)[1:]):
        builder.add_text(f" {move}", "move")  # the token that the answer has
        builder.add_image(render_board(board, cell, move), "move")


def _plan_with_outcome(board: FrozenLakeMap, rng: random.Random) -> tuple[str, str]:
    """A plan whose outcome is drawn first, so that the three are about equally frequent."""
    wanted = rng.choice(["goal", "hole", "neither"])
    if wanted == "goal":
        return board.shortest_path(rng), wanted
    length = rng.randint(1, 2 * board.size)
    for _ in range(100):
        plan, cell = "", board.start
        while len(plan) < length and board[cell] != HOLE and cell != board.goal:
            plan += rng.choice(list(MOVES))
            cell = board.step(cell, plan[-1])
        if (board[cell] == HOLE) == (wanted == "hole") and cell != board.goal:
            return plan, wanted
    return board.shortest_path(rng)[:-1], "neither"  # a board without a hole in reach


def frozen_lake_dataset(
    maps_per_size: dict[int, int],
    *,
    tasks: list[str],
    split: str,
    seed: int = 0,
    max_hole_fraction: float = 0.4,
    max_plan_length: int | None = None,
) -> Dataset:
    """A FrozenLake data set, fixed by its arguments; splits are disjoint as maps, under the 8 symmetries as well.

    Args:
        maps_per_size (`dict[int, int]`): number of distinct maps for each board size, 3 to 8.
        tasks (`list[str]`): one sample of each task for each map, see [`conversation`].
        split (`str`): `train`, `validation` or `test`.
        seed (`int`, *optional*, defaults to 0): fixes maps, splits and traces.
        max_hole_fraction (`float`, *optional*, defaults to 0.4): most holes, as a share of the cells. VSP's training
            maps have at most 0.2, which leaves 3x3 boards a single hole and too few maps to hold 500 out.
        max_plan_length (`int`, *optional*): leaves out maps whose goal is further away, for a curriculum.

    Returns:
        `datasets.Dataset` with `messages`, `images` (encoded), `answer` and `metadata`.

    Raises:
        ValueError: for an unknown task or split, and if there are fewer distinct maps than asked for.
    """
    arguments = {
        "maps_per_size": {int(size): number for size, number in maps_per_size.items()},
        "tasks": tuple(tasks),  # `datasets` would take a list for shards and split it
        "split": split,
        "seed": seed,
        "max_hole_fraction": max_hole_fraction,
        "max_plan_length": max_plan_length,
    }
    return Dataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments, split=NamedSplit(split))


def _generate(
    maps_per_size: dict[int, int],
    tasks: tuple[str, ...],
    split: str,
    seed: int,
    max_hole_fraction: float,
    max_plan_length: int | None,
) -> Iterator[dict[str, Any]]:
    for size, number in maps_per_size.items():
        boards = sample_maps(number, size=size, split=split, seed=seed, max_hole_fraction=max_hole_fraction)
        for index, board in enumerate(boards):
            rng = random.Random(f"{seed}-{split}-{size}-{index}")
            if max_plan_length is None or board.distances[board.start] <= max_plan_length:
                yield from (conversation(board, task, rng) for task in tasks)
