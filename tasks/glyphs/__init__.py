"""Glyphs: dot patterns that are swapped, turned, flipped or changed by a neighbour's; what is on a tile at the end?"""

from .board import GlyphBoard
from .rendering import render_glyph_board
from .task import Glyphs


TASK = Glyphs

__all__ = ["GlyphBoard", "Glyphs", "render_glyph_board"]
