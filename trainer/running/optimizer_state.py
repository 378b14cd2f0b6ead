"""What an optimizer has learned of its gradients, carried over from a run to the next.

Cross-entropy through a model's own latents forgets them where its first steps are too large, and the first steps of a
new AdamW, which has no second moments yet, are as large as the learning rate allows.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME

from .checkpoints import find_damage, last_whole_checkpoint


PARAMETERS = "optimizer_parameters.json"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


def parameter_names(model: torch.nn.Module, optimizer: Any) -> list[str]:
    """Names of the weights of an optimizer, in the order in which its state numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a loss may have weights of its own
    return [names.get(id(parameter), "") for group in optimizer.param_groups for parameter in group["params"]]


def save_parameter_names(model: torch.nn.Module, optimizer: Any, checkpoint: str | Path) -> None:
    """Writes them beside the optimizer's state, which knows numbers only."""
    Path(checkpoint, PARAMETERS).write_text(json.dumps(parameter_names(model, optimizer)), encoding="utf-8")


def find_optimizer_state(source: str | Path) -> Path:
    """The checkpoint that an optimizer's state is taken from.

    Args:
        source (`str` or `Path`): a checkpoint, or the folder of a run, whose newest whole one is taken.

    Raises:
        ValueError: if there is none, it is damaged, or it holds no optimizer's state.
    """
    needed = [OPTIMIZER_NAME, PARAMETERS]
    is_run = any(Path(source).glob("checkpoint-*"))
    damage = "it holds no whole checkpoint" if is_run else find_damage(source, needed)
    checkpoint = last_whole_checkpoint(source, needed) if is_run else None if damage else str(source)
    if checkpoint is None:
        raise ValueError(
            f"optimizer_state_from={str(source)!r}: {damage}. Name a checkpoint that a stage has saved with its "
            "optimizer (save_strategy='steps', save_only_model=False, no sharded engine), or the folder of its run."
        )
    return Path(checkpoint)


def load_moments(model: torch.nn.Module, optimizer: Any, checkpoint: str | Path) -> None:
    """Gives AdamW the moments and the step counts of another run; learning rate and schedule stay its own.

    Args:
        model (`torch.nn.Module`): whose weights it trains, not wrapped.
        optimizer (`torch.optim.Optimizer`): new.
        checkpoint (`str` or `Path`): of [`find_optimizer_state`].

    Raises:
        ValueError: if the other run trained other weights, or by another optimizer.
    """
    own, path = parameter_names(model, optimizer), Path(checkpoint, OPTIMIZER_NAME)
    saved_names = json.loads(Path(checkpoint, PARAMETERS).read_text(encoding="utf-8"))
    if saved_names != own:
        other = sorted(set(saved_names) ^ set(own)) or [a for a, b in zip(own, saved_names) if a != b]
        raise ValueError(
            f"{path} is of {len(saved_names)} weights and {len(own)} are trained now, {other[0]} the first that "
            "differs. Freeze the same parts as then, or leave optimizer_state_from out."
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)["state"]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, moments in saved.items():
        name, weight = own[number], weights[number]
        if set(moments) != MOMENTS:
            raise ValueError(
                f"{path} holds {sorted(moments)} of {name}, not AdamW's {sorted(MOMENTS)}. Train both stages with "
                "AdamW, or leave optimizer_state_from out."
            )
        if moments["exp_avg"].shape != weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(moments['exp_avg'].shape)} in {path} and {tuple(weight.shape)} now. It is "
                "of another model: leave optimizer_state_from out."
            )
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})


class OptimizerStateCallback(TrainerCallback):
    """Starts a run with the optimizer's state of another; one that is resumed has its own.

    Args:
        trainer ([`ILVRTrainer`]).
        source (`str`): see [`find_optimizer_state`].
    """

    def __init__(self, trainer: Any, source: str) -> None:
        self.trainer, self.checkpoint = trainer, find_optimizer_state(source)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            load_moments(model, self.trainer.optimizer, self.checkpoint)
