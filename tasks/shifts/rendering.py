"""Boards of shifts as images, of FrozenLake's tiles: 64 pixels a cell."""

import numpy as np
from PIL import Image

from ilvr.tasks.frozen_lake.rendering import CELL_PIXELS, tile

from .board import ShiftBoard


def render_shift_board(board: ShiftBoard) -> Image.Image:
    """Draws a board with its player, RGB, `64 * size` pixels wide and high."""
    cells = [
        [tile(letter, (row, column) == board.player, None) for column, letter in enumerate(letters)]
        for row, letters in enumerate(board.rows)
    ]
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in cells])
    assert pixels.shape[0] == CELL_PIXELS * board.size
    return Image.fromarray(pixels)
