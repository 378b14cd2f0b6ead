"""Draws the pictures of docs/tasks.md: a question of each task and what its steps lead to.

python examples/draw_tasks.py docs
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ilvr.data.images import open_image
from ilvr.tasks import load_task


FEW = {"boards": 1, "test_boards": 1, "lengths": (3, 3)}
SETTINGS = {
    "shifts": FEW,
    "glyphs": {**FEW, "size": 3, "touch": 1.0, "weights": {"swap": 1, "turn": 1, "print": 1}, "seed": 9},
    "frozen_lake": {"maps": {4: 1}, "test_maps": {4: 1}},
}
SIDE, GAP, LINE = 176, 12, 22  # pixels


def strip(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures in a row, each under its caption."""
    drawn = Image.new("RGB", (len(pictures) * (SIDE + GAP) - GAP, SIDE + LINE), "white")
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(size=14)
    for number, (caption, picture) in enumerate(pictures):
        left = number * (SIDE + GAP)
        pen.text((left, 2), caption, "black", font)
        drawn.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, LINE))
    return drawn


def main(folder: Path) -> None:
    for name, settings in SETTINGS.items():
        task = load_task(name, **settings)
        sample = task.dataset("train")[0]
        first = open_image(sample["images"][0], "board")
        words = "".join(f" {move}" for move in sample["answer"].split())  # those of a plan's trace are its moves
        tile = json.loads(sample["metadata"]).get("tile")
        pictures = [(f"follow {tile}" if tile else "the board", first), *task.draw(sample, words)[:3]]
        strip(pictures).quantize(128).save(folder / f"tasks_{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
