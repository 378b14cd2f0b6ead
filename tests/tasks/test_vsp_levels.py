"""Unseen levels of VSP: read again as VSP's own questions are, solvable, pictured as their boards say."""

import random

import numpy as np
import pytest
from PIL import Image

from ilvr.evaluation import load_questions
from ilvr.tasks.frozen_lake import FrozenLakeMap, render_board, write_vsp_levels


WORDS = "Plan a path on <image> and put it into \\boxed{}."


def test_levels_are_questions_of_vsp(tmp_path):
    questions = load_questions(str(write_vsp_levels(tmp_path / "unseen", WORDS, {7: 2, 8: 3})))
    assert [len(board) for board in questions.references] == [7, 7, 8, 8, 8] and questions.metric_name == "frozen_lake"
    maps = [FrozenLakeMap(tuple(board)) for board in questions.references]
    assert len(set(maps)) == 5
    for board, sample in zip(maps, questions.dataset):
        assert board.start in board.distances and board.split(0) == "test"
        assert (np.asarray(Image.open(sample["images"][0]["path"])) == np.asarray(render_board(board))).all()
        assert [part["type"] for part in sample["messages"][0]["content"]] == ["text", "image", "text"]
    plans = ["\\boxed{" + " ".join(board.shortest_path(random.Random(0))) + "}" for board in maps]
    found = questions.score(plans)
    assert (found["end_on_goal"], found["first_hit"], found["count_7x7"], found["count_8x8"]) == (1, 1, 2, 3)
    assert questions.score(["\\boxed{}"] * 5)["end_on_goal"] == 0
    again = write_vsp_levels(tmp_path / "again", WORDS, {7: 2, 8: 3}).read_text()
    assert again == (tmp_path / "unseen" / "levels.jsonl").read_text()
    assert again != write_vsp_levels(tmp_path / "other", WORDS, {7: 2, 8: 3}, seed=1).read_text()
    with Image.open(tmp_path / "unseen" / "level_8" / "2.png") as picture:
        assert picture.size == (512, 512)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"levels are for boards of size 2 to 8, got sizes \[9\]"):
        write_vsp_levels(tmp_path / "new", WORDS, {9: 1})
    with pytest.raises(ValueError, match="words has 2 times <image>"):
        write_vsp_levels(tmp_path / "new", WORDS + "<image>", {7: 1})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty. Name a new folder"):
        write_vsp_levels(tmp_path, WORDS, {7: 1})
