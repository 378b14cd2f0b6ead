"""The cache of generated rows: found again by the same settings, and not after the code has changed."""

import importlib.util
import sys

import pytest
from datasets import disable_progress_bars

from ilvr.tasks.generation import generate_dataset


SOURCE = """
def rows(number):
    for i in range(number):
        open({log!r}, "a").write("row ")
        yield {{"messages": [], "images": [], "answer": {answer!r}, "metadata": str(i)}}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a module with a generator of rows that say `answer`, and imports it."""
    disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def load(answer):
        file = tmp_path / "own" / "rows_of_a_task.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(SOURCE.format(answer=answer, log=str(tmp_path / "log")))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        spec = importlib.util.spec_from_file_location("rows_of_a_task", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "rows_of_a_task", module)
        spec.loader.exec_module(module)
        return module.rows

    return load


def test_changed_code_makes_new_rows_and_the_same_code_does_not(load, tmp_path):
    one = generate_dataset(load("old"), "train", {"number": 2})
    again = generate_dataset(load("old"), "train", {"number": 2})
    assert one["answer"][:] == again["answer"][:] == ["old", "old"] and one.split == "train"
    assert (tmp_path / "log").read_text() == "row row "  # the second time they were found
    assert generate_dataset(load("old"), "train", {"number": 3})["answer"][:] == ["old"] * 3
    assert generate_dataset(load("new"), "train", {"number": 2})["answer"][:] == ["new", "new"]
