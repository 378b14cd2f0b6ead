"""What the site makes of docstrings and of links to files of the repository."""

import runpy

from pages import REPOSITORY


DOCSTRING = """Draws, see [`ilvr.data.load_conversations`] and [`~transformers.Trainer`].

Args:
    > What is drawn

    width, height (`int`, *optional*, defaults to 2): in pixels.
    path (`str`): of the file,
        a PNG.
    kwargs: of [`Task`].

Returns:
    `Image`: the picture.

Raises:
    ValueError: for a width of 0.

Example:

```python
>>> draw(2)
```"""
MARKDOWN = """Draws, see [`ilvr.data.load_conversations`][ilvr.data.load_conversations] and `transformers.Trainer`.


**Args**



*What is drawn*


- **`width`**, **`height`** (`int`, *optional*, defaults to 2): in pixels.
- **`path`** (`str`): of the file,
    a PNG.
- **`kwargs`**: of [`Task`][ilvr.tasks.Task].


**Returns**


`Image`: the picture.


**Raises**


- **`ValueError`**: for a width of 0.


**Example**




```python
>>> draw(2)
```"""


def test_a_docstring_as_markdown():
    to_markdown = runpy.run_path(str(REPOSITORY / "docs/site/docstrings.py"))["to_markdown"]
    public = {"load_conversations": "ilvr.data.load_conversations", "Task": "ilvr.tasks.Task"}
    assert to_markdown(DOCSTRING, public) == MARKDOWN


def test_links_out_of_docs_lead_to_a_page():
    relinked = runpy.run_path(str(REPOSITORY / "docs/site/repository_files.py"))["relinked"]
    text = "[a](../tasks/task.py#L3) [b](data.md#load) ![c](selections.png) [d](https://x.org/y) [e](#here)"
    assert relinked(text, "docs/start.md", "start.md") == (
        "[a](repository/tasks/task.py.md#L3) [b](data.md#load) ![c](selections.png) [d](https://x.org/y) [e](#here)"
    )
    assert relinked("[a](docs/data.md) [b](CHANGELOG.md)", "README.md", "repository/README.md") == (
        "[a](../data.md) [b](CHANGELOG.md)"
    )
