"""Pictures, during training, of what the teacher selects and of what the student's latents resemble."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState

from ilvr.data.images import open_image

from ..inputs.columns import HELPER_IMAGES
from ..inputs.data_collator import HELPER_PREFIX, LatentBatch
from ..inputs.data_preparation import prepare_for
from ..selection import Selection
from .selection_pictures import selection_row, sheet, token_grid
from .trackers import tensorboard_writer, trackio_module


HEADINGS = ["helper image", "selected by the teacher", "nearest to the student's latents"]
MAX_SPANS = 4  # drawn of a sample: the picture has a row for each


@torch.no_grad()
def compare_latents(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[Selection | None, torch.Tensor | None]:
    """What the teacher selects in the helper images of a batch, and what the student predicts in the same places.

    Leaves no trace: no metric, no gradient, the same random numbers afterwards. All ranks have to call it.

    Args:
        trainer ([`ILVRTrainer`]): of stage 1.
        batch (`dict`): of the data collator.

    Returns:
        `tuple`: the [`Selection`] and the predicted latents (B, S, K, D); `None` for a batch without spans.
    """
    latent_batch = LatentBatch.of(trainer._prepare_inputs(batch))
    device, was_training = trainer.accelerator.device, trainer.model.training
    trainer.model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), trainer.accelerator.autocast():
        latent_batch.inputs = trainer.encode_user_images(latent_batch.inputs)
        selection = trainer.select_targets(latent_batch)
        targets, target_mask = (None, None) if selection is None else (selection.targets, selection.mask)
        outputs = trainer.student(
            **latent_batch.inputs,
            latent_values=targets,
            latent_mask=target_mask,
            attention_rule=trainer.attention_rule,
            logits_to_keep=1,
            use_cache=False,
        )
    trainer.model.train(was_training)
    return selection, outputs.predicted_latents


class SelectionDrawingCallback(TrainerCallback):
    """
    Draws, every few steps of stage 1 and for the same samples, each helper image with the cells that the teacher
    selects and, beside it, those that the student's latents resemble most (by cosine, as in the loss).

    The picture is written to `selections/step-000100.png` in the output folder, and shown in TensorBoard and Trackio
    where the run reports to them. Training is as without it: no metric, random number or time of a step changes.

    Args:
        trainer ([`ILVRTrainer`]): of stage 1.
        samples (`Dataset`): a few samples, as the trainer takes them. The first four spans of each are drawn.
        every (`int`, *optional*, defaults to 100): optimizer steps between two pictures.

    Raises:
        ValueError: if there is nothing to draw: in stage 2, where nothing is selected; with the selection method
            `"mean_pool"`, which takes all cells; for a backbone that cuts images into tiles, whose tokens are in no
            raster order; for samples of which only features were kept.

    Example:

    ```python
    >>> trainer.add_callback(SelectionDrawingCallback(trainer, dataset.select(range(3)), every=100))
    ```
    """

    def __init__(self, trainer: Any, samples: Any, every: int = 100) -> None:
        if trainer.teacher is None or trainer.args.selection_method == "mean_pool":
            raise ValueError(
                f"No cells are selected with stage={trainer.args.stage} and "
                f"selection_method={trainer.args.selection_method!r}. Leave the callback out, or choose stage 1 and "
                "another method."
            )
        if every < 1:
            raise ValueError(f"`every` must be at least 1 optimizer step, got {every}.")
        self.trainer, self.every = trainer, every
        samples = cast(Dataset, prepare_for(samples, trainer.processing_class, trainer.args, name="drawn"))
        if trainer.args.selection_schedule == "once":
            samples = trainer.select_once(samples)
        rows = [samples[i] for i in range(len(samples))]
        if any(isinstance(row[HELPER_IMAGES], bytes) for row in rows):
            raise ValueError("The samples hold features, not images. Give them as they were before `cache_images`.")
        self.images = [[open_image(row["images"][i], "A drawn image") for i in row[HELPER_IMAGES]] for row in rows]
        self.batch = trainer.data_collator(rows)
        self.grids = self.batch.get(f"{HELPER_PREFIX}image_grid_thw")
        if self.grids is None:
            pixels, num_images = self.batch[f"{HELPER_PREFIX}pixel_values"], sum(map(len, self.images))
            num_tiles = math.prod(pixels.shape[:-3])
            if num_tiles != num_images:
                raise ValueError(
                    f"The processor cuts the {num_images} helper images into {num_tiles} tiles, so it is not known "
                    "which token shows what. Turn that off in the image processor, or leave the callback out."
                )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        selection, latents = compare_latents(self.trainer, self.batch)
        if not state.is_world_process_zero or selection is None or latents is None:
            return
        picture = self.draw(selection, latents)
        folder = Path(args.output_dir) / "selections"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step-{state.global_step:06d}.png")
        if writer := tensorboard_writer(self.trainer):
            writer.add_image("selections", np.asarray(picture), state.global_step, dataformats="HWC")
        if trackio := trackio_module(self.trainer):
            trackio.log({"selections": trackio.Image(picture), "train/global_step": state.global_step})

    def draw(self, selection: Selection, latents: torch.Tensor) -> Image.Image:
        """The picture of a [`Selection`] and of the latents (B, S, K, D) that the student predicts."""
        nearest = selection.nearest(latents)  # (B, S, K)
        cosines = torch.cosine_similarity(latents.float(), selection.targets, dim=-1)  # (B, S, K)
        lengths = self.batch[f"{HELPER_PREFIX}image_lengths"].tolist()
        rows, first = [], 0
        for b, images in enumerate(self.images):
            for s, image in enumerate(images[:MAX_SPANS]):
                mask, number = selection.mask[b, s], first + s
                grid = token_grid(lengths[number], image.size, None if self.grids is None else self.grids[number])
                num_candidates = int(selection.candidate_mask[b, s].sum())
                chosen = (selection.indices[b, s, mask].tolist(), nearest[b, s, mask].tolist())
                mass = "" if selection.mass is None else f"mass {selection.mass[b, s]:.2f}, "
                caption = (
                    f"sample {b + 1}, span {s + 1}: K* = {len(chosen[0])}, {mass}"
                    f"cosine of latents and targets {cosines[b, s, mask].mean():.2f}"
                )
                rows.append((caption, selection_row(image, grid, num_candidates, *chosen)))
            first += len(images)
        return sheet(rows, HEADINGS)
