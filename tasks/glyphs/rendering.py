"""Boards of glyphs as images: 64 pixels a tile, a large dot for each bit that is set and a speck for each other."""

from functools import cache
from math import isqrt

import numpy as np
from PIL import Image, ImageDraw

from .board import GlyphBoard


TILE_PIXELS = 64
EDGE, PAPER, SPECK, DOT = "#8d99ae", "#f4f1e8", "#c9c4b5", "#1d3557"
DOT_RADIUS, SPECK_RADIUS = 0.36, 0.1  # of the distance between centres
SMOOTH = 4  # drawn larger and made smaller, so that dots are round


@cache
def tile(pattern: str) -> np.ndarray:
    """The (64, 64, 3) pixels of a pattern."""
    edge = SMOOTH * TILE_PIXELS
    image = Image.new("RGB", (edge, edge), EDGE)
    pen = ImageDraw.Draw(image)
    pen.rectangle([SMOOTH, SMOOTH, edge - SMOOTH - 1, edge - SMOOTH - 1], fill=PAPER)
    side = isqrt(len(pattern))
    apart = edge / side
    for number, bit in enumerate(pattern):
        row, column = divmod(number, side)
        radius, color = (DOT_RADIUS, DOT) if bit == "1" else (SPECK_RADIUS, SPECK)
        box = (column - radius, row - radius, column + radius, row + radius)
        pen.ellipse([apart * (place + 0.5) for place in box], fill=color)
    return np.asarray(image.resize((TILE_PIXELS, TILE_PIXELS), Image.Resampling.BOX))


def render_glyph_board(board: GlyphBoard) -> Image.Image:
    """Draws a board, RGB, `64 * size` pixels wide and high. The tile that is followed is not marked."""
    size = board.size
    rows = [[tile(pattern) for pattern in board.tiles[start : start + size]] for start in range(0, size**2, size)]
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
