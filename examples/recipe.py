"""The recipe of `train_ilvr.py`: its fields, and the training arguments of each phase."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilvr.trainer import ILVRTrainingConfig


RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Recipe:
    """What is trained on what. Each phase is a dict of `ILVRTrainingConfig` arguments, on top of `training`."""

    output_dir: str = field(default="runs/ilvr", metadata={"help": "Folder of checkpoints, pictures and results."})
    backbone: str | None = field(default=None, metadata={"help": "Hub id or folder of a vision-language model."})
    small_backbone: dict = field(
        default_factory=dict, metadata={"help": "Sizes of the backbone built if none is named."}
    )
    model_kwargs: dict = field(default_factory=dict, metadata={"help": "Arguments of from_pretrained."})
    latent_size: int = field(default=8, metadata={"help": "Latents in a span."})
    latent_head: str | None = field(
        default=None, metadata={"help": "rescale, identity (paper), linear or mlp. Default: that of from_backbone."}
    )
    dataset: str | None = field(default=None, metadata={"help": "File, folder or Hub id for `load_conversations`."})
    dataset_kwargs: dict = field(default_factory=dict, metadata={"help": "Further arguments of it: image_root, …"})
    task: str | None = field(default=None, metadata={"help": "Task for `load_task`: tests, and training data."})
    task_settings: dict = field(default_factory=dict, metadata={"help": "Its arguments, beside the seed."})
    evaluation: dict = field(default_factory=dict, metadata={"help": "Arguments of `evaluate_checkpoints`."})
    lora: dict = field(default_factory=dict, metadata={"help": "LoraConfig of the adapter; none: all weights train."})
    resume: bool = field(default=False, metadata={"help": "Whether phases go on from their last whole checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, task and the order of the data."})
    training: dict = field(default_factory=dict, metadata={"help": "Training arguments of all phases."})
    base: dict = field(default_factory=dict, metadata={"help": "The phase that makes a small backbone see."})
    answer_only: dict = field(default_factory=dict, metadata={"help": "The control without traces."})
    text: dict = field(default_factory=dict, metadata={"help": "The control whose traces have words for latents."})
    stage1: dict = field(default_factory=dict, metadata={"help": "Alignment with the momentum teacher."})
    stage2: dict = field(default_factory=dict, metadata={"help": "Training through the model's own latents."})


def phases_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The training arguments of each phase in their order, all checked before the first begins."""
    if recipe.task is None and recipe.dataset is None:
        known = ", ".join(sorted(os.path.relpath(path) for path in RECIPES.glob("*.yaml")))
        raise ValueError(f"There is nothing to train on. Name a recipe, --config {known}; or --dataset, or --task.")
    if recipe.task is None and (recipe.backbone is None or recipe.base):
        raise ValueError("Without a task there is no small backbone to build or to teach. Name a --backbone.")
    phases = {"base": recipe.base, "answer_only": recipe.answer_only, "text": recipe.text}
    phases = {name: own for name, own in phases.items() if own} | {"stage1": recipe.stage1, "stage2": recipe.stage2}
    for control in {"answer_only", "text"} & set(phases):
        if not recipe.base:
            raise ValueError(f"`{control}` continues `base`, as stage 1 does. Add `base`, or leave it out.")
        steps = recipe.stage1["max_steps"] + recipe.stage2["max_steps"]
        phases[control] = {"max_steps": steps, **phases[control]}
    for name, own in phases.items():
        folder, stage = f"{recipe.output_dir}/{name}", 1 if name == "stage1" else 2
        phases[name] = {"output_dir": folder, "stage": stage, "seed": recipe.seed, **recipe.training, **own}
        try:
            ILVRTrainingConfig(**phases[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} (with `training`): {error}") from error
    return phases
