"""Rows of JSONL files and JSON arrays, one at a time, with their line numbers; memory holds one row, not the file."""

import json
from collections.abc import Iterator
from pathlib import Path

from .conversations import SampleError


CHUNK_CHARACTERS = 1 << 20
MAX_ROW_CHARACTERS = 1 << 26  # an array's row that does not end by then is malformed, and is not read on for its end

Row = tuple[int, dict | SampleError, int]


def read_rows(path: Path) -> Iterator[Row]:
    """Reads a file of JSON lines, or one JSON array of objects.

    Args:
        path (`Path`): a UTF-8 file.

    Yields:
        Line number (from 1), the row or what is wrong with it, and the number of bytes or characters read for it.
    """
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    yield from _read_array(path) if start.startswith(b"[") else _read_lines(path)


def _read_lines(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            # Nesting that is too deep raises RecursionError.
            except (ValueError, RecursionError) as error:
                row = SampleError("line", f"is no JSON: {error}. Correct or remove it.")
            yield number, _as_object(row), len(line)


def _read_array(path: Path) -> Iterator[Row]:
    decoder, buffer, line = json.JSONDecoder(), "", 1
    # Invalid bytes become surrogates, which are found as such in the row they are in.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        position, is_open, at_end = 0, False, False
        while True:
            # What lies between the rows: blanks, commas and the opening bracket.
            skipped = position
            while position < len(buffer) and (
                buffer[position] in " \t\r\n," or (not is_open and buffer[position] == "[")
            ):
                is_open = is_open or buffer[position] == "["
                position += 1
            line += buffer.count("\n", skipped, position)
            problem = "the array has no end"
            if position < len(buffer):
                if buffer[position] == "]":
                    return
                try:
                    row, end = decoder.raw_decode(buffer, position)
                    yield line, _as_object(row), end - position
                    line += buffer.count("\n", position, end)
                    position = end
                    continue
                except (ValueError, RecursionError) as error:
                    problem = str(error)  # or the row goes on behind the end of the buffer
            if at_end or len(buffer) - position > MAX_ROW_CHARACTERS:
                rest = f"is no JSON: {problem}. Correct it; what follows in the array cannot be read."
                yield line, SampleError("row", rest), len(buffer) - position
                return
            # Twice as much each time, so that a long row is not parsed over and over again.
            chunk = file.read(max(CHUNK_CHARACTERS, len(buffer) - position))
            at_end = not chunk
            buffer, position = buffer[position:] + chunk, 0


def _as_object(row) -> dict | SampleError:
    if isinstance(row, (dict, SampleError)):
        return row
    return SampleError("row", f"must be a JSON object, got {row!r:.80}. Correct or remove it.")
