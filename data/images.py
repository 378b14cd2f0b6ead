"""Images of a sample: located inside one folder, measured by their header, decoded when they are needed."""

import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from .conversations import SampleError


PILImage.init()
# Formats of photos and of the web. Others are refused: PIL would hand EPS to Ghostscript, which runs it as a program.
IMAGE_FORMATS = [
    format
    for format in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
    if format in PILImage.OPEN
]


def locate_image(value: object, field: str, image_root: Path | None) -> dict:
    """Where an image is read from; nothing is opened.

    Args:
        value (`str` or `dict`): a path, absolute or relative to `image_root`, or `datasets`' dict of `bytes`, `path`.
        field (`str`): names the image in errors.
        image_root (`Path`, *optional*): resolved folder that holds all images; `None` if only embedded images are
            allowed.

    Returns:
        `dict` with `bytes` and `path`, one of them `None`.

    Raises:
        SampleError: if there is no path, no such file, or it lies outside `image_root`, also by way of a link.
    """
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            # Without its path, which `datasets` would prefer to the bytes if such a file happened to exist here.
            return {"bytes": value["bytes"], "path": None}
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise SampleError(field, f"an image must be given by its path, got {value!r:.80}. Correct the field.")
    if image_root is None:
        raise SampleError(
            field, f"the image {value} is not embedded in the data. Say which folder holds it: image_root."
        )
    try:
        path = Path(os.path.realpath(image_root / value))  # `Path.resolve` stops at a loop of links with RuntimeError
    except ValueError as error:  # a null byte, or half of a surrogate pair
        raise SampleError(field, f"an image must be given by its path, got {value!r:.80}. Correct it.") from error
    if not path.is_relative_to(image_root):
        raise SampleError(
            field,
            f"the image {value} lies outside image_root ({image_root}). Move it there, or choose another image_root.",
        )
    if not os.path.isfile(path):  # `Path.is_file` raises for a name that is too long
        raise SampleError(field, f"there is no file {path}. Correct the path, or image_root, or leave the sample out.")
    return {"bytes": None, "path": str(path)}


def open_image(image: PILImage.Image | str | dict, where: str) -> PILImage.Image:
    """Decodes an image of a sample, to the pixels that `transformers.image_utils.load_image` gives at inference.

    Args:
        image (`PIL.Image.Image`, `str` or `dict`): an image, a path, or `datasets`' dict of `bytes` and `path`.
        where (`str`): names the image in errors.

    Returns:
        `PIL.Image.Image`: RGB, turned as its Exif orientation says; transparent pixels have their stored colour.

    Raises:
        ValueError: if there is no such file, it is no image of `IMAGE_FORMATS`, it has more than 8 bits a channel, or
            so many pixels that PIL suspects a decompression bomb; the latter two are seen in the header, before
            anything is decoded.
    """
    with _opened(image, where) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def image_size(image: PILImage.Image | str | dict, where: str) -> tuple[int, int]:
    """Width and height in pixels of what [`open_image`] gives, from the header; arguments and errors as there."""
    with _opened(image, where) as opened:
        width, height = opened.size
        # PIL's own `getexif` for PNG decodes the pixels to look behind them; its size for TIFF is the turned one.
        orientation = PILImage.Image.getexif(opened).get(ExifTags.Base.Orientation)
        return (height, width) if orientation in (5, 6, 7, 8) and opened.format != "TIFF" else (width, height)


@contextmanager
def _opened(image: Any, where: str) -> Generator[PILImage.Image]:
    if isinstance(image, PILImage.Image):
        _check_mode(image, where)
        yield image
        return
    source = image.get("path") if isinstance(image, dict) else image
    data = image.get("bytes") if isinstance(image, dict) else None
    name = f"{where} ({source or 'bytes'})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(io.BytesIO(data) if data is not None else source, formats=IMAGE_FORMATS) as opened:
                _check_mode(opened, name)
                yield opened
    except _ModeError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{where}: there is no file {source}. Correct the path or leave the sample out.") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large, as a decompression bomb would be: {error} Shrink it.") from error
    # The decoders of a broken file raise what they like: RuntimeError (AVIF), SyntaxError (PNG), struct.error, …
    except Exception as error:
        raise ValueError(
            f"{name} is no image that can be read: {error}. Replace it by a {', '.join(IMAGE_FORMATS)} file."
        ) from error


class _ModeError(ValueError):
    pass


def _check_mode(image: PILImage.Image, name: str) -> None:
    if image.mode == "F" or image.mode.startswith("I"):
        raise _ModeError(
            f"{name} has more than 8 bits a channel (mode {image.mode}), which the change to RGB would clip to white. "
            "Scale it to 8 bits."
        )
