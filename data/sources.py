"""Data sets of any known format as conversations: files are read row by row, everything else by `datasets`."""

import copy
import glob
import logging
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import (
    Dataset,
    Image,
    IterableDataset,
    List,
    NamedSplit,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException

from ilvr import __version__

from . import mirage, monet, native, reference_jsonl, zebra_cot
from .conversations import FEATURES, Locate, SampleError
from .images import locate_image
from .row_files import Row, read_rows


logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """A format of rows.

    Args:
        fields (`frozenset[str]`): fields it is recognised by.
        read (`Callable[[dict, Locate], dict]`): the conversation of a row.
    """

    fields: frozenset[str]
    read: Callable[[dict, Locate], dict]


FORMATS = {
    "native": Format(native.FIELDS, native.read_native),
    "reference": Format(reference_jsonl.FIELDS, reference_jsonl.read_reference),
    "mirage": Format(mirage.FIELDS, mirage.read_mirage),
    "zebra_cot": Format(zebra_cot.FIELDS, zebra_cot.read_zebra_cot),
    "monet": Format(monet.FIELDS, monet.read_monet),
}
ROW_FILES = (".jsonl", ".json")
DATA_FILES = (*ROW_FILES, ".parquet", ".arrow", ".csv", ".tsv", ".txt")


def load_conversations(
    path: str,
    *,
    format: str | None = None,
    image_root: str | None = None,
    split: str = "train",
    streaming: bool = False,
    skip_bad_samples: bool = False,
    **kwargs: Any,
) -> Dataset | IterableDataset:
    """Loads a data set of any known format as conversations to train on.

    Args:
        path (`str`): a `.jsonl` or `.json` file, or what `datasets.load_dataset` takes: a folder or a Hub id; also a
            folder that `save_to_disk` wrote, or a Parquet file.
        format (`str`, *optional*): `native`, `reference`, `mirage`, `zebra_cot` or `monet`; recognised from the fields
            of each row by default.
        image_root (`str`, *optional*, defaults to the folder of the data): holds all images; paths are relative to it
            and may not leave it.
        split (`str`, *optional*, defaults to `"train"`): for `load_dataset`; of a `.jsonl` or `.json` file, or of a
            folder that `save_to_disk` wrote, which have one split, only its label.
        streaming (`bool`, *optional*, defaults to `False`): read while iterating, nothing is written to the cache.
        skip_bad_samples (`bool`, *optional*, defaults to `False`): leaves bad samples out, with a warning for each.
        kwargs: for `load_dataset`, such as `name` or `revision`.

    Returns:
        `datasets.Dataset`, or `IterableDataset` if streaming, with `messages` (turns with content parts), `images`
        (encoded, in the order of the image parts; decoded when they are used), `answer` (`None` if the source has
        none) and `metadata` (the row's other fields, as JSON).

    Raises:
        ValueError: names the first bad sample by its line, or by its number from 0 if it has no line, the field and
            the remedy; also for an unknown format, a missing file, a file without samples, and a slice such as
            `train[:3]` of data with one split.

    Example:

    ```python
    >>> dataset = load_conversations("comt/TRAIN.jsonl", image_root="comt/images_comt")
    >>> dataset = load_conversations("multimodal-reasoning-lab/Maze", streaming=True)
    ```
    """
    root = find_image_root(path, image_root)
    options = {"format": check_format(format), "image_root": root, "skip_bad_samples": skip_bad_samples}
    if not is_row_file(path):
        with _reading(path):
            dataset: Any = _load_rows(path, split=split, streaming=streaming, **kwargs)
            columns = dataset.column_names or list(next(iter(dataset)))
        dataset = dataset.map(
            partial(_convert_batch, source=path, **options),
            batched=True,
            batch_size=32,
            with_indices=True,
            remove_columns=columns,
            features=FEATURES,
        )
        if not streaming and len(dataset) == 0:
            raise ValueError(f"{path} has no good samples. `ilvr check-data` says why.")
        return dataset
    _check_label(path, split)
    file = Path(path).resolve()
    # For the cache of `datasets`, which would return the old samples of a file, or of a reader, that has changed.
    status = file.stat()
    arguments = {"path": str(file), "version": (__version__, status.st_mtime_ns, status.st_size), **options}
    if streaming:
        return IterableDataset.from_generator(_generate, FEATURES, arguments, split=NamedSplit(split))
    try:
        return Dataset.from_generator(_generate, FEATURES, gen_kwargs=arguments, split=NamedSplit(split))
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # what is wrong with which sample
        raise


def iterate_rows(path: str, **kwargs: Any) -> Iterator[Row]:
    """Rows of a data set, one at a time: number, row or error, and progress.

    The number is the line, from 1, with bytes as progress, for a `.jsonl` or `.json` file; else that of the sample,
    from 0, with 1 as progress. `kwargs` are for `load_dataset`.

    Raises:
        ValueError: if the data cannot be read.
    """
    if is_row_file(path):
        yield from read_rows(Path(path))
    else:
        with _reading(path):
            for number, row in enumerate(_load_rows(path, streaming=True, **kwargs)):
                yield number, row, 1


def convert(row: dict | SampleError, locate: Locate, format: str | None = None) -> tuple[dict, str]:
    """The conversation of a row, with the name of the format it was in.

    Args:
        row (`dict` or `SampleError`): as [`iterate_rows`] gives it; an error is raised.
        locate (`Callable[[value, field], dict]`): finds an image, see [`~ilvr.data.images.locate_image`].
        format (`str`, *optional*): recognised from the row's fields by default.

    Raises:
        SampleError: names the bad field.
    """
    if isinstance(row, SampleError):
        raise row
    if format is None:
        format = _recognise(row)
    return FORMATS[format].read(row, locate), format


def _recognise(row: dict) -> str:
    # A column of a data set that has no value in this row is not one of its fields.
    present = {name for name, value in row.items() if value is not None}
    fitting = [name for name, format in FORMATS.items() if format.fields <= present]
    if len(fitting) == 1:
        return fitting[0]
    remedy = "Name it: `format` in Python, `--format` in the shell."
    if fitting:
        raise SampleError("row", f"fits the formats {' and '.join(fitting)}. {remedy}")
    known = "; ".join(f"{name}: {', '.join(sorted(format.fields))}" for name, format in FORMATS.items())
    raise SampleError("row", f"the fields {sorted(present)} fit no known format ({known}). {remedy}")


def is_row_file(path: str) -> bool:
    """Whether a path names JSON lines or a JSON array, which are read here, and not by `datasets`."""
    return Path(path).suffix.lower() in ROW_FILES


def check_format(format: str | None) -> str | None:
    """Returns `format`; raises ValueError for an unknown one."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; choose one of {list(FORMATS)}.")
    return format


def find_image_root(path: str, image_root: str | None) -> Path | None:
    """The resolved folder of the images: `image_root`, or that of local data; `None` for a Hub id.

    Raises:
        ValueError: if the data file or the folder does not exist.
    """
    if not path:
        raise ValueError("The path of the data is empty. Give a file, a folder or a Hub id.")
    data = Path(path)
    if is_row_file(path) and not data.is_file():
        raise ValueError(f"There is no file {path}. Correct the path.")
    if image_root is None and not data.exists():
        return None
    root = Path(image_root) if image_root is not None else data if data.is_dir() else data.parent
    if not root.is_dir():
        raise ValueError(f"image_root={image_root} is no folder. Name the folder that the image paths start from.")
    return root.resolve()


def describe(path: str, number: int) -> str:
    """Names a sample in a message."""
    return f"{path}, {'line' if is_row_file(path) else 'sample'} {number}"


@contextmanager
def _reading(path: str) -> Generator[None]:
    """What `datasets` raises for data that it cannot read becomes a ValueError that names them."""
    try:
        yield
    except (IndexError, StopIteration) as error:
        raise ValueError(f"{path} has no rows. Correct the path or the data.") from error
    except (DatasetGenerationError, ArrowException, EOFError, TypeError, zlib.error) as error:
        problem = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{path} cannot be read: {problem:.500}. Correct it or give all rows the same types."
        ) from error


def _load_rows(path: str, split: str = "train", streaming: bool = False, **kwargs: Any) -> Any:
    data = Path(os.path.abspath(path))
    dataset: Any
    if (data / "state.json").is_file():
        dataset = load_from_disk(path)
        _check_label(path, split)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif data.is_file():
        # Names of files are patterns for `datasets`.
        files = [glob.escape(str(data))]
        dataset = load_dataset(str(data.parent), data_files=files, split=split, streaming=streaming, **kwargs)
    else:
        if data.is_dir():
            _check_folder(data, **kwargs)
        dataset = load_dataset(path, split=split, streaming=streaming, **kwargs)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = undecoded(dataset, name)
    return dataset


def undecoded(dataset: Any, column: str) -> Any:
    """A data set whose column of lists of images holds them as they are stored.

    Args:
        dataset (`Dataset` or `IterableDataset`).
        column (`str`): lists of images, or of what can be cast to images.
    """
    images, given = List(Image(decode=False)), (dataset.features or {}).get(column)
    if given == images:
        return dataset
    if isinstance(dataset, IterableDataset) or given != List(Image()):
        return dataset.cast_column(column, images)
    # `cast_column` would write the whole data set again, though what is stored is the same.
    dataset = copy.deepcopy(dataset)
    dataset.info.features[column] = images
    return dataset


def _check_label(path: str, split: str) -> None:
    """Raises ValueError for a slice of data that have one split."""
    if not split.isidentifier():
        raise ValueError(f"split={split!r}: {path} has one split. Take part of it with `select` or `take`.")


def _check_folder(folder: Path, **kwargs: Any) -> None:
    """Raises ValueError for a folder that `datasets` does not find; warns of data files that it leaves out."""
    if glob.has_magic(str(folder)):
        raise ValueError(f"{folder} is a pattern for `datasets`. Rename the folder, without any of *?[.")
    if "data_files" in kwargs:
        return
    splits = load_dataset_builder(str(folder), **kwargs).config.data_files or {}
    read = {os.path.realpath(file) for files in splits.values() for file in files}
    found = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in DATA_FILES]
    left = [str(file.relative_to(folder)) for file in found if os.path.realpath(file) not in read]
    if left:
        logger.warning(
            f"{folder}: {len(left)} data files are left out, as `datasets` reads files of one kind: "
            f"{', '.join(left[:5])}. Move them elsewhere, or load them by their own path."
        )


def _generate(
    path: str, version: tuple, format: str | None, image_root: Path | None, skip_bad_samples: bool
) -> Iterator[dict]:
    is_empty = True
    for number, row, _ in read_rows(Path(path)):
        sample = _convert_or_skip(row, number, path, format, image_root, skip_bad_samples)
        if sample is not None:
            is_empty = False
            yield sample
    if is_empty:
        raise ValueError(f"{path} has no good samples. `ilvr check-data` says why.")


def _convert_batch(batch: dict, indices: list[int], *, source: str, **options: Any) -> dict:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    samples = [_convert_or_skip(row, number, source, **options) for row, number in zip(rows, indices)]
    return {name: [sample[name] for sample in samples if sample is not None] for name in FEATURES}


def _convert_or_skip(
    row: dict | SampleError,
    number: int,
    source: str,
    format: str | None,
    image_root: Path | None,
    skip_bad_samples: bool,
) -> dict | None:
    try:
        return convert(row, partial(locate_image, image_root=image_root), format)[0]
    except SampleError as error:
        message = f"{describe(source, number)}: {error}"
        if not skip_bad_samples:
            raise ValueError(message) from error
        logger.warning(f"{message} The sample is left out.")
        return None
