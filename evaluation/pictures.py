"""Pictures of what a model thinks (for each latent, the cells of the board that it resembles), and of its training."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch

from ilvr.tasks.frozen_lake import FrozenLakeMap, render_board
from ilvr.tasks.frozen_lake.board import MOVES

from .generation import prompt_of


matplotlib.use("Agg")

from matplotlib import pyplot as plt


@torch.inference_mode()
def cell_similarity(model, processor, image, latents) -> np.ndarray:
    """Cosine of each latent with the vision feature of each cell, both less the mean of the cells.

    The features of a board share one large direction; without it a latent is told apart by what is particular.

    Args:
        image (`PIL.Image.Image`): a board, one visual token a cell.
        latents (`torch.Tensor` of shape `(K, D)`).

    Returns:
        `np.ndarray` of shape `(K, rows, columns)`.
    """
    inputs = processor.image_processor([image], return_tensors="pt").to(model.device)
    features = model.get_image_features(**inputs, return_dict=True).pooler_output[0].float()  # (N, D)
    size = int(len(features) ** 0.5)
    centre = features.mean(0)
    similarity = torch.cosine_similarity(
        (latents.float() - centre).unsqueeze(1), (features - centre).unsqueeze(0), dim=-1
    )
    return similarity.view(-1, size, size).cpu().numpy()


@torch.inference_mode()
def draw_latents(model, processor, dataset, path: str | Path, *, max_spans: int = 6, **generate_kwargs):
    """Writes a picture with a row for each sample: the board and the plan, then each span on the board after its move.

    Shading is the similarity of the nearest latent to each cell; the numbers are the latents, on the cell that each
    resembles most.

    Args:
        dataset (`Dataset`): a few samples of the task `plan_trace`.
        path (`str` or `Path`): of the PNG.
        max_spans (`int`, *optional*, defaults to 6): spans drawn of each sample.
        generate_kwargs: passed to `generate`.
    """
    model.eval()
    thoughts = [_think(model, processor, sample, generate_kwargs) for sample in dataset]
    columns = 1 + min(max_spans, max(len(latents) for _, latents in thoughts))
    size = (2.1 * columns, 2.3 * len(dataset) + 0.3)
    figure, axes = plt.subplots(len(dataset), columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, sample, (answer, latents) in zip(axes, dataset, thoughts):
        cell = (board := FrozenLakeMap(tuple(sample["board"]))).start
        row[0].imshow(render_board(board))
        boxes = re.findall(r"\\boxed\{[^}]*\}", answer)
        row[0].set_title(boxes[-1].removeprefix("\\boxed") if boxes else "no answer", fontsize=8)
        moves = [letter for letter in answer.split("\\boxed")[0] if letter in MOVES]
        for axis, move, span in zip(row[1:], moves, latents):
            cell = board.step(cell, move)
            image = render_board(board, cell, move)
            _draw_span(axis, image, cell_similarity(model, processor, image, span))
            axis.set_title(move, fontsize=8)
    figure.suptitle("Board and plan; after each move, the cells that the latents of its span resemble", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(states: dict[str, Path], path: str | Path, names: tuple[str, ...] = ("ce_loss", "alignment_loss")):
    """Plots what the training runs logged, one panel for each name.

    Args:
        states (`dict[str, Path]`): by run, the `trainer_state.json` that `Trainer.save_state` writes.
        path (`str` or `Path`): of the PNG.
        names (`tuple[str, ...]`, *optional*): logged quantities, drawn on a logarithmic axis.
    """
    logs = {run: json.loads(Path(state).read_text())["log_history"] for run, state in states.items()}
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.2))
    for axis, name in zip(axes, names):
        for run, log in logs.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                axis.semilogy(*zip(*points), label=run)
        axis.set(title=name, xlabel="optimizer step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _think(model, processor, sample: dict, generate_kwargs: dict) -> tuple[str, torch.Tensor]:
    """The model's answer to a sample, and its latents (spans, K, D)."""
    inputs = processor.apply_chat_template(
        [prompt_of(sample)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_latents": True, **generate_kwargs}
    output = model.generate(**inputs, **settings)
    new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new_ids, skip_special_tokens=True), output.latents[0]


def _draw_span(axis, image, similarity: np.ndarray):
    """Shades the cells of a board by their nearest latent, and writes each latent's number on its nearest cell."""
    pixels = image.width
    axis.imshow(image)
    axis.imshow(similarity.max(0), cmap="magma", alpha=0.45, extent=(0, pixels, pixels, 0), vmin=-1, vmax=1)
    side = pixels / similarity.shape[1]
    for number, scores in enumerate(similarity):
        top, left = np.unravel_index(scores.argmax(), scores.shape)
        x = (left + (number + 0.5) / len(similarity)) * side
        box = {"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0}
        axis.text(x, (top + 0.5) * side, str(number + 1), color="white", fontsize=7, ha="center", bbox=box)
