"""FrozenLake: boards, their pictures, conversations about them, and the metric of a plan."""

from .board import FrozenLakeMap
from .conversations import frozen_lake_dataset
from .rendering import render_board


__all__ = ["FrozenLakeMap", "frozen_lake_dataset", "render_board"]
