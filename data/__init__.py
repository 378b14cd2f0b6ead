"""Sources of training data as conversations with helper images."""

from .frozen_lake import FrozenLakeMap
from .frozen_lake_rendering import render_board
from .frozen_lake_tasks import frozen_lake_dataset


__all__ = ["FrozenLakeMap", "frozen_lake_dataset", "render_board"]
