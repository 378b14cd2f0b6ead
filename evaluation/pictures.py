"""Pictures of what a model thinks: for each latent, the cells of the board that it resembles most."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import torch

from ilvr.data import FrozenLakeMap, render_board
from ilvr.data.frozen_lake import MOVES

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
    figure, axes = plt.subplots(len(dataset), max_spans + 1, figsize=(2.1 * (max_spans + 1), 2.3 * len(dataset)))
    for axis in axes.flat:
        axis.axis("off")
    for row, sample in zip(np.atleast_2d(axes), dataset):
        inputs = processor.apply_chat_template(
            [prompt_of(sample)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            **inputs, do_sample=False, return_dict_in_generate=True, output_latents=True, **generate_kwargs
        )
        new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(new_ids, skip_special_tokens=True)
        board = FrozenLakeMap(tuple(sample["board"]))
        row[0].imshow(render_board(board))
        row[0].set_title("".join(re.findall(r"\\boxed\{.*\}", answer)) or "no answer", fontsize=8)
        moves = [letter for letter in answer.split("\\boxed")[0] if letter in MOVES]
        cell = board.start
        for axis, move, latents in zip(row[1:], moves, output.latents[0]):
            cell = board.step(cell, move)
            image = render_board(board, cell, move)
            similarity = cell_similarity(model, processor, image, latents)
            pixels = image.width
            axis.imshow(image)
            axis.imshow(similarity.max(0), cmap="magma", alpha=0.45, extent=(0, pixels, pixels, 0), vmin=-1, vmax=1)
            for number, scores in enumerate(similarity):
                top, left = np.unravel_index(scores.argmax(), scores.shape)
                side = pixels / len(scores)
                offset = (number + 0.5) / len(similarity)
                axis.text(
                    (left + offset) * side, (top + 0.5) * side, str(number + 1), color="white", fontsize=8, ha="center"
                )
            axis.set_title(move, fontsize=8)
    figure.suptitle("Board and plan, then after each move: which cells the latents of that span resemble", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
