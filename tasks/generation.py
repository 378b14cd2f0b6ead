"""Data sets of a task, generated once and read from the cache of `datasets` from then on."""

import inspect
from pathlib import Path
from types import FunctionType
from typing import Any

from datasets import Dataset, NamedSplit
from datasets.fingerprint import Hasher

import ilvr.data.conversations
from ilvr.data.conversations import FEATURES


def generate_dataset(rows: FunctionType, split: str, settings: dict[str, Any]) -> Dataset:
    """The rows of a generator as a data set; the same settings find it in the cache.

    Args:
        rows (`FunctionType`): yields the rows, given the settings.
        split (`str`): the name that the data set gets.
        settings (`dict`): keyword arguments of `rows`; no lists, which `datasets` would take for shards.
    """
    # `datasets` looks at the name of a function and not at what it does: rows of an older version would be found.
    fingerprint = Hasher.hash([_code_of(rows), rows.__qualname__, split, settings])
    return Dataset.from_generator(
        rows, features=FEATURES, gen_kwargs=settings, split=NamedSplit(split), fingerprint=fingerprint
    )


def _code_of(rows: FunctionType) -> list[bytes]:
    """The source of a task's folder and of what its rows are put together with."""
    own, shared = Path(inspect.getfile(rows)).parent, Path(__file__).parent
    files = {*own.glob("*.py"), *shared.glob("*.py"), Path(inspect.getfile(ilvr.data.conversations))}
    return [file.read_bytes() for file in sorted(files)]
