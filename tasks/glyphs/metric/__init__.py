"""The metric of glyphs, a module for `evaluate`."""
