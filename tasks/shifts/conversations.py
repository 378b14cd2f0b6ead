"""Questions about shifts as conversations in TRL's vision format; helper images show the board after each shift.

The words of a trace number and name each shift and never say what it leads to: that is left to the latents.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from ilvr.data.conversations import ConversationBuilder
from ilvr.tasks.cells import all_cells, cell_name, patch_of, row_names
from ilvr.tasks.forms import FILLER, INSTRUCTIONS, add_step
from ilvr.tasks.images import as_png

from .board import ShiftBoard, all_shifts
from .rendering import render_shift_board


Steps = list[tuple[str, ShiftBoard]]  # shifts with the board after each

QUESTION, REPEAT = "Where does the player end? Shifts up to {}: {}. ", "Repeat the shifts up to {}: {}."
WHERE, DESCRIBE = "Where is the player?", "Describe the board."
BASE_SHIFTS = (1, 2)  # what a small backbone is asked to do at once


def numbered(shifts: Iterable[str], first_number: int = 1) -> str:
    """Shifts with their numbers, for they repeat and are copied one after the other."""
    return " ".join(f"{number} {shift}" for number, shift in enumerate(shifts, start=first_number))


def question_of(shifts: list[str], form: str, first_number: int = 1, unasked: Sequence[str] = ()) -> str:
    """What is asked: the number of the last shift to take, and the shifts; `unasked` ones follow."""
    last = first_number + len(shifts) - 1
    return QUESTION.format(last, numbered([*shifts, *unasked], first_number)) + INSTRUCTIONS[form]


def vocabulary(size: int, max_number: int) -> list[str]:
    """Texts that hold every word of the task."""
    cells = " ".join(f" {cell_name(cell)}" for cell in all_cells(size))
    numbers = " ".join(str(n) for n in range(1, max_number + 1))
    questions = [question_of(all_shifts(size), form) for form in INSTRUCTIONS]
    boxed = f" \\boxed{{{cell_name((0, 0))}}}"
    starts = " ".join(f"{{{name}" for name in row_names(size))
    letters = "F F H G P\nF F H G P\nF"
    return [*questions, REPEAT, WHERE, DESCRIBE, cells, boxed, starts, letters, f" {numbers}", FILLER * 4] * 3


def conversation(
    board: ShiftBoard,
    steps: Steps,
    form: str,
    *,
    first_number: int = 1,
    unasked: Sequence[str] = (),
    names_shifts: bool = True,
    latent_size: int = 1,
) -> dict[str, Any]:
    """One question about one board.

    Args:
        board (`ShiftBoard`): in the picture.
        steps (`list[tuple]`): the shifts with the board after each, see [`~board.sample_shifts`].
        form (`str`): one of `ilvr.tasks.forms.FORMS`; the state in words is the player's cell.
        first_number (`int`, *optional*, defaults to 1): of the first shift.
        unasked (`Sequence[str]`, *optional*): shifts that the question lists behind those that it asks for.
        names_shifts (`bool`, *optional*, defaults to `True`): whether a step names the shift, or its number alone.
        latent_size (`int`, *optional*, defaults to 1): latents of a span, see [`~ilvr.tasks.forms.add_step`].

    Returns:
        `dict` with the columns of [`~ilvr.data.load_conversations`].
    """
    builder = ConversationBuilder(cast(Any, as_png))  # images are here, not located
    shifts = [shift for shift, _ in steps]
    builder.add_turn("user", "question")
    builder.add_image(render_shift_board(board), "board")
    builder.add_text(question_of(shifts, form, first_number, unasked), "question")
    builder.add_turn("assistant", form)
    for number, (shift, after) in enumerate(steps, start=first_number):
        add_step(
            *(builder, form, f" {number} {shift}" if names_shifts else f" {number}"),
            state=f" {cell_name(after.player)}",
            picture=lambda after=after: render_shift_board(after),
            latent_size=latent_size,
        )
    answer = cell_name(steps[-1][1].player)
    builder.add_text(f" \\boxed{{{answer}}}", "answer")
    metadata = {
        "board": list(board.rows),
        "player": list(board.player),
        "shifts": shifts,
        "first_number": first_number,
        "followed": [patch_of(after.player, board.size) for _, after in steps],
        "tells_answer": True,
    }
    return builder.finish(metadata, set(), answer)


def base_conversation(
    board: ShiftBoard, questions: list[tuple[Steps, int]], repeated: list[str], asked: int
) -> dict[str, Any]:
    """What a small backbone learns first: several questions about one picture, before all where the player is.

    Args:
        board (`ShiftBoard`): in the picture.
        questions (`list[tuple]`): shifts with the board after each, and the number of the first.
        repeated (`list[str]`), asked (`int`): shifts to find in a list by their numbers, and how many of them.
    """
    turns = [(WHERE, _boxed(board)), (DESCRIBE, _letters(board))]
    for steps, first_number in questions:
        turns.append((question_of([shift for shift, _ in steps], "answer", first_number), _boxed(steps[-1][1])))
    first = questions[-1][1]
    listed = REPEAT.format(first + asked - 1, numbered(repeated, first))
    turns.append((listed, f" {numbered(repeated[:asked], first)}"))
    builder = ConversationBuilder(cast(Any, as_png))
    for number, (question, answer) in enumerate(turns):
        builder.add_turn("user", "question")
        if number == 0:
            builder.add_image(render_shift_board(board), "board")
        builder.add_text(question, "question")
        builder.add_turn("assistant", "answer")
        builder.add_text(answer, "answer")
    metadata = {"board": list(board.rows), "player": list(board.player)}
    return builder.finish(metadata, set(), cell_name(board.player))


def _boxed(board: ShiftBoard) -> str:
    return f" \\boxed{{{cell_name(board.player)}}}"


def _letters(board: ShiftBoard) -> str:
    return "\n".join(
        " ".join("P" if (row, column) == board.player else letter for column, letter in enumerate(letters))
        for row, letters in enumerate(board.rows)
    )
