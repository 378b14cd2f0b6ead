"""Blocks of code in Markdown pages, to be run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ilvr_commands.main import main


REPOSITORY = Path(__file__).parents[1]
MARK = r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
BLOCK = re.compile(rf"^{MARK}```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """A block of code: its language, its text, and why it is not run, if it is not."""

    language: str
    code: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """The blocks of a page, named by its path in the repository. One may be marked `<!-- not run: why -->`."""
    found = BLOCK.finditer((REPOSITORY / page).read_text(encoding="utf-8"))
    return [Block(match["language"], match["code"], match["reason"]) for match in found]


def run(page: str, names: dict, replace: dict[str, str] | None = None) -> None:
    """Runs the Python of a page and its `ilvr` commands, from its top to its end.

    Args:
        page (`str`): path in the repository.
        names (`dict`): what the page's Python finds there and leaves there.
        replace (`dict[str, str]`, *optional*): texts that stand for what a test cannot have, each of which must be
            in the page.
    """
    unseen = set(replace or {})
    for block in blocks(page):
        code = block.code
        for old, new in (replace or {}).items():
            if old in code:
                unseen.discard(old)
                code = code.replace(old, new)
        if block.language == "python":
            compiled = compile(code, page, "exec")
            if block.reason is None:
                exec(compiled, names)
        elif block.language == "sh" and block.reason is None:
            for command in _ilvr_commands(code):
                assert main(command) == 0, command
    assert not unseen, f"{page} does not say {unseen}"


def _ilvr_commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["ilvr"]:
            yield words[1:]
