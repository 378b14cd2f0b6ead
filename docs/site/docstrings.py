"""An extension of griffe: docstrings in Hugging Face's form (`name (`type`, *optional*): text`) as Markdown."""

import re
import textwrap
from typing import Any

import griffe


SECTION = re.compile(r"^(Args|Returns|Raises|Example):\s*(.*)$")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")


class HuggingFaceDocstrings(griffe.Extension):
    """Turns the sections of each docstring into lists, and the names of public objects into links to them."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        rooms = [pkg, *pkg.modules.values()]
        public = {name: f"{room.path}.{name}" for room in rooms for name in room.exports or ()}
        for item in _objects(pkg):
            if item.docstring is not None:
                item.docstring.value = to_markdown(item.docstring.value, public)


def _objects(item: griffe.Object) -> Any:
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from _objects(member)


def to_markdown(text: str, public: dict[str, str]) -> str:
    """A docstring in Hugging Face's form as Markdown.

    Args:
        text (`str`): without its common indentation.
        public (`dict[str, str]`): paths of the objects that have a place on the site, by their names.
    """
    parts, lines = [], text.replace("> [!NOTE]", "> **Note**:").splitlines()
    while lines:
        section = SECTION.match(lines[0])
        if section is None:
            parts.append(lines.pop(0))
            continue
        lines.pop(0)
        size = next((i for i, line in enumerate(lines) if line and line[0] != " "), len(lines))
        block = textwrap.dedent("\n".join(lines[:size])).strip("\n")
        if section[1] == "Example":  # its code is not indented
            block, size = "", 0
        parts += [
            "",
            f"**{section[1]}**",
            "",
            section[2],
            *(_entries(block) if section[1] != "Returns" else [block]),
            "",
        ]
        del lines[:size]
    return REFERENCE.sub(lambda link: _link(link[1], public), "\n".join(parts))


def _entries(block: str) -> list[str]:
    """A list item for each argument, with its further lines; `> Title` lines part the list into groups."""
    out = []
    for line in block.splitlines():
        if line.startswith("> "):
            out += ["", f"*{line[2:]}*", ""]
        elif line and line[0] != " ":
            head = re.match(r"([\w, ]+?)( \(|:)", line)
            names = head[1] if head else ""
            marked = ", ".join(f"**`{name.strip()}`**" for name in names.split(",")) if names else ""
            out.append(f"- {marked}{line[len(names) :]}")
        else:
            out.append(line)
    return out


def _link(name: str, public: dict[str, str]) -> str:
    first, _, rest = name.removeprefix("ilvr.").partition(".")
    path = public.get(name.rpartition(".")[2]) or public.get(first)
    if path is None:
        return f"`{name}`"
    return f"[`{name.rpartition('.')[2] if not rest else name}`][{path}]"
