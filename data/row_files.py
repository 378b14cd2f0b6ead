"""Rows of JSONL files and JSON arrays, one at a time, with their line numbers; memory holds one row, not the file."""

import json
from collections import Counter
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path

from .conversations import SampleError


CHUNK_CHARACTERS = 1 << 20
MAX_ROW_CHARACTERS = 1 << 26  # a row that does not end by then is malformed, and is not read on for its end
# A row is stored as JSON again, and read by others, whose nesting is bounded by Python's recursion limit, too.
MAX_DEPTH = 100
_BLANKS = " \t\r\n"

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
            if len(line) == MAX_ROW_CHARACTERS and not line.endswith(b"\n"):
                problem = f"is longer than {MAX_ROW_CHARACTERS} bytes. Split it; what follows cannot be read."
                yield number, SampleError("line", problem), len(line)
                return
            if not line.strip():
                continue
            try:
                row = _decoder.decode(line.decode("utf-8-sig"))
            # Nesting that is too deep raises RecursionError.
            except (ValueError, RecursionError) as error:
                row = SampleError("line", f"is no JSON: {error}. Correct or remove it.")
            yield number, _as_object(row), len(line)


def _read_array(path: Path) -> Iterator[Row]:
    # Invalid bytes become surrogates, which are found as such in the row they are in.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = _Buffer(file)
        text.next_character()
        text.position += 1  # the opening bracket
        is_first = True
        while True:
            found, start = text.next_character(), text.taken
            if found == "," and not is_first:
                text.position += 1
                found = text.next_character()
            elif found not in ("]", "") and not is_first:
                yield text.line, _unreadable("a comma is missing between two rows"), 0
                return
            elif found == "]":
                break
            try:
                row, line = text.read_value()
            except (ValueError, RecursionError) as error:
                problem = str(error) if found else "the array has no end"
                yield text.line, _unreadable(problem), text.dropped + len(text.text) - start
                return
            yield line, _as_object(row), text.taken - start
            is_first = False
        text.position += 1
        if text.next_character():
            behind = "the file goes on behind the end of the array. Make one array of it, or a row a line."
            yield text.line, SampleError("row", behind), 0


class _Buffer:
    """A window on a file's text, which moves on as values are taken."""

    def __init__(self, file: TextIOBase) -> None:
        self.file, self.text, self.position = file, "", 0
        self.line = 1  # of `position`
        self.dropped = 0  # characters before the window

    @property
    def taken(self) -> int:
        """Characters before `position`."""
        return self.dropped + self.position

    def next_character(self) -> str:
        """Moves to the next character that is no blank; empty at the end of the file."""
        while True:
            start = self.position
            while self.position < len(self.text) and self.text[self.position] in _BLANKS:
                self.position += 1
            self.line += self.text.count("\n", start, self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def read_value(self) -> tuple[object, int]:
        """The JSON value at `position`, and its line."""
        while True:
            try:
                value, end = _decoder.raw_decode(self.text, self.position)
            except (ValueError, RecursionError):  # the value may go on behind the window
                if len(self.text) - self.position > MAX_ROW_CHARACTERS or not self.grow():
                    raise
                continue
            if end == len(self.text) and self.grow():
                continue  # a number may go on
            line = self.line
            self.line += self.text.count("\n", self.position, end)
            self.position = end
            return value, line

    def grow(self) -> bool:
        """Reads on: twice as much each time, so that a long row is not parsed over and over again."""
        chunk = self.file.read(max(CHUNK_CHARACTERS, len(self.text) - self.position))
        self.dropped += self.position
        self.text, self.position = self.text[self.position :] + chunk, 0
        return bool(chunk)


def _object(pairs: list[tuple[str, object]]) -> dict | SampleError:
    """An object, or what is wrong with it: of two values for one key, JSON leaves open which counts."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    counts = Counter(name for name, _ in pairs)
    name = next(name for name, count in counts.items() if count > 1)
    return SampleError("row", f"the key {name!r} is given {counts[name]} times. Keep one of them.")


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _unreadable(problem: str) -> SampleError:
    return SampleError("row", f"is no JSON: {problem}. Correct it; what follows in the array cannot be read.")


def _as_object(row: object) -> dict | SampleError:
    problem = _find_problem(row, MAX_DEPTH)
    if problem is not None:
        return problem
    if not isinstance(row, dict):
        return SampleError("row", f"must be a JSON object, got {row!r:.80}. Correct or remove it.")
    return row


def _find_problem(value: object, depth: int) -> SampleError | None:
    """The first object with a key given twice, or nesting that goes deeper than `depth`."""
    if isinstance(value, SampleError):
        return value
    if not isinstance(value, (dict, list)):
        return None
    if depth == 0:
        return SampleError("row", f"is nested more than {MAX_DEPTH} deep. Flatten it or leave the sample out.")
    for child in value.values() if isinstance(value, dict) else value:
        if (problem := _find_problem(child, depth - 1)) is not None:
            return problem
    return None
