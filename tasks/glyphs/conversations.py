"""Questions about glyphs as conversations in TRL's vision format; helper images show the board of each step.

The words of a trace number and name each move and never say what it leads to: that is left to the latents.
"""

from collections.abc import Sequence
from typing import Any, cast

from ilvr.data.conversations import ConversationBuilder
from ilvr.tasks.cells import Cell, all_cells, cell_name, cell_of, patch_of
from ilvr.tasks.forms import FILLER, INSTRUCTIONS, add_step
from ilvr.tasks.images import as_png

from .board import KINDS, WAYS, GlyphBoard, parse_move
from .rendering import render_glyph_board


Steps = list[tuple[str, GlyphBoard]]  # moves with the board after each

QUESTION = "Follow the tile at {}. What is on it at the end? Moves: {}. "
WHAT = "What is on {}?"
BITS = ("0", "1")
LETTERS = [letter for letter in map(chr, range(ord("A"), 0x2000)) if letter.isupper()]  # words for several bits


def alphabet(word_bits: int) -> Sequence[str]:
    """The words that say so many bits, in the order of the bits' values."""
    return BITS if word_bits == 1 else LETTERS[: 2**word_bits]


def spelled(pattern: str, word_bits: int) -> str:
    """A pattern in words of so many bits each, the last one of those that are left."""
    words = alphabet(word_bits)
    return " ".join(words[int(pattern[i : i + word_bits], 2)] for i in range(0, len(pattern), word_bits))


def question_of(followed: Cell, moves: list[str], form: str) -> str:
    """What is asked: the tile by its place at first, and the moves, numbered."""
    numbered = " ".join(f"{number} {move}" for number, move in enumerate(moves, start=1))
    return QUESTION.format(cell_name(followed), numbered) + INSTRUCTIONS[form]


def vocabulary(size: int, max_moves: int, words: Sequence[str]) -> list[str]:
    """Texts that hold every word of the task."""
    cells = " ".join(f" {cell_name(cell)}" for cell in all_cells(size))
    moves = [f"{kind} a x {argument}" for kind in KINDS for argument in WAYS.get(kind, ["a y"])]
    questions = [question_of((0, 0), moves, form) for form in INSTRUCTIONS]
    numbers = " ".join(f" {n}" for n in range(max_moves + 1))
    boxed = " ".join(f" \\boxed{{ {word} {word}}}" for word in words)
    places = [WHAT.format(cell_name(cell)) for cell in all_cells(size)]
    return [*questions, *places, cells, boxed, numbers, FILLER * 4] * 3


def told_cell(move: str, after: GlyphBoard, state_of: str) -> Cell:
    """The cell of the tile whose state a step tells.

    Args:
        move (`str`): the step.
        after (`GlyphBoard`): after it.
        state_of (`str`): `followed` or `moved`, see [`~glyphs.Glyphs`].
    """
    if state_of == "followed":
        return after.followed
    kind, cell, argument = parse_move(move)
    return cell_of(argument) if kind == "swap" else cell


def conversation(
    board: GlyphBoard,
    steps: Steps,
    form: str,
    *,
    word_bits: int = 1,
    short_word_bits: int = 3,
    state_of: str = "followed",
    tell_first: bool = False,
    latent_size: int = 1,
) -> dict[str, Any]:
    """One question about one board.

    Args:
        board (`GlyphBoard`): in the picture.
        steps (`list[tuple]`): the moves with the board after each, see [`~board.sample_moves`].
        form (`str`): one of `ilvr.tasks.forms.FORMS`; the state in words is the place of a tile and its pattern.
        word_bits (`int`), short_word_bits (`int`): of a pattern that a word says, in answers and `text`, and in the
            shortest spelling, see [`spelled`].
        state_of (`str`, *optional*, defaults to `"followed"`): the tile whose state a step tells, or `"moved"`.
        tell_first (`bool`, *optional*, defaults to `False`): whether a step 0 tells the followed tile at first.
        latent_size (`int`, *optional*, defaults to 1): latents of a span, see [`~ilvr.tasks.forms.add_step`].

    Returns:
        `dict` with the columns of [`~ilvr.data.load_conversations`]. In a trace `metadata` has `helper_questions`.
    """
    moves = [move for move, _ in steps]
    boards = [board, *(after for _, after in steps)]
    told = [board.followed, *(told_cell(move, after, state_of) for move, after in steps)]
    named = [cell_name(board.followed), *moves]
    builder = _asked(board, question_of(board.followed, moves, form))
    builder.add_turn("assistant", form)
    first = 0 if tell_first else 1
    for number in range(first, len(boards)):
        cell, pattern = told[number], boards[number][told[number]]
        add_step(
            *(builder, form, f" {number} {named[number]}"),
            state=f" {cell_name(cell)} {spelled(pattern, word_bits)}",
            short_state=f" {spelled(pattern, short_word_bits)} {cell_name(cell)}",
            picture=lambda number=number: render_glyph_board(boards[number]),
            latent_size=latent_size,
        )
    last = boards[-1]
    answer = spelled(last[last.followed], word_bits)
    builder.add_text(f" \\boxed{{ {answer}}}", "answer")
    metadata = {
        "tiles": list(board.tiles),
        "tile": cell_name(board.followed),
        "moves": moves,
        "followed": [patch_of(cell, board.size) for cell in told[first:]],
        "tells_answer": told[-1] == last.followed,
        "last_told": spelled(last[told[-1]], word_bits),
        "helper_questions": [WHAT.format(cell_name(cell)) for cell in told[first:]] if form == "trace" else None,
    }
    return builder.finish(metadata, set(), answer)


def base_conversation(
    board: GlyphBoard, cells: list[Cell], questions: list[Steps], *, word_bits: int = 1
) -> dict[str, Any]:
    """What teaches a small backbone to see: what is on some tiles, one of them first of all, and short questions.

    Args:
        board (`GlyphBoard`): in the picture.
        cells (`list[Cell]`): asked about.
        questions (`list`): moves with the board after each; the tile that the board follows is asked for.
        word_bits (`int`, *optional*, defaults to 1): see [`spelled`].
    """
    turns = [(WHAT.format(cell_name(cell)), board[cell]) for cell in cells]
    for steps in questions:
        end = steps[-1][1]
        turns.append((question_of(board.followed, [move for move, _ in steps], "answer"), end[end.followed]))
    builder = _asked(board, turns[0][0])
    for number, (question, pattern) in enumerate(turns):
        if number:
            builder.add_turn("user", "question")
            builder.add_text(question, "question")
        builder.add_turn("assistant", "answer")
        builder.add_text(f" \\boxed{{ {spelled(pattern, word_bits)}}}", "answer")
    metadata = {"tiles": list(board.tiles), "tile": cell_name(board.followed)}
    return builder.finish(metadata, set(), spelled(turns[0][1], word_bits))


def board_of(metadata: dict[str, Any]) -> GlyphBoard:
    """The board that a sample with this metadata is about."""
    return GlyphBoard(tuple(metadata["tiles"]), cell_of(metadata["tile"]))


def _asked(board: GlyphBoard, question: str) -> ConversationBuilder:
    builder = ConversationBuilder(cast(Any, as_png))  # images are here, not located
    builder.add_turn("user", "question")
    builder.add_image(render_glyph_board(board), "board")
    builder.add_text(question, "question")
    return builder
