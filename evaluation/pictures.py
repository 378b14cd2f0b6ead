"""Pictures of a model's latents (for each, the patches of an image that it resembles), and of its training.

N image tokens, K latents of a span, D hidden.
"""

import io
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import prompt_of
from ilvr.data.conversations import last_boxed
from ilvr.trainer.inputs.image_features import flatten_features, image_outputs
from ilvr.trainer.watching.selection_pictures import token_grid

from .generation import answer_with_latents


Draw = Callable[[dict[str, Any], str], list[tuple[str, Image.Image]]]
COLOR_MAP, COLOR_RANGE = "cividis", Normalize(-1, 1)
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
CAPTION = (
    "Left: the question's image and the answer. Right: each span of latents over what it is about. Colour: cosine of "
    "the nearest latent and the image's tokens, both less the tokens' mean. Numbers: the latents of the span in their "
    "order, each where it resembles the image most."
)
UNITS = {"ce_loss": "nats a token", "alignment_loss": "1 - cosine"}


class Panel(NamedTuple):
    """One image of a picture.

    Args:
        caption (`str`): above it.
        image (`PIL.Image.Image`).
        similarity (`np.ndarray` of shape `(K, rows, columns)`, *optional*): of [`patch_similarity`], laid over it.
    """

    caption: str
    image: Image.Image
    similarity: np.ndarray | None = None


class LatentFigure(Figure):
    """A figure that a notebook shows as it is, without pyplot and whatever its backend is."""

    def _repr_png_(self) -> bytes:
        self.savefig(file := io.BytesIO())
        return file.getvalue()


def latent_figure(lines: Sequence[Sequence[Panel]]) -> LatentFigure:
    """Lines of panels, with the bar of colours and what they mean."""
    columns = max(len(line) for line in lines)
    width = max(5, 2.1 * columns + 0.8)  # inches
    tallest = [max(panel.image.height / panel.image.width for panel in line) for line in lines]
    heights = [2 * min(ratio, 1.5) + 0.3 for ratio in tallest]
    figure = LatentFigure(figsize=(width, sum(heights) + 0.9), dpi=110, layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(axes, lines):
        for axis, (caption, image, similarity) in zip(row, line):
            axis.set_title(caption, fontsize=8)
            axis.imshow(image)
            if similarity is not None:
                _shade(axis, image, similarity)
    bar = figure.colorbar(ScalarMappable(COLOR_RANGE, COLOR_MAP), ax=axes, shrink=0.6, aspect=30)
    bar.set_label("cosine", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel(textwrap.fill(CAPTION, int(16 * width)), fontsize=7)
    return figure


@torch.inference_mode()
def patch_similarity(
    model: ILVRForConditionalGeneration, processor: ILVRProcessor, image: Image.Image, latents: torch.Tensor
) -> np.ndarray:
    """Cosine of each latent with the vision feature of each image token, both less the mean of the tokens.

    The features of an image share one large direction; without it a latent is told apart by what is particular.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        image (`PIL.Image.Image`): of any size. A backbone that cuts images into tiles has no one grid of tokens for
            those it cuts, and its picture cannot be read.
        latents (`torch.Tensor` of shape `(K, D)`).

    Returns:
        `np.ndarray` of shape `(K, rows, columns)`.
    """
    inputs = processor.image_processor([image], return_tensors="pt").to(model.device)
    features = flatten_features(image_outputs(dict(inputs), model.model.core).pooler_output).float()  # (N, D)
    centre = features.mean(0)
    similarity = torch.cosine_similarity(
        (latents.float() - centre).unsqueeze(1), (features - centre).unsqueeze(0), dim=-1
    )  # (K, N)
    grid = token_grid(len(features), image.size, inputs["image_grid_thw"][0] if "image_grid_thw" in inputs else None)
    return similarity.view(-1, *grid).cpu().numpy()


def draw_latents(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    dataset: Dataset,
    path: str | Path,
    *,
    draw: Draw | None = None,
    is_right: Callable[[dict[str, Any], str], bool] | None = None,
    max_spans: int = 6,
    **generate_kwargs: Any,
) -> None:
    """Answers a few samples, and writes the picture of [`draw_answers`].

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        dataset (`Dataset`): a few samples.
        path, draw, is_right, max_spans: as in [`draw_answers`].
        generate_kwargs: passed to `generate`.

    Raises:
        ValueError: if a question has no image.
    """
    rows = [(sample, *answer_with_latents(model, processor, sample, **generate_kwargs)) for sample in dataset]
    draw_answers(model, processor, rows, path, draw=draw, is_right=is_right, max_spans=max_spans)


def draw_answers(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    rows: Sequence[tuple[dict[str, Any], str, torch.Tensor]],
    path: str | Path | IO[bytes],
    *,
    draw: Draw | None = None,
    is_right: Callable[[dict[str, Any], str], bool] | None = None,
    max_spans: int = 6,
) -> None:
    """Writes a picture with a row for each answer: the image and the answer, then the latents of each span.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        rows (`Sequence[tuple]`): samples, each with an answer and its latents (spans, K, D).
        path (`str`, `Path` or binary file): of the PNG.
        draw (`Callable`, *optional*): for a sample and an answer, caption and picture of what each span is about, such
            as [`~ilvr.tasks.Task.draw`]; the question's first image, where there is none.
        is_right (`Callable`, *optional*): whether an answer to a sample is right, which is marked.
        max_spans (`int`, *optional*, defaults to 6): spans drawn of each sample.

    Raises:
        ValueError: if a question has no image.
    """
    lines = []
    for sample, answer, latents in rows:
        question = first_image(sample)
        mark = "" if is_right is None else "  right" if is_right(sample, answer) else "  wrong"
        box = last_boxed(answer)
        meant = draw(sample, answer) if draw else []
        meant += [(f"span {number + 1}", question) for number in range(len(meant), len(latents))]
        line = [Panel(("no answer" if box is None else shorten(box)) + mark, question)]
        for (caption, image), span in list(zip(meant, latents))[:max_spans]:
            line.append(Panel(caption, image, patch_similarity(model, processor, image, span)))
        lines.append(line)
    latent_figure(lines).savefig(path)


def draw_curves(
    states: dict[str, str | Path], path: str | Path, names: Sequence[str] = ("ce_loss", "alignment_loss")
) -> None:
    """Plots what training runs logged, one panel for each name, the runs one after another.

    They are not laid over each other: each has its own words to predict, and the height of one curve says nothing
    about that of another.

    Args:
        states (`dict[str, Path]`): by run, in their order, the `trainer_state.json` that `Trainer.save_state` writes.
        path (`str` or `Path`): of the PNG.
        names (`Sequence[str]`, *optional*): logged quantities, drawn on a logarithmic axis.
    """
    logs = {run: json.loads(Path(state).read_text()) for run, state in states.items()}
    figure = Figure(figsize=(5.5 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        start = 0
        for (run, log), color in zip(logs.items(), [*COLORS] * len(logs)):
            points = [(start + entry["step"], entry[name]) for entry in log["log_history"] if name in entry]
            if points:
                axis.semilogy(*zip(*points), label=run, color=color, marker=".", markersize=3)
            start += log["global_step"]
            axis.axvline(start, color="0.85", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel="optimizer steps, the runs one after another", ylabel=UNITS.get(name))
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(LogFormatter(minor_thresholds=(2, 0.5)))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def first_image(sample: dict[str, Any]) -> Image.Image:
    """The first image that a question shows.

    Raises:
        ValueError: if it shows none.
    """
    parts = [part for message in prompt_of(sample) for part in message["content"]]
    image = next((part["image"] for part in parts if part["type"] == "image"), None)
    if image is None:
        raise ValueError("A sample asks about no image. Choose samples whose question has one.")
    return image


def shorten(text: str, length: int = 24) -> str:
    """The start of a text."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _shade(axis: Axes, image: Image.Image, similarity: np.ndarray) -> None:
    """Shades an image by the nearest latent of each token, and writes each latent's number on its nearest token."""
    _, rows, columns = similarity.shape
    extent = (0, image.width, image.height, 0)
    axis.imshow(similarity.max(0), cmap=COLOR_MAP, norm=COLOR_RANGE, alpha=0.45, extent=extent, aspect="auto")
    axis.set_aspect("equal")
    for number, scores in enumerate(similarity):
        top, left = np.unravel_index(scores.argmax(), scores.shape)
        x = (left + (number + 0.5) / len(similarity)) * image.width / columns
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0}
        y = (top + 0.5) * image.height / rows
        axis.text(x, y, str(number + 1), color="white", fontsize=7, ha="center", va="center", bbox=box)
