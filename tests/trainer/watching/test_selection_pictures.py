"""Outlines around cells."""

import torch
from helpers import outlined
from PIL import Image

from ilvr.trainer.watching.selection_pictures import (
    STUDENT_COLOR,
    TEACHER_COLOR,
    candidate_boxes,
    outline,
    selection_row,
    sheet,
    token_grid,
)


def test_grids():
    assert token_grid(6, (96, 64), [1, 4, 6]) == (2, 3)  # 4 x 6 patches, merged by twos
    assert token_grid(6, (96, 64)) == (2, 3) and token_grid(6, (64, 96)) == (3, 2) and token_grid(4, (9, 9)) == (2, 2)


def test_boxes_follow_the_groups():
    """Six cells in 2 x 3 in four groups: two of two cells, the second of which goes round the corner."""
    assert torch.arange(6).tensor_split(4)[1].tolist() == [2, 3]
    assert candidate_boxes(0, 4, (2, 3)) == [(0, 0, 1, 2)]
    assert candidate_boxes(1, 4, (2, 3)) == [(0, 2, 1, 3), (1, 0, 2, 1)]
    assert candidate_boxes(2, 4, (2, 3)) == [(1, 1, 2, 2)] and candidate_boxes(3, 4, (2, 3)) == [(1, 2, 2, 3)]
    assert candidate_boxes(4, 6, (2, 3)) == [(1, 1, 2, 2)]


def test_outlines_are_around_the_cells():
    image = Image.new("RGB", (30, 30), "white")
    panels = selection_row(image, (3, 3), 9, [4, 0], [8, 8])
    assert [panel.size for panel in panels] == [(256, 256)] * 3
    assert outlined(panels[0], (3, 3), TEACHER_COLOR) == [] == outlined(panels[0], (3, 3), STUDENT_COLOR)
    assert outlined(panels[1], (3, 3), TEACHER_COLOR) == [0, 4]
    assert outlined(panels[2], (3, 3), STUDENT_COLOR) == [8]
    assert image.getpixel((0, 0)) == (255, 255, 255)  # the image itself is not drawn on
    tiny = outline(Image.new("RGB", (40, 40), "white"), (4, 4), 16, [5], TEACHER_COLOR)
    assert tiny.getpixel((15, 15)) == (255, 255, 255)  # no number where it would hide the cell
    picture = sheet([("a", panels), ("b", panels)], ["x", "y", "z"])
    assert picture.crop((272, 44, 528, 300)).tobytes() == panels[1].tobytes()
