"""A hook of MkDocs: files of the repository that pages link to, such as `../tasks/small_qwen.py`, become pages.

The links are right in the repository as they stand; on the site they lead to a copy of the file. And GitHub wants the
bars of code in a table escaped, where Python-Markdown shows the backslash.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")
REPOSITORY = Path(__file__).parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each linked file outside of `docs/`, and for what a linked Markdown file links to."""
    pages = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while pages:
        path, text = pages.pop()
        for linked, _ in LINK.findall(text):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), linked))
            if (
                target.startswith("docs/")
                or not (REPOSITORY / target).is_file()
                or files.get_file_from_path(uri(target))
            ):
                continue
            content = (REPOSITORY / target).read_text(encoding="utf-8")
            if target.endswith(".md"):
                pages.append((target, content))
                content = relinked(content, target, uri(target))
            else:
                content = f"# {target}\n\n````{Path(target).suffix.lstrip('.')}\n{content}````\n"
            files.append(File.generated(config, uri(target), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Leads the links of a page in `docs/` to these pages."""
    source = page.file.src_uri
    lines = markdown.splitlines(keepends=True)
    rows = (CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line[:1] == "|" else line for line in lines)
    markdown = "".join(rows)
    if source.startswith("repository/"):
        return markdown
    return relinked(markdown, f"docs/{source}", source)


def uri(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def relinked(text: str, path: str, page: str) -> str:
    """A text whose links start from `path` in the repository, with links that start from `page` on the site."""

    def leads(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        return f"]({posixpath.relpath(uri(target), posixpath.dirname(page) or '.')}{link[2] or ''})"

    return LINK.sub(leads, text)
