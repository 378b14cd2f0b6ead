"""Questions about shifts as conversations in TRL's vision format; helper images show the board after each shift.

The words of a trace number and name each shift and never say what it leads to: that is left to the latents.
"""

from typing import Any, cast

from ilvr.data.conversations import ConversationBuilder
from ilvr.tasks.images import as_png

from .board import ShiftBoard, all_shifts, column_names, row_names
from .rendering import render_shift_board


QUESTION = "Where does the player end? Shifts: {}. "
SUFFIXES = {"trace": "Think step by step.", "answer": "Answer directly.", "text": "Think in words."}
WHERE, DESCRIBE = "Where is the player?", "Describe the board."
BASE_SHIFTS = (1, 1, 2, 2)  # what a small backbone is asked to do at once


def question_of(shifts: list[str], form: str) -> str:
    """What is asked: the shifts numbered, for they repeat and are copied one after the other."""
    return QUESTION.format(_numbered(shifts)) + SUFFIXES[form]


def vocabulary(size: int, max_shifts: int) -> list[str]:
    """Texts that hold every word of the task."""
    cells = " ".join(f" {row} {column}" for row in row_names(size) for column in column_names(size))
    numbers = " ".join(str(n) for n in range(1, max_shifts + 1))
    questions = [question_of(all_shifts(size), form) for form in SUFFIXES]
    boxed = f" \\boxed{{{row_names(size)[0]} {column_names(size)[0]}}}"
    return [*questions, WHERE, DESCRIBE, cells, boxed, "F H G P\nF H G P\nF", f" {numbers}"] * 3


def conversation(board: ShiftBoard, steps: list[tuple[str, ShiftBoard]], form: str) -> dict[str, Any]:
    """One question about one board.

    Args:
        board (`ShiftBoard`): in the picture.
        steps (`list[tuple]`): the shifts with the board after each, see [`~board.sample_shifts`].
        form (`str`): `trace`, `answer` or `text` (the player's cell after each shift, in words).

    Returns:
        `dict` with the columns of [`~ilvr.data.load_conversations`].
    """
    builder = ConversationBuilder(cast(Any, as_png))  # images are here, not located
    shifts = [shift for shift, _ in steps]
    builder.add_turn("user", "question")
    builder.add_image(render_shift_board(board), "board")
    builder.add_text(question_of(shifts, form), "question")
    builder.add_turn("assistant", form)
    for number, (shift, after) in enumerate(steps, start=1):
        if form == "trace":
            builder.add_text(f" {number} {shift}", "shift")
            builder.add_image(render_shift_board(after), "shift")
        elif form == "text":
            builder.add_text(f" {number} {shift} {after.name_of(after.player)}", "shift")
    last = steps[-1][1]
    answer = last.name_of(last.player)
    builder.add_text(f" \\boxed{{{answer}}}", "answer")
    places = [after.player[0] * board.size + after.player[1] for _, after in steps]
    metadata = {"board": list(board.rows), "player": list(board.player), "shifts": shifts, "followed": places}
    return builder.finish(metadata, set(), answer)


def base_conversation(board: ShiftBoard, questions: list[list[tuple[str, ShiftBoard]]]) -> dict[str, Any]:
    """What teaches a small backbone to see: several questions about one picture, where the player is first of all."""
    where = f" \\boxed{{{board.name_of(board.player)}}}"
    turns = [(WHERE, where), (DESCRIBE, _letters(board))]
    for steps in questions:
        last = steps[-1][1]
        asked = question_of([shift for shift, _ in steps], "answer")
        turns.append((asked, f" \\boxed{{{last.name_of(last.player)}}}"))
    builder = ConversationBuilder(cast(Any, as_png))
    for number, (question, answer) in enumerate(turns):
        builder.add_turn("user", "question")
        if number == 0:
            builder.add_image(render_shift_board(board), "board")
        builder.add_text(question, "question")
        builder.add_turn("assistant", "answer")
        builder.add_text(answer, "answer")
    return builder.finish(
        {"board": list(board.rows), "player": list(board.player)}, set(), board.name_of(board.player)
    )


def _numbered(shifts: list[str]) -> str:
    return " ".join(f"{number} {shift}" for number, shift in enumerate(shifts, start=1))


def _letters(board: ShiftBoard) -> str:
    return "\n".join(
        " ".join("P" if (row, column) == board.player else letter for column, letter in enumerate(letters))
        for row, letters in enumerate(board.rows)
    )
