"""Rows of JSONL files and JSON arrays, one at a time, with their line numbers; memory holds one row, not the file."""

import json
from collections.abc import Iterator
from pathlib import Path

from .conversations import SampleError


CHUNK_CHARACTERS = 1 << 20
MAX_ROW_CHARACTERS = 1 << 26  # a row that does not end by then is malformed, and is not read on for its end

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
        number = 0
        while line := file.readline(MAX_ROW_CHARACTERS):
            number += 1
            if not line.strip():
                continue
            if len(line) == MAX_ROW_CHARACTERS and not line.endswith(b"\n"):
                problem = f"is longer than {MAX_ROW_CHARACTERS} bytes. Put each row on a line of its own."
                yield number, SampleError("line", problem), len(line)
                return
            try:
                row = json.loads(line, object_pairs_hook=_unique)
            # Nesting that is too deep raises RecursionError.
            except (ValueError, RecursionError) as error:
                row = SampleError("line", f"is no JSON: {error}. Correct or remove it.")
            yield number, _as_object(row), len(line)


def _read_array(path: Path) -> Iterator[Row]:
    decoder, buffer, line = json.JSONDecoder(object_pairs_hook=_unique), "", 1
    # Invalid bytes become surrogates, which are found as such in the row they are in.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        position, at_end, wanted = 0, False, "["  # then a row or the end, then a comma or the end, and so on
        while True:
            skipped = position
            while position < len(buffer) and buffer[position] in " \t\r\n":
                position += 1
            line += buffer.count("\n", skipped, position)
            problem = "the array has no end"
            if position < len(buffer):
                found = buffer[position]
                if wanted == "end":
                    rest = buffer[position : position + 40]
                    rest = f"stands after the end of the array: {rest!r}. A file holds one array."
                    yield line, SampleError("row", rest), 0
                    return
                if found == "]" and wanted != "[":
                    wanted, position = "end", position + 1
                    continue
                if wanted in "[,":
                    if found != wanted:
                        problem = f"expected {wanted!r}, found {found!r}"
                        yield line, _unreadable(problem), len(buffer) - position
                        return
                    wanted, position = "row", position + 1
                    continue
                try:
                    row, end = decoder.raw_decode(buffer, position)
                    yield line, _as_object(row), end - position
                    line += buffer.count("\n", position, end)
                    position, wanted = end, ","
                    continue
                except (ValueError, RecursionError) as error:
                    problem = str(error)  # or the row goes on behind the end of the buffer
            if at_end and wanted == "end":
                return
            if at_end or len(buffer) - position > MAX_ROW_CHARACTERS:
                yield line, _unreadable(problem), len(buffer) - position
                return
            # Twice as much each time, so that a long row is not parsed over and over again.
            chunk = file.read(max(CHUNK_CHARACTERS, len(buffer) - position))
            at_end = not chunk
            buffer, position = buffer[position:] + chunk, 0


def _unreadable(problem: str) -> SampleError:
    return SampleError("row", f"is no JSON: {problem}. Correct it; what follows in the array cannot be read.")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; of two values under one name the last would win, silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in an object")
    return row


def _as_object(row) -> dict | SampleError:
    if isinstance(row, (dict, SampleError)):
        return row
    return SampleError("row", f"must be a JSON object, got {row!r:.80}. Correct or remove it.")
