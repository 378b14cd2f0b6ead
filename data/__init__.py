"""Sources of training data as conversations with helper images."""

from .check import BadSample, DatasetReport, check_dataset
from .conversations import SampleError
from .frozen_lake import FrozenLakeMap
from .frozen_lake_rendering import render_board
from .frozen_lake_tasks import frozen_lake_dataset
from .sources import load_conversations


__all__ = [
    "BadSample",
    "DatasetReport",
    "FrozenLakeMap",
    "SampleError",
    "check_dataset",
    "frozen_lake_dataset",
    "load_conversations",
    "render_board",
]
