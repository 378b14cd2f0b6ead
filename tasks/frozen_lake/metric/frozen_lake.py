"""`evaluate` metric for FrozenLake planning (VSP, arXiv 2407.01863): does the plan end on the goal?"""

import re

import datasets
import evaluate
from evaluate.utils.file_utils import add_start_docstrings

from ilvr.evaluation.intervals import wilson_interval


_DESCRIPTION = """
Scores plans for FrozenLake boards under the two rules in use, which are never to be mixed:
- `end_on_goal` (Mirage, ILVR): the plan must end on the goal;
- `first_hit` (original VSP): reaching the goal once is success, whatever follows.
A hole fails the plan, leaving the board stays. The plan is the content of the last \\boxed{...}, letters U, D, L, R.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): model outputs, or plans within \\boxed{...}.
    references (`list[list[str]]`): boards, rows of S (start), G (goal), F (safe) and H (hole).

Returns:
    `end_on_goal`, `first_hit`: success rates; `invalid`: share of outputs without a box or with another letter in it,
    which fail under both rules; `end_on_goal_low`, `end_on_goal_high`: Wilson 95 % interval; `count`; and the same
    with the suffix `_3x3`, … for each board size.
"""
_CITATION = """
@article{wu2024vsp,
  title = {VSP: Assessing the dual challenges of perception and reasoning in spatial planning tasks for VLMs},
  author = {Wu, Qiucheng and others},
  journal = {arXiv:2407.01863},
  year = {2024}
}
"""

_MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def parse_plan(text: str) -> str | None:
    """The letters in the last `\\boxed{…}`, or `None` if there is no box or a letter that is no move.

    Spaces and commas separate moves. The parsers in use elsewhere drop other letters silently, and score what is left.
    """
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    if not boxes:
        return None
    plan = re.sub(r"[\s,]", "", boxes[-1])
    return plan if set(plan) <= set(_MOVES) else None


def follow(board: list[str], plan: str) -> tuple[bool, bool]:
    """Whether the plan ends on the goal, and whether it reaches the goal before any hole."""
    size = len(board)
    row, column = next((r, cells.index("S")) for r, cells in enumerate(board) if "S" in cells)
    reached = False
    for move in plan:
        down, right = _MOVES[move]
        row = min(max(row + down, 0), size - 1)
        column = min(max(column + right, 0), size - 1)
        if board[row][column] == "H":
            return False, reached
        reached |= board[row][column] == "G"
    return board[row][column] == "G", reached


def _scores(rows: list[tuple[bool, bool, bool]], suffix: str = "") -> dict[str, float]:
    count = len(rows)
    ended, hit, invalid = (sum(column) for column in zip(*rows))
    low, high = wilson_interval(ended, count)
    values = {
        "end_on_goal": ended / count,
        "end_on_goal_low": low,
        "end_on_goal_high": high,
        "first_hit": hit / count,
        "invalid": invalid / count,
        "count": count,
    }
    return {name + suffix: value for name, value in values.items()}


@add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FrozenLake(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        rows = []
        for text, board in zip(predictions, references):
            plan = parse_plan(text)
            rows.append((False, False, True) if plan is None else (*follow(board, plan), False))
        result = _scores(rows)
        for size in sorted({len(board) for board in references}):
            own = [row for row, board in zip(rows, references) if len(board) == size]
            result |= _scores(own, f"_{size}x{size}")
        return result
