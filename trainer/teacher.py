"""The momentum teacher: an fp32 exponential moving average of the student (paper, equation 2)."""

import copy
import math
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from .running.adapters import vision_modules
from .running.sharding import shard_for_inference


TEACHER_FILE = "teacher.safetensors"


class MomentumTeacher:
    """A copy of the student whose trained weights follow the student's, `t <- decay * t + (1 - decay) * s`.

    The copy is kept in fp32, because a bf16 average with decay 0.999 never moves: the step is below the rounding. It
    lives outside the student's module tree, so that neither saving, DDP nor checkpointing sees it. Frozen weights are
    shared with the student; what the teacher has no use for is left out: the language-model head, since only its
    hidden states are read, and a frozen vision tower, since image features come from the student's.

    Args:
        student ([`ILVRModel`]): without the head, and not wrapped. Adapters of PEFT are trained weights like others:
            over a frozen base the teacher costs one fp32 copy of them.
        decay (`float`): 0.999 in the paper.
        keeps_head (`bool`, *optional*, defaults to `False`): whether it is asked for words, and needs the head.
    """

    def __init__(self, student: torch.nn.Module, decay: float, keeps_head: bool = False) -> None:
        self.decay = decay
        unused = _unused_modules(student, keeps_head)
        names = dict(student.named_parameters(remove_duplicate=False))
        used = {id(p) for name, p in names.items() if not name.startswith(unused)}
        shared = [p for p in names.values() if not p.requires_grad or id(p) not in used]
        self.model = copy.deepcopy(student, memo={id(p): p for p in shared}).eval()
        for name in unused:
            self.model.set_submodule(name.rstrip("."), torch.nn.Identity())
        self.names = [name for name, _ in self.model.named_parameters() if names[name].requires_grad]
        for parameter in self.parameters():
            parameter.data = parameter.data.float()
        self.model.requires_grad_(False)

    def parameters(self) -> list[torch.Tensor]:
        """The averaged weights."""
        parameters = dict(self.model.named_parameters())
        return [parameters[name] for name in self.names]

    def shard(self, accelerator: Accelerator) -> None:
        """Shards the teacher as accelerate's FSDP2 shards the student; its frozen weights are then its own."""
        shard_for_inference(accelerator, self.model)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The teacher's outputs for the inputs of [`ILVRModel`]."""
        return self.model(**inputs)

    @torch.no_grad()
    def update(self, student: torch.nn.Module) -> None:
        """Moves the teacher by one optimizer step of the student."""
        parameters = dict(student.named_parameters())
        for name, average in zip(self.names, self.parameters()):
            average.lerp_(parameters[name].to(average.dtype), 1 - self.decay)

    @torch.no_grad()
    def distance(self, student: torch.nn.Module) -> float:
        """Relative L2 distance between the trained weights of teacher and student."""
        parameters = dict(student.named_parameters())
        gap = norm = 0.0  # numbers, since a model may lie on several devices
        for name, average in zip(self.names, self.parameters()):
            gap += float(_whole((average - parameters[name].to(average.dtype)).square().sum()))
            norm += float(_whole(average.square().sum()))
        return math.sqrt(gap / norm)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights, whole on each rank."""
        return {name: _whole(p.detach()).contiguous() for name, p in zip(self.names, self.parameters())}

    def save(self, folder: str, is_main_process: bool = True) -> None:
        tensors = self.state_dict()  # on all ranks: each has a shard
        if is_main_process:
            save_file(tensors, f"{folder}/{TEACHER_FILE}")

    @torch.no_grad()
    def load(self, folder: str) -> None:
        tensors = load_file(f"{folder}/{TEACHER_FILE}")
        if sorted(tensors) != sorted(self.names):
            raise ValueError(
                f"{folder}/{TEACHER_FILE} holds {len(tensors)} tensors, the teacher {len(self.names)}, and their "
                "names differ: the checkpoint was made with other trained weights. Freeze the same parts as then."
            )
        for name, parameter in zip(self.names, self.parameters()):
            saved = tensors[name]
            if saved.shape != parameter.shape:
                raise ValueError(
                    f"{name} of {folder}/{TEACHER_FILE} has shape {tuple(saved.shape)}, the teacher's "
                    f"{tuple(parameter.shape)}: it is of another model. Resume with the one that it was made with."
                )
            if isinstance(parameter, DTensor):
                saved = distribute_tensor(saved.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(saved)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _unused_modules(student: Any, keeps_head: bool) -> tuple[str, ...]:
    """Prefixes of the parts that the teacher has no use for."""
    head = student.vlm.get_output_embeddings()
    unused = [name for name, module in student.named_modules() if module is head and not keeps_head]
    vision = vision_modules(student)
    if not any(p.requires_grad for name in vision for p in student.get_submodule(name).parameters()):
        unused += vision
    return tuple(f"{name}." for name in unused)


class TeacherUpdateCallback(TrainerCallback):
    """Moves the teacher after each real optimizer step, not after accumulation micro-batches or skipped steps."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # By now the engine has prepared the student, and a checkpoint to resume from has been read.
        if self.trainer.accelerator.is_fsdp2:
            self.trainer.teacher.shard(self.trainer.accelerator)
        if state.global_step == 0:
            self.trainer.measure_latent_norm()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.teacher.update(self.trainer.student.model)
