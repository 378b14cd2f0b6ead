"""Questions of VSP's planning task (arXiv 2407.01863) as published for evaluation: `test_direct.jsonl`.

`map_desc` is the board, in numbers: 1 start, 2 goal, 0 safe, -1 hole.
"""

import json

from .conversations import ConversationBuilder, Locate, SampleError, as_list, required
from .reference_jsonl import add_question


FIELDS = frozenset({"text_input", "map_desc"})
LETTERS = {1: "S", 2: "G", 0: "F", -1: "H"}


def read_vsp_question(row: dict, locate: Locate) -> dict:
    """A row with `text_input`, `image_input` and `map_desc`; `map_id` and others are kept as metadata.

    Args:
        row (`dict`): the row.
        locate (`Callable`): finds an image, see [`ConversationBuilder`].

    Returns:
        `dict` with `messages`, the question alone, `images`, `answer`, which is `None`, and `metadata`, with the
        `board` as rows of letters.

    Raises:
        SampleError: names the bad field.
    """
    builder = ConversationBuilder(locate)
    add_question(builder, row)
    sample = builder.finish(row, {*FIELDS, "image_input"}, None, answered=False)
    sample["metadata"] = json.dumps({**json.loads(sample["metadata"]), "board": read_board(row)})
    return sample


def read_board(row: dict) -> list[str]:
    """The rows of the board in `map_desc`, of the letters S, G, F and H.

    Raises:
        SampleError: if it is no square with one start and one goal.
    """
    rows = as_list(required(row, "map_desc"), "map_desc", list)
    for i, cells in enumerate(rows):
        if len(cells) != len(rows):
            raise SampleError(f"map_desc[{i}]", f"has {len(cells)} cells on a board of {len(rows)} rows. Correct it.")
        for cell in cells:
            if not isinstance(cell, int) or cell not in LETTERS:
                raise SampleError(f"map_desc[{i}]", f"unknown cell {cell!r:.80}. Use one of {list(LETTERS)}.")
    board = ["".join(LETTERS[cell] for cell in cells) for cells in rows]
    for letter, meaning in (("S", "starts"), ("G", "goals")):
        if "".join(board).count(letter) != 1:
            raise SampleError("map_desc", f"has {''.join(board).count(letter)} {meaning}. A board has one.")
    return board
