"""Helper images with outlines around the cells that were selected in them. Pure functions.

A cell is what one image token shows; a candidate is one or more cells that follow each other in raster order.
"""

import math

from PIL import Image, ImageDraw, ImageFont, ImageOps


PANEL, GAP, LINE = 256, 8, 18  # pixels: side of a panel, space between panels, height of a line of text
TEACHER_COLOR, STUDENT_COLOR = (255, 60, 0), (190, 0, 220)


def token_grid(num_tokens: int, size: tuple[int, int], grid_thw: list[int] | None = None) -> tuple[int, int]:
    """Rows and columns of an image's tokens.

    Args:
        num_tokens (`int`): tokens of the image.
        size (`tuple[int, int]`): its width and height in pixels.
        grid_thw (`list[int]`, *optional*): number of patches in time, height and width, which the backbone merges in
            squares. Without it, the grid of so many cells that comes closest to the shape of the image.
    """
    if grid_thw is not None:
        time, height, width = (int(n) for n in grid_thw)
        merge = math.isqrt(time * height * width // num_tokens)
        return height // merge, width // merge
    rows = [n for n in range(1, num_tokens + 1) if num_tokens % n == 0]
    width, height = size
    best = min(rows, key=lambda n: abs(math.log(n * n / num_tokens * width / height)))
    return best, num_tokens // best


def candidate_boxes(candidate: int, num_candidates: int, grid: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The cells of a candidate, as (top, left, bottom, right) of each row that it has cells in.

    Follows [`group_candidates`]: the first groups have one cell more if the cells do not divide evenly.
    """
    rows, columns = grid
    size, longer = divmod(rows * columns, num_candidates)
    start = candidate * size + min(candidate, longer)
    stop = start + size + (candidate < longer)
    return [
        (row, max(start - row * columns, 0), row + 1, min(stop - row * columns, columns))
        for row in range(start // columns, (stop - 1) // columns + 1)
    ]


def outline(
    image: Image.Image, grid: tuple[int, int], num_candidates: int, chosen: list[int], color: tuple[int, int, int]
) -> Image.Image:
    """A copy of an image with the chosen candidates outlined and numbered in their order, from 1.

    A candidate that is chosen more than once bears all its numbers.
    """
    image = image.copy()
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13)
    height, width = image.height / grid[0], image.width / grid[1]
    numbers = {}
    for number, candidate in enumerate(chosen, 1):
        numbers.setdefault(candidate, []).append(str(number))
    for candidate, own in numbers.items():
        boxes = candidate_boxes(candidate, num_candidates, grid)
        for top, left, bottom, right in boxes:
            box = (left * width, top * height, right * width - 1, bottom * height - 1)
            draw.rectangle(box, outline=color, width=3)
        corner = (boxes[0][1] * width + 4, boxes[0][0] * height + 3)
        label = draw.textbbox(corner, " ".join(own), font=font)
        if label[2] - label[0] + 4 < width and label[3] - label[1] + 4 < height:  # not where it would hide the cell
            draw.rectangle((label[0] - 2, label[1] - 2, label[2] + 2, label[3] + 2), fill=color)
            draw.text(corner, " ".join(own), fill="white", font=font)
    return image


def selection_row(
    image: Image.Image, grid: tuple[int, int], num_candidates: int, selected: list[int], nearest: list[int]
) -> list:
    """The three panels of a span: its helper image, plain, with the teacher's choice and with the student's."""
    image = ImageOps.contain(image, (PANEL, PANEL))
    return [
        image,
        outline(image, grid, num_candidates, selected, TEACHER_COLOR),
        outline(image, grid, num_candidates, nearest, STUDENT_COLOR),
    ]


def sheet(rows: list[tuple[str, list[Image.Image]]], headings: list[str]) -> Image.Image:
    """One picture of rows of panels, with a heading over each column and a caption over each row."""
    heights = [LINE + max(panel.height for panel in panels) + GAP for _, panels in rows]
    picture = Image.new("RGB", (GAP + len(headings) * (PANEL + GAP), LINE + GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    lefts = [GAP + column * (PANEL + GAP) for column in range(len(headings))]
    for left, heading in zip(lefts, headings):
        draw.text((left, 2), heading, fill="black", font=font)
    top = LINE + GAP
    for (caption, panels), height in zip(rows, heights):
        draw.text((GAP, top), caption, fill="black", font=font)
        for left, panel in zip(lefts, panels):
            picture.paste(panel, (left, top + LINE))
        top += height
    return picture
