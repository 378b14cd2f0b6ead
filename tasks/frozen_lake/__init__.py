"""FrozenLake: boards, their pictures, conversations about them, and the metric of a plan."""

from .board import FrozenLakeMap
from .conversations import frozen_lake_dataset
from .rendering import render_board
from .task import FrozenLake, board_of
from .vsp_levels import write_vsp_levels


TASK = FrozenLake

__all__ = ["FrozenLake", "FrozenLakeMap", "board_of", "frozen_lake_dataset", "render_board", "write_vsp_levels"]
