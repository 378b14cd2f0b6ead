"""Shifts: rows and columns of a board move round; where does the player end?"""

from .board import ShiftBoard
from .rendering import render_shift_board
from .task import Shifts


TASK = Shifts

__all__ = ["ShiftBoard", "Shifts", "render_shift_board"]
