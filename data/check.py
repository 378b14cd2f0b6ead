"""The check of a data set before training: counts, lengths, sizes, and every bad sample; no model is loaded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .conversations import SampleError, image_roles
from .images import image_size, locate_image, open_image
from .sources import check_format, convert, find_image_root, is_row_file, iterate_rows
from .token_counts import SizeTokenizer, count_tokens


if TYPE_CHECKING:
    from ilvr import ILVRProcessor


@dataclass
class BadSample:
    """A sample that cannot be trained on.

    Args:
        number (`int`): its line, from 1; for data without lines its number, from 0.
        field (`str`): the field that is wrong.
        message (`str`): the field, what is wrong with it and how to mend it.
    """

    number: int
    field: str
    message: str


@dataclass
class DatasetReport:
    """What [`check_dataset`] found; lengths and sizes are of the good samples.

    Args:
        path (`str`): the data set.
        num_samples (`int`): good and bad ones.
        formats (`dict[str, int]`): good samples of each format.
        spans_per_sample (`dict[int, int]`): how many good samples have how many helper images.
        characters (`dict[str, int]`): `min`, `median` and `max` of a sample's characters; empty without samples.
        tokens (`dict[str, int]`): the same for its tokens, images and spans included; empty if not counted.
        num_images (`int`): images of good samples, helper images included.
        image_sizes (`dict[str, tuple[int, int]]`): `min`, `median` and `max` by area, as (width, height) in pixels.
        bad_samples (`list[BadSample]`): all of them, in order.
    """

    path: str
    num_samples: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    spans_per_sample: dict[int, int] = field(default_factory=dict)
    characters: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    num_images: int = 0
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad_samples: list[BadSample] = field(default_factory=list)

    @property
    def num_good(self) -> int:
        return self.num_samples - len(self.bad_samples)

    @property
    def is_good(self) -> bool:
        """Whether there are samples, and no bad ones."""
        return self.num_samples > 0 and not self.bad_samples

    def to_dict(self) -> dict:
        """The report for a JSON file, with `num_good` and `num_bad`."""
        return {**asdict(self), "num_good": self.num_good, "num_bad": len(self.bad_samples)}

    def __str__(self) -> str:
        unit = "line" if is_row_file(self.path) else "sample"
        spans = ", ".join(f"{count} with {spans}" for spans, count in self.spans_per_sample.items())
        sizes = {name: f"{width}x{height}" for name, (width, height) in self.image_sizes.items()}
        lines = [f"{self.path}:{problem}" for problem in _group(self.bad_samples, unit)]
        lines += [
            f"samples           {self.num_samples}: {self.num_good} good, {len(self.bad_samples)} bad",
            f"formats           {', '.join(f'{count} {name}' for name, count in self.formats.items()) or '-'}",
            f"spans per sample  {spans or '-'}",
            f"characters        {_join(self.characters)}",
            f"tokens            {_join(self.tokens)}",
            f"images            {self.num_images}: {_join(sizes)}",
        ]
        return "\n".join(lines)


def check_dataset(
    path: str,
    *,
    format: str | None = None,
    image_root: str | None = None,
    processor: "ILVRProcessor | None" = None,
    max_length: int | None = None,
    decode_images: bool = False,
    show_progress: bool = True,
    **kwargs: Any,
) -> DatasetReport:
    """Reads a whole data set, one row at a time, and reports what is in it and what is wrong with it.

    Args:
        path (`str`): as in [`~ilvr.data.load_conversations`].
        format (`str`, *optional*): as there.
        image_root (`str`, *optional*): as there.
        processor ([`~ilvr.ILVRProcessor`], *optional*): counts the tokens that the trainer will count.
        max_length (`int`, *optional*): longest sample allowed, in tokens; needs `processor`.
        decode_images (`bool`, *optional*, defaults to `False`): decodes each image; otherwise only its header is read.
        show_progress (`bool`, *optional*, defaults to `True`): shows a progress bar.
        kwargs: for `load_dataset`, if it is not a file of rows.

    Returns:
        [`DatasetReport`]

    Raises:
        ValueError: if the data set cannot be read at all; bad samples are in the report.
    """
    if max_length is not None and processor is None:
        raise ValueError(f"max_length={max_length} is in tokens, and needs a processor that counts them.")
    root, format = find_image_root(path, image_root), check_format(format)
    report, counts = DatasetReport(path), _Counts()
    tokenizer = None if processor is None else SizeTokenizer(processor)
    is_file = is_row_file(path)
    total, unit = (Path(path).stat().st_size, "B") if is_file else (None, " samples")
    with tqdm(total=total, unit=unit, unit_scale=is_file, desc=Path(path).name, disable=not show_progress) as bar:
        for number, row, progress in iterate_rows(path, **kwargs):
            report.num_samples += 1
            sizes: list[tuple[int, int]] = []
            locate = partial(_locate_and_measure, image_root=root, decode=decode_images, sizes=sizes)
            try:
                sample, name = convert(row, locate, format)
                num_tokens = None if tokenizer is None else count_tokens(sample["messages"], sizes, tokenizer)
                if max_length is not None and num_tokens is not None and num_tokens > max_length:
                    raise SampleError(
                        "sample",
                        f"has {num_tokens} tokens, more than max_length={max_length}. Raise it or shrink the images.",
                    )
            except SampleError as error:
                report.bad_samples.append(BadSample(number, error.field, str(error)))
            else:
                counts.add(sample["messages"], name, sizes, num_tokens)
            bar.update(progress)
    counts.write(report)
    return report


def _locate_and_measure(value: object, name: str, image_root: Path | None, decode: bool, sizes: list) -> dict:
    image = locate_image(value, name, image_root)
    try:
        sizes.append(open_image(image, "it").size if decode else image_size(image, "it"))
    except ValueError as error:
        raise SampleError(name, str(error)) from error
    return image


def _group(bad_samples: list[BadSample], unit: str) -> list[str]:
    """A line for each message, in the order of their first samples."""
    numbers: dict[str, list[int]] = {}
    for bad in bad_samples:
        numbers.setdefault(bad.message, []).append(bad.number)
    return [
        f"{unit} {found[0]}: {message}"
        if len(found) == 1
        else f" {len(found)} {unit}s, first at {unit} {found[0]}: {message}"
        for message, found in numbers.items()
    ]


class _Counts:
    """How often each value occurs: takes as much memory as there are different values, and gives exact medians."""

    def __init__(self) -> None:
        self.formats, self.spans, self.characters, self.tokens, self.sizes = (Counter() for _ in range(5))

    def add(self, messages: list[dict], format: str, sizes: list[tuple[int, int]], num_tokens: int | None) -> None:
        texts = [part["text"] or "" for message in messages for part in message["content"]]
        self.formats[format] += 1
        self.spans[image_roles(messages).count("assistant")] += 1
        self.characters[sum(map(len, texts))] += 1
        self.sizes.update(sizes)
        if num_tokens is not None:
            self.tokens[num_tokens] += 1

    def write(self, report: DatasetReport) -> None:
        report.formats = dict(self.formats)
        report.spans_per_sample = dict(sorted(self.spans.items()))
        report.characters = _summary(self.characters)
        report.tokens = _summary(self.tokens)
        report.num_images = self.sizes.total()
        report.image_sizes = _summary(self.sizes, key=lambda size: (size[0] * size[1], size))


def _summary(counter: Counter, key: Callable[[Any], Any] | None = None) -> dict:
    """Smallest, (lower) median and largest of counted values; empty if there are none."""
    if not counter:
        return {}
    values, middle = sorted(counter, key=key), (counter.total() + 1) // 2
    for median in values:
        middle -= counter[median]
        if middle <= 0:
            break
    return {"min": values[0], "median": median, "max": values[-1]}


def _join(summary: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in summary.items()) or "-"
