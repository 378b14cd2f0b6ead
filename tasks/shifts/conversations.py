"""Questions about shifts as conversations in TRL's vision format; helper images show the board after each shift.

The words of a trace number and name each shift and never say what it leads to: that is left to the latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ilvr.data.conversations import ConversationBuilder
from ilvr.tasks.cells import all_cells, cell_name, patch_of, row_names
from ilvr.tasks.forms import FILLER, INSTRUCTIONS, add_step
from ilvr.tasks.images import as_png

from .board import ShiftBoard, all_shifts
from .rendering import render_shift_board


QUESTION, REPEAT = "Where does the player end? Shifts {} to {} of {}. ", "Repeat the shifts {} to {} of {}."
WHERE, DESCRIBE = "Where is the player?", "Describe the board."
BASE_SHIFTS = (1, 2)  # what a small backbone is asked to do at once; twice, if it has no list to repeat


@dataclass(frozen=True)
class Asked:
    """Shifts that a question lists, and which of them it asks for.

    Args:
        listed (`tuple[str, ...]`): one after the other.
        first (`int`), number (`int`): place of the first that is asked for, and how many.
        number_from (`int`, *optional*, defaults to 1): of the first that is listed.
    """

    listed: tuple[str, ...]
    first: int
    number: int
    number_from: int = 1

    @property
    def shifts(self) -> tuple[str, ...]:
        """Those that are asked for."""
        return self.listed[self.first : self.first + self.number]

    @property
    def first_number(self) -> int:
        """The number of the first that is asked for."""
        return self.number_from + self.first

    def said_as(self, question: str) -> str:
        """A question with the numbers of the first and the last, and the list."""
        last = self.first_number + self.number - 1
        return question.format(self.first_number, last, numbered(self.listed, self.number_from))


def numbered(shifts: Sequence[str], number_from: int) -> str:
    """Shifts with their numbers, for they repeat and are copied one after the other."""
    return " ".join(f"{number} {shift}" for number, shift in enumerate(shifts, start=number_from))


def question_of(asked: Asked, form: str) -> str:
    """What is asked."""
    return asked.said_as(QUESTION) + INSTRUCTIONS[form]


def vocabulary(size: int, max_number: int) -> list[str]:
    """Texts that hold every word of the task."""
    cells = " ".join(f" {cell_name(cell)}" for cell in all_cells(size))
    numbers = " ".join(str(n) for n in range(1, max_number + 1))
    shifts = tuple(all_shifts(size))
    questions = [question_of(Asked(shifts, 0, len(shifts)), form) for form in INSTRUCTIONS]
    boxed = f" \\boxed{{{cell_name((0, 0))}}}"
    starts = " ".join(f"{{{name}" for name in row_names(size))
    letters = "F F H G P\nF F H G P\nF"
    return [*questions, REPEAT, WHERE, DESCRIBE, cells, boxed, starts, letters, f" {numbers}", FILLER * 4] * 3


def conversation(
    board: ShiftBoard, asked: Asked, form: str, *, names_shifts: bool = True, latent_size: int = 1
) -> dict[str, Any]:
    """One question about one board.

    Args:
        board (`ShiftBoard`): in the picture.
        asked (`Asked`): the shifts.
        form (`str`): one of `ilvr.tasks.forms.FORMS`; the state in words is the player's cell.
        names_shifts (`bool`, *optional*, defaults to `True`): whether a step names the shift, or its number alone.
        latent_size (`int`, *optional*, defaults to 1): latents of a span, see [`~ilvr.tasks.forms.add_step`].

    Returns:
        `dict` with the columns of [`~ilvr.data.load_conversations`].
    """
    builder = ConversationBuilder(cast(Any, as_png))  # images are here, not located
    builder.add_turn("user", "question")
    builder.add_image(render_shift_board(board), "board")
    builder.add_text(question_of(asked, form), "question")
    boards = board.after(asked.shifts)
    builder.add_turn("assistant", form)
    for number, (shift, after) in enumerate(zip(asked.shifts, boards), start=asked.first_number):
        add_step(
            *(builder, form, f" {number} {shift}" if names_shifts else f" {number}"),
            state=f" {cell_name(after.player)}",
            picture=lambda after=after: render_shift_board(after),
            latent_size=latent_size,
        )
    answer = cell_name(boards[-1].player)
    builder.add_text(f" \\boxed{{{answer}}}", "answer")
    metadata = {
        "board": list(board.rows),
        "player": list(board.player),
        "shifts": list(asked.shifts),
        "first_number": asked.first_number,
        "followed": [patch_of(after.player, board.size) for after in boards],
        "tells_answer": True,
    }
    return builder.finish(metadata, set(), answer)


def base_conversation(board: ShiftBoard, questions: list[Asked], repeated: Asked | None = None) -> dict[str, Any]:
    """What a small backbone learns first: several questions about one picture, before all where the player is.

    Args:
        board (`ShiftBoard`): in the picture.
        questions (`list[Asked]`): shifts to take at once.
        repeated (`Asked`, *optional*): shifts to find in a list by their numbers.
    """
    turns = [(WHERE, _boxed(board)), (DESCRIBE, _letters(board))]
    turns += [(question_of(asked, "answer"), _boxed(board.after(asked.shifts)[-1])) for asked in questions]
    if repeated is not None:
        turns.append((repeated.said_as(REPEAT), f" {numbered(repeated.shifts, repeated.first_number)}"))
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
