"""Images of a sample: located inside one folder, measured by their header, decoded when they are needed."""

import io
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from .conversations import SampleError


# What cameras, browsers and drawing programs write. Pillow would also take formats that start other programs
# (PostScript) and rare ones whose decoders fail in ways of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
TURNED = {5, 6, 7, 8}  # Exif orientations that swap width and height


def locate_image(value, field: str, image_root: Path | None) -> dict:
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


def open_image(image, where: str) -> PILImage.Image:
    """Decodes an image of a sample.

    Args:
        image (`PIL.Image.Image`, `str` or `dict`): an image, a path, or `datasets`' dict of `bytes` and `path`.
        where (`str`): names the image in errors.

    Returns:
        `PIL.Image.Image`: RGB, turned upright as its Exif data says, as transformers' `load_image` does at inference.

    Raises:
        ValueError: if there is no such file, it is no image of a known format, its pixels have no 8 bits to a colour,
            or it has so many pixels that PIL suspects a decompression bomb; that is seen in the header, before
            anything is decoded.
    """
    if isinstance(image, PILImage.Image):
        return _rgb(image, where)
    with _opened(image, where) as opened:
        return _rgb(opened, where)


def image_size(image, where: str) -> tuple[int, int]:
    """Width and height in pixels of what [`open_image`] returns, from the header; its arguments and errors."""
    if isinstance(image, PILImage.Image):
        return _upright_size(image)
    with _opened(image, where) as opened:
        return _upright_size(opened)


def _upright_size(image: PILImage.Image) -> tuple[int, int]:
    exif, (width, height) = PILImage.Exif(), image.size
    if image.format == "TIFF":
        return width, height  # Pillow has turned it already
    if image.format == "PNG":
        exif.load(image.info.get("exif", b""))  # `getexif` would decode the pixels, to look behind them
    else:
        exif = image.getexif()
    return (height, width) if exif.get(ExifTags.Base.Orientation) in TURNED else (width, height)


def _rgb(image: PILImage.Image, where: str) -> PILImage.Image:
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{where} has pixels of mode {image.mode} (16 or more bits), which would be clipped to white. Scale them "
            "to 8 bits."
        )
    return ImageOps.exif_transpose(image).convert("RGB")


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow knows."""
    PILImage.init()
    return tuple(name for name in FORMATS if name in PILImage.OPEN)


@contextmanager
def _opened(image, where: str) -> Generator[PILImage.Image]:
    source = image.get("path") if isinstance(image, dict) else image
    data = image.get("bytes") if isinstance(image, dict) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(io.BytesIO(data) if data is not None else source, formats=_formats()) as opened:
                yield opened
    except FileNotFoundError as error:
        raise ValueError(f"{where}: there is no file {source}. Correct the path or leave the sample out.") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ValueError(
            f"{where} ({source or 'bytes'}) is too large, as a decompression bomb would be: {error} Shrink it."
        ) from error
    # PIL raises ValueError for oversized text chunks, SyntaxError for some broken PNG files, and others as it likes.
    except (OSError, AttributeError, IndexError, KeyError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        raise ValueError(
            f"{where} ({source or 'bytes'}) is no image that can be read: {error}. Replace it."
        ) from error
