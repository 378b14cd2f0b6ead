"""Helper images of test samples as the vision tower sees them, and what latents should hold of them.

B batch, S spans, K latents a span, N image tokens, D hidden.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data.conversations import image_roles
from ilvr.data.images import open_image
from ilvr.tasks import Task
from ilvr.trainer import ILVRTrainingConfig
from ilvr.trainer.inputs.data_collator import LatentBatch, LatentDataCollator
from ilvr.trainer.inputs.data_preparation import prepare_for
from ilvr.trainer.inputs.image_features import flatten_features, image_outputs
from ilvr.trainer.inputs.image_tensors import encode_helper_images
from ilvr.trainer.relevance import RELEVANCES
from ilvr.trainer.selection import SELECTORS
from ilvr.trainer.target_selection import TargetSelector


@torch.no_grad()
def helper_features(
    model: ILVRForConditionalGeneration, processor: ILVRProcessor, dataset: Dataset, *, batch_size: int = 32
) -> list[list[torch.Tensor]]:
    """Features of the helper images of each sample, from the model's vision tower.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        dataset (`Dataset`): with `messages` and `images`.
        batch_size (`int`, *optional*, defaults to 32): samples encoded at once.

    Returns:
        `list[list[torch.Tensor]]`: for each sample the features (N, D) of each of its helper images, in fp32 on the
        CPU; none for a sample without such images.
    """
    found: list[list[torch.Tensor]] = []
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        pictures = [_helper_images(sample, start + i) for i, sample in enumerate(samples)]
        images = [image for own in pictures for image in own]
        if not images:
            found += [[] for _ in samples]
            continue
        inputs = {k: v.to(model.device) for k, v in encode_helper_images(images, processor).items()}
        outputs = image_outputs(inputs, model.model.core)
        features = flatten_features(outputs.pooler_output).float().cpu().split(inputs["image_lengths"].tolist())
        own = iter(features)
        found += [[next(own) for _ in row] for row in pictures]
    return found


def _helper_images(sample: dict[str, Any], index: int) -> list[Any]:
    roles, images = image_roles(sample["messages"]), sample["images"] or []
    wanted = [image for image, role in zip(images, roles) if role == "assistant"]
    return [open_image(image, f"A helper image of sample {index}") for image in wanted]


def followed_targets(
    task: Task, samples: Sequence[dict[str, Any]], features: Sequence[Sequence[torch.Tensor]], latent_size: int
) -> list[torch.Tensor]:
    """What the latents of each sample should hold by the task: the feature of the patch it follows, in all K places.

    Args:
        task ([`~ilvr.tasks.Task`]): with `followed_patches`.
        samples (`Sequence[dict]`): without their images.
        features (`Sequence[Sequence[torch.Tensor]]`): of [`helper_features`].
        latent_size (`int`): K.

    Returns:
        `list[torch.Tensor]`: for each sample (S, K, D).

    Raises:
        ValueError: if the task does not say which patches are followed, or there are not as many as helper images.
    """
    targets = []
    width = next((picture.shape[-1] for pictures in features for picture in pictures), 0)  # D
    for index, (sample, pictures) in enumerate(zip(samples, features)):
        patches = task.followed_patches(sample)
        if patches is None:
            raise ValueError(
                f"{task.title} does not say which patches its latents should hold. Add `followed_patches`, or pass a "
                "TargetSelector."
            )
        if len(patches) != len(pictures):
            raise ValueError(
                f"followed_patches: sample {index} of {task.title} has {len(patches)} patches and {len(pictures)} "
                "helper images. Give one for each, and ask in the form 'trace'."
            )
        chosen = [picture[patch].expand(latent_size, -1) for patch, picture in zip(patches, pictures)]
        targets.append(torch.stack(chosen) if chosen else torch.zeros(0, latent_size, width))
    return targets


def own_selector(model: ILVRForConditionalGeneration, **settings: Any) -> TargetSelector:
    """Selects as stage 1 does, with the model as its own teacher.

    Args:
        model ([`ILVRForConditionalGeneration`]).
        settings: of [`~ilvr.trainer.ILVRTrainingConfig`], such as `selection_method` and `helper_question`.
    """
    args = ILVRTrainingConfig("none", stage=1, bf16=False, report_to="none", **settings)
    asks = SELECTORS[args.selection_method].asks_teacher
    relevance = RELEVANCES[args.selection_method](model, args.max_helper_answer_tokens) if asks else None
    return TargetSelector(model.config, args, teacher=model.model, core=model.model.core, relevance=relevance)


class SelectedTargets(NamedTuple):
    """What latents should hold by a selector.

    Args:
        targets (`list[torch.Tensor]`): for each sample (S, K, D).
        patches (`list[list[list[int]]]`, *optional*): for each sample and helper image the K patches that these are,
            -1 where nothing was selected; unknown where targets are means of patches.
    """

    targets: list[torch.Tensor]
    patches: list[list[list[int]]] | None


@torch.no_grad()
def selected_targets(
    selector: TargetSelector,
    processor: ILVRProcessor,
    dataset: Dataset,
    pad_embedding: torch.Tensor,
    *,
    batch_size: int = 16,
) -> SelectedTargets:
    """What the latents of each sample should hold by a selector, as stage 1 feeds it.

    Args:
        selector ([`~ilvr.trainer.target_selection.TargetSelector`]): of the run that trained the model, or
            [`own_selector`].
        processor ([`ILVRProcessor`]).
        dataset (`Dataset`): with `messages` and `images`, among them helper images.
        pad_embedding (`torch.Tensor` of shape `(D,)`): stands in the places that nothing was selected for.
        batch_size (`int`, *optional*, defaults to 16): samples at once.

    Raises:
        ValueError: for samples that the selector cannot take, see [`~ilvr.trainer.inputs.data_preparation`].
    """
    args = copy.copy(selector.args)
    args.max_length = None  # no question is left out
    prepared = cast(Dataset, prepare_for(dataset, processor, args, name="test"))
    collator = LatentDataCollator(processor)
    targets: list[torch.Tensor] = []
    patches: list[list[list[int]]] = []
    are_means = not SELECTORS[args.selection_method].keeps_candidates
    for start in range(0, len(prepared), batch_size):
        rows = [prepared[i] for i in range(start, min(start + batch_size, len(prepared)))]
        batch = LatentBatch.of({name: tensor.to(pad_embedding.device) for name, tensor in collator(rows).items()})
        selection = selector(batch)
        if selection is None:
            targets += [pad_embedding.new_zeros(0, processor.latent_size, len(pad_embedding)).cpu() for _ in rows]
            patches += [[] for _ in rows]
            continue
        are_means |= bool((batch.helper_inputs["image_lengths"] > args.max_candidates).any())
        filled = torch.where(selection.mask.unsqueeze(-1), selection.targets, pad_embedding.float())  # (B, S, K, D)
        chosen = selection.indices.where(selection.mask, -1)  # (B, S, K)
        targets += [own[: row["num_spans"]].cpu() for own, row in zip(filled, rows)]
        patches += [own[: row["num_spans"]].tolist() for own, row in zip(chosen, rows)]
    return SelectedTargets(targets, None if are_means else patches)
