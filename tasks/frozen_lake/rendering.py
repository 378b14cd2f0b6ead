"""FrozenLake boards as images, pixel for pixel those of gymnasium (>= 1.0, < 1.4) and so of the VSP benchmark.

A cell's pixels depend on its own content only. So gymnasium draws each kind of cell once, and a board is put together
from these tiles: the same image, about thirty times faster than one `render()` call a board.
"""

import os
from functools import cache

import numpy as np
from PIL import Image

from .board import HOLE, Cell, FrozenLakeMap


CELL_PIXELS = 64
_GYMNASIUM_ACTIONS = {"L": 0, "D": 1, "R": 2, "U": 3}


def render_with_gymnasium(
    board: FrozenLakeMap, player: Cell | None = None, last_move: str | None = None
) -> np.ndarray:
    """What gymnasium's FrozenLake draws, shape (64 * size, 64 * size, 3), uint8, without a display or sound device."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

    env = FrozenLakeEnv(render_mode="rgb_array", desc=list(board.rows), is_slippery=False)
    row, column = board.start if player is None else player
    env.s = row * board.size + column
    env.lastaction = None if last_move is None else _GYMNASIUM_ACTIONS[last_move]
    # `render()` would warn that no environment spec is set; the drawing itself needs none.
    pixels = env._render_gui("rgb_array")
    env.close()
    return pixels


@cache
def tile(letter: str, has_player: bool, last_move: str | None) -> np.ndarray:
    """The (64, 64, 3) pixels of one cell, cut out of a 2x2 board drawn by gymnasium."""
    boards = {"S": ("SF", "FG"), "G": ("GF", "FS"), "F": ("FS", "GF"), "H": ("HS", "GF")}
    player = (0, 0) if has_player else (1, 1)
    pixels = render_with_gymnasium(FrozenLakeMap(boards[letter]), player, last_move)
    return pixels[:CELL_PIXELS, :CELL_PIXELS].copy()


def render_board(board: FrozenLakeMap, player: Cell | None = None, last_move: str | None = None) -> Image.Image:
    """Draws a board with the player on it.

    Args:
        board (`FrozenLakeMap`): the map.
        player (`tuple[int, int]`, *optional*, defaults to the start): row and column of the player.
        last_move (`str`, *optional*): the last move, `U`, `D`, `L` or `R`; the player faces that way, down if `None`.

    Returns:
        `PIL.Image.Image`: RGB, 64 pixels a cell.
    """
    player = board.start if player is None else player
    pixels = np.empty((CELL_PIXELS * board.size, CELL_PIXELS * board.size, 3), dtype=np.uint8)
    for row in range(board.size):
        for column in range(board.size):
            here = (row, column) == player
            facing = last_move if here and board[player] != HOLE else None
            top, left = row * CELL_PIXELS, column * CELL_PIXELS
            pixels[top : top + CELL_PIXELS, left : left + CELL_PIXELS] = tile(board[row, column], here, facing)
    return Image.fromarray(pixels)
