"""FrozenLake tasks as conversations in TRL's vision format: `messages` with content parts, `images` in their order.

An image in the assistant's turn is a helper image: the board after a move.
"""

import random
from collections.abc import Iterator
from typing import Any, cast

from datasets import Dataset

from ilvr.data.conversations import ConversationBuilder
from ilvr.tasks.cells import Cell, all_cells, cell_name, patch_of
from ilvr.tasks.forms import FILLER, FORMS, INSTRUCTIONS, add_step
from ilvr.tasks.generation import generate_dataset
from ilvr.tasks.images import as_png

from .board import HOLE, MAX_SIZE, MOVES, FrozenLakeMap, sample_maps
from .rendering import render_board


OUTCOMES = {"goal": "A", "hole": "B", "neither": "C"}
PLAN = "Plan a path to the goal. "
OUTCOME = "Does this plan reach the goal (A), fall into a hole (B) or neither (C)? Plan: {plan}"
# The names of questions about a walk in each form; what has no ending is the oldest form of each.
WALKS = {
    "plan": {form: "plan" if form == "answer" else f"plan_{form}" for form in FORMS},
    "outcome": {form: "outcome" if form == "trace" else f"outcome_{form}" for form in FORMS},
}
PROMPTS = {
    "where": "Where is the player?",
    "describe": "Describe the board.",
    "distances": "How far is each cell from the goal?",
    "moves": "What is the best move from each cell?",
    **{name: PLAN + INSTRUCTIONS[form] for form, name in WALKS["plan"].items()},
    **{name: f"{OUTCOME}. {INSTRUCTIONS[form]}" for form, name in WALKS["outcome"].items()},
    "outcome": OUTCOME,
}


def vocabulary() -> list[str]:
    """Texts that hold every word of the tasks, to train a tokenizer on."""
    letters = "\n".join(f"{a} {b}\n{b}" for letters in ("SFHG", "UDLR-") for a in letters for b in letters)
    numbers = "\n".join(f"{n} {n}\n{n}" for n in range(MAX_SIZE**2 // 2))
    moves = " ".join(f"\\boxed{{{a} {b}}}" for a in MOVES for b in MOVES)
    cells = " ".join(f" {cell_name(cell)} \\boxed{{{cell_name(cell)}}}" for cell in all_cells(MAX_SIZE))
    return [*PROMPTS.values(), letters, numbers, moves, cells, FILLER * 8, "\\boxed{A} \\boxed{B} \\boxed{C}"]


def conversation(board: FrozenLakeMap, task: str, rng: random.Random, *, latent_size: int = 1) -> dict[str, Any]:
    """One sample about one board.

    Args:
        board (`FrozenLakeMap`): the map; its goal can be reached.
        task (`str`): `where` (the player's cell; the picture has the player on any), `describe` (the letters of the
            cells), `distances` (moves to the goal from each cell), `moves` (a best move from each cell), `plan` (a
            shortest path, answered directly), `plan_trace` (the same, with the board after each move as helper image)
            or `outcome` (what a given plan leads to, likewise with helper images). The two questions about a walk have
            all forms of `ilvr.tasks.forms`, such as `plan_text` and `outcome_answer`. Several, joined by `+`, are
            asked one after the other about the same picture.
        rng (`random.Random`): breaks ties between shortest paths, places players and draws the plans of `outcome`.
        latent_size (`int`, *optional*, defaults to 1): latents of a span, see [`~ilvr.tasks.forms.add_step`].

    Returns:
        `dict` with the columns of `FEATURES`; `answer` is that of the last question, `metadata` holds task, board and
        `followed`, the patch of the player after each move of all walks.

    Raises:
        ValueError: for unknown tasks, and for `where` beside a walk, which starts where the picture has the player.
    """
    names = task.split("+")
    _check_names(names)
    player, facing = _placed(board, rng) if "where" in names else (board.start, None)
    builder = ConversationBuilder(cast(Any, as_png))  # images are here, not located
    followed, answer = [], ""
    for number, name in enumerate(names):
        question, form = _question_and_form(name)
        plan, answer = _plan_and_answer(board, question, rng, player)
        builder.add_turn("user", name)
        if number == 0:
            builder.add_image(render_board(board, player, facing), "board")
        builder.add_text(PROMPTS[name].format(plan=" ".join(plan)), name)
        builder.add_turn("assistant", name)
        for move, cell in zip(plan, board.walk(plan)[1:]):
            followed.append(patch_of(cell, board.size))
            add_step(
                *(builder, form, f" {move}"),  # the token that the answer has
                state=f" {cell_name(cell)}",
                picture=lambda cell=cell, move=move: render_board(board, cell, move),
                latent_size=latent_size,
            )
        space = "" if form in ("answer", "trace") else " "  # behind a word; a span needs none
        builder.add_text(f"{space}\\boxed{{{answer}}}" if question in ("where", *WALKS) else answer, name)
    return builder.finish({"task": task, "board": list(board.rows), "followed": followed}, set(), answer)


def _check_names(names: list[str]) -> None:
    for name in names:
        if name not in PROMPTS:
            raise ValueError(f"Unknown FrozenLake task {name!r}; choose from {list(PROMPTS)}.")
    walks = [name for name in names if _question_and_form(name)[0] in WALKS]
    if "where" in names and walks:
        raise ValueError(
            f"'where' has the player on any cell and {walks[0]!r} on the start. Ask them about different pictures."
        )


def _question_and_form(name: str) -> tuple[str, str]:
    """What is asked, and in which form."""
    for question, names in WALKS.items():
        for form, own in names.items():
            if own == name:
                return question, form
    return name, "answer"


def _plan_and_answer(board: FrozenLakeMap, question: str, rng: random.Random, player: Cell) -> tuple[str, str]:
    """The plan that is walked, if any, and the answer."""
    if question == "where":
        return "", cell_name(player)
    if question == "plan":
        plan = board.shortest_path(rng)
        return plan, " ".join(plan)
    if question == "outcome":
        plan, outcome = _plan_with_outcome(board, rng)
        return plan, OUTCOMES[outcome]
    return "", _cells(board, question, rng)


def _placed(board: FrozenLakeMap, rng: random.Random) -> tuple[Cell, str | None]:
    """Any cell, and any direction to face, as in pictures before and after moves."""
    return rng.choice(all_cells(board.size)), rng.choice([None, *MOVES])


def _cells(board: FrozenLakeMap, task: str, rng: random.Random) -> str:
    """What is asked about each cell, a line for each row."""
    say = {
        "describe": lambda cell: board[cell],
        "distances": lambda cell: str(board.distances.get(cell, "-")),
        "moves": lambda cell: rng.choice(board.best_moves(cell) or ["-"]),
    }[task]
    return "\n".join(" ".join(say((r, c)) for c in range(board.size)) for r in range(board.size))


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
    # A board without a hole in reach, say. One move before the goal there is another than the one to it.
    plan = board.shortest_path(rng)[:-1] or next(move for move in MOVES if move not in board.best_moves(board.start))
    return plan, "hole" if board[board.walk(plan)[-1]] == HOLE else "neither"


def frozen_lake_dataset(
    maps_per_size: dict[int, int],
    *,
    tasks: list[str],
    split: str,
    seed: int = 0,
    max_hole_fraction: float = 0.4,
    max_plan_length: int | None = None,
    latent_size: int = 1,
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
        latent_size (`int`, *optional*, defaults to 1): the model's, for forms that are as long as its spans.

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
        "latent_size": latent_size,
    }
    return generate_dataset(_generate, split, arguments)


def _generate(
    maps_per_size: dict[int, int],
    tasks: tuple[str, ...],
    split: str,
    seed: int,
    max_hole_fraction: float,
    max_plan_length: int | None,
    latent_size: int,
) -> Iterator[dict[str, Any]]:
    for size, number in maps_per_size.items():
        boards = sample_maps(number, size=size, split=split, seed=seed, max_hole_fraction=max_hole_fraction)
        for index, board in enumerate(boards):
            rng = random.Random(f"{seed}-{split}-{size}-{index}")
            if max_plan_length is None or board.distances[board.start] <= max_plan_length:
                yield from (conversation(board, task, rng, latent_size=latent_size) for task in tasks)
