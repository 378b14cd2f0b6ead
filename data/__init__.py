"""Sources of training data as conversations with helper images."""

from .check import BadSample, DatasetReport, check_dataset
from .conversations import SampleError
from .prompts import prompt_of
from .sources import load_conversations


__all__ = [
    "BadSample",
    "DatasetReport",
    "SampleError",
    "check_dataset",
    "load_conversations",
    "prompt_of",
]
