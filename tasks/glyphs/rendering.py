"""Boards of glyphs as images: 64 pixels a tile, a large dot for each bit that is set and a speck for each other."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .board import SIDE, GlyphBoard


TILE_PIXELS = 64
EDGE, PAPER, SPECK, DOT = "#8d99ae", "#f4f1e8", "#c9c4b5", "#1d3557"
FIRST, APART = 14, 18  # centre of the first dot, distance to the next, in pixels
DOT_RADIUS, SPECK_RADIUS = 7, 2
SMOOTH = 4  # drawn larger and made smaller, so that dots are round


@cache
def tile(pattern: str) -> np.ndarray:
    """The (64, 64, 3) pixels of a pattern."""
    edge = SMOOTH * TILE_PIXELS
    image = Image.new("RGB", (edge, edge), EDGE)
    pen = ImageDraw.Draw(image)
    pen.rectangle([SMOOTH, SMOOTH, edge - SMOOTH - 1, edge - SMOOTH - 1], fill=PAPER)
    for number, bit in enumerate(pattern):
        row, column = divmod(number, SIDE)
        radius, color = (DOT_RADIUS, DOT) if bit == "1" else (SPECK_RADIUS, SPECK)
        x, y = (FIRST + APART * place for place in (column, row))
        pen.ellipse([SMOOTH * side for side in (x - radius, y - radius, x + radius, y + radius)], fill=color)
    return np.asarray(image.resize((TILE_PIXELS, TILE_PIXELS), Image.Resampling.BOX))


def render_glyph_board(board: GlyphBoard) -> Image.Image:
    """Draws a board, RGB, `64 * size` pixels wide and high. The tile that is followed is not marked."""
    size = board.size
    rows = [[tile(pattern) for pattern in board.tiles[start : start + size]] for start in range(0, size**2, size)]
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
