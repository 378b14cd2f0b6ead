"""Glyphs: dot patterns that are swapped, turned, flipped and stamped; what is on the tile that is followed?"""

from .board import GlyphBoard
from .rendering import render_glyph_board
from .task import Glyphs


TASK = Glyphs

__all__ = ["GlyphBoard", "Glyphs", "render_glyph_board"]
