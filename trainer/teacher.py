"""The momentum teacher: an fp32 exponential moving average of the student (paper, equation 2)."""

import copy

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from .adapters import vision_modules


TEACHER_FILE = "teacher.safetensors"


class MomentumTeacher:
    """A copy of the student whose trained weights follow the student's, `t <- decay * t + (1 - decay) * s`.

    The copy is kept in fp32, because a bf16 average with decay 0.999 never moves: the step is below the rounding. It
    lives outside the student's module tree, so that neither saving, DDP nor checkpointing sees it. Frozen weights are
    shared with the student.

    Args:
        student ([`ILVRForConditionalGeneration`]): not wrapped; adapters of PEFT are trained weights like others, so
            over a frozen base the teacher costs one fp32 copy of them.
        decay (`float`): 0.999 in the paper.
    """

    def __init__(self, student: torch.nn.Module, decay: float):
        self.decay = decay
        unused = _unused_modules(student)
        shared = {p for p in student.parameters() if not p.requires_grad}
        shared.update(p for name in unused for p in student.get_submodule(name).parameters())
        self.model = copy.deepcopy(student, memo={id(p): p for p in shared}).eval()
        self.model.__dict__.pop("forward", None)  # SFTTrainer patches the student's, bound to the student
        for name in unused:
            self.model.set_submodule(name, torch.nn.Identity())
        names = {name for name, _ in self.model.named_parameters()}
        self.names = [name for name, p in student.named_parameters() if p.requires_grad and name in names]
        for parameter in self._parameters():
            parameter.data = parameter.data.float()
        self.model.requires_grad_(False)

    def _parameters(self) -> list[torch.Tensor]:
        parameters = dict(self.model.named_parameters())
        return [parameters[name] for name in self.names]

    @torch.no_grad()
    def update(self, student: torch.nn.Module):
        """Moves the teacher by one optimizer step of the student."""
        parameters = dict(student.named_parameters())
        for name, average in zip(self.names, self._parameters()):
            average.lerp_(parameters[name].to(average), 1 - self.decay)

    @torch.no_grad()
    def distance(self, student: torch.nn.Module) -> float:
        """Relative L2 distance between the trained weights of teacher and student."""
        parameters = dict(student.named_parameters())
        gap = norm = 0.0
        for name, average in zip(self.names, self._parameters()):
            gap += (average - parameters[name].to(average)).square().sum()
            norm += average.square().sum()
        return float((gap / norm).sqrt())

    def save(self, folder: str):
        tensors = {name: p.detach().contiguous() for name, p in zip(self.names, self._parameters())}
        save_file(tensors, f"{folder}/{TEACHER_FILE}")

    @torch.no_grad()
    def load(self, folder: str):
        tensors = load_file(f"{folder}/{TEACHER_FILE}")
        if sorted(tensors) != sorted(self.names):
            raise ValueError(
                f"{folder}/{TEACHER_FILE} holds {len(tensors)} tensors, the teacher {len(self.names)}, and their "
                "names differ: the checkpoint was made with other trained weights. Freeze the same parts as then."
            )
        for name, parameter in zip(self.names, self._parameters()):
            parameter.copy_(tensors[name])


def _unused_modules(student) -> list[str]:
    """Parts that the teacher has no use for: a frozen vision tower, since features come from the student's, and a head
    with weights of its own, since only its hidden states are read."""
    unused = [
        n for n in vision_modules(student) if not any(p.requires_grad for p in student.get_submodule(n).parameters())
    ]
    head = student.get_output_embeddings()
    if head.weight is not student.get_input_embeddings().weight:
        unused += [name for name, module in student.named_modules() if module is head]
    return unused


class TeacherUpdateCallback(TrainerCallback):
    """Moves the teacher after each real optimizer step, not after accumulation micro-batches or skipped steps."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.teacher.update(self.trainer.student)
