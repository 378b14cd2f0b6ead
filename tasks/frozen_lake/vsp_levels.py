"""Boards of sizes that VSP does not have, with its words and in its layout, for `ilvr evaluate`."""

import json
from collections.abc import Mapping
from pathlib import Path

from .board import MAX_SIZE, VSP_CODES, sample_maps
from .rendering import render_board


MARK = "<image>"


def write_vsp_levels(
    folder: str | Path,
    words: str,
    levels: Mapping[int, int],
    *,
    seed: int = 0,
    max_hole_fraction: float = 0.4,
) -> Path:
    """Writes planning questions about new boards, drawn as VSP's are: unseen levels, such as 7 and 8.

    Args:
        folder (`str` or `Path`): gets `levels.jsonl` and the pictures; it is made, and must be empty.
        words (`str`): of the question, `text_input` of a row of VSP, which must not say the board's size; `<image>` is
            the board's place in it, and without it the board comes first.
        levels (`Mapping[int, int]`): boards for each size, 2 to 8.
        seed (`int`, *optional*, defaults to 0): fixes the boards, which are of the test split of
            [`~ilvr.tasks.frozen_lake.FrozenLake`] with this seed.
        max_hole_fraction (`float`, *optional*, defaults to 0.4): most holes, as a share of the cells.

    Returns:
        `Path`: of `levels.jsonl`.

    Raises:
        ValueError: for other sizes, more than one place for the board, and a folder that is not empty.
    """
    folder = Path(folder)
    if not all(2 <= size <= MAX_SIZE for size in levels):
        raise ValueError(f"levels are for boards of size 2 to {MAX_SIZE}, got sizes {list(levels)}.")
    if words.count(MARK) > 1:
        raise ValueError(f"words has {words.count(MARK)} times {MARK}, and there is one board. Leave one.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Name a new folder.")
    codes = {letter: code for code, letter in VSP_CODES.items()}
    rows = []
    for size, count in levels.items():
        (folder / f"level_{size}").mkdir(parents=True)
        boards = sample_maps(count, size=size, split="test", seed=seed, max_hole_fraction=max_hole_fraction)
        for number, board in enumerate(boards):
            picture = f"level_{size}/{number}.png"
            render_board(board).save(folder / picture)
            description = [[codes[letter] for letter in row] for row in board.rows]
            rows.append({"text_input": words, "image_input": [picture], "map_id": number, "map_desc": description})
    path = folder / "levels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
