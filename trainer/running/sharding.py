"""What the engines that shard a model (accelerate's FSDP2, DeepSpeed ZeRO-3) ask of a trainer with two models."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Embedding
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from ilvr.latent_spans import chunk_bounds

from .adapters import ilvr_model, vision_modules


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a forward of a layer gathers weights from all ranks, which then have to run equally many forwards."""
    return accelerator.is_fsdp2 or is_zero3(accelerator)


def is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def prepare_sharding(
    accelerator: Accelerator, student: PreTrainedModel, *, keeps_teacher: bool, freeze_vision_tower: bool
) -> None:
    """Keeps a frozen vision tower whole on each rank, where it encodes images outside the model's forward.

    Args:
        accelerator ([`~accelerate.Accelerator`]): before it prepares the model.
        student ([`ILVRModel`]).
        keeps_teacher (`bool`): whether a second, averaged set of weights has to be sharded, too.
        freeze_vision_tower (`bool`).

    Raises:
        ValueError: for settings of an engine that cannot train this, with those that can.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP1 gathers weights in the root's forward only. Set fsdp_version: 2.")
    if not is_sharded(accelerator):
        return
    if keeps_teacher and not freeze_vision_tower:
        raise ValueError(
            "Stage 1 encodes helper images outside the forward of a sharded model, with a vision tower that is whole "
            "on each rank. Set freeze_vision_tower=True, or train with DDP or ZeRO-2."
        )
    if not accelerator.is_fsdp2:
        if keeps_teacher:
            raise ValueError(
                "ZeRO-3 has no way to shard a second, averaged set of weights. Use FSDP2, which shards the teacher "
                "like the student, or ZeRO-2 or DDP, where each rank has it whole; stage 2 runs with ZeRO-3."
            )
        return
    if student.vlm.config.tie_word_embeddings and not isinstance(student.get_input_embeddings(), Embedding):
        raise ValueError(
            "FSDP2 cannot shard tied embeddings in which PEFT trains single rows. Train the adapter with DDP."
        )
    plugin: Any = accelerator.state.fsdp_plugin
    if not plugin.transformer_cls_names_to_wrap:
        # The decoder's layers. A backbone's own list also names layers of its tower, or of towers that it has not.
        core: Any = student.core
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in core.get_decoder().layers})
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading cannot leave modules unsharded, as the frozen vision tower is. Set it to "
            "false."
        )
    if freeze_vision_tower:
        keep_vision_whole(accelerator, student)


def keep_vision_whole(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Keeps the vision tower of an [`ILVRModel`] out of what FSDP2 shards."""
    plugin: Any = accelerator.state.fsdp_plugin
    vision = [model.get_submodule(name).to(accelerator.device) for name in vision_modules(model)]
    plugin.ignored_modules = [*(plugin.ignored_modules or []), *vision]


def gather_embeddings_once(model: Any) -> None:
    """Keeps the embeddings gathered during a step: ranks look different numbers of tokens' embeddings up.

    A backbone looks up the placeholder's for each piece of a sequence that has an image.
    """
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, FSDPModule):
        embeddings.set_reshard_after_forward(False)


def chunks_of_all_ranks(accelerator: Accelerator, is_latent: torch.Tensor) -> int:
    """The largest number of forwards that a rank's walk takes, which is `min_chunks` of all.

    Args:
        accelerator ([`~accelerate.Accelerator`]).
        is_latent (`torch.BoolTensor` of shape `(B, T)`): which columns of this rank's rows hold latents.
    """
    own = torch.tensor([len(chunk_bounds(is_latent))], device=is_latent.device)
    return int(accelerator.gather(own).max())


def _shards(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def shard_for_inference(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Shards a second model as accelerate's FSDP2 shards the trained one; no backward pass frees its weights."""
    fsdp2_prepare_model(accelerator, model)
    gather_embeddings_once(model)

    def free(module: torch.nn.Module, args: Any, outputs: Any) -> None:
        for shard in _shards(module):
            shard.reshard()

    model.register_forward_hook(free)


@contextmanager
def gathered(accelerator: Accelerator, model: torch.nn.Module) -> Generator[None]:
    """Within it each rank has all weights of an FSDP2 model, and generates as many tokens as its own rows have.

    Args:
        accelerator ([`~accelerate.Accelerator`]).
        model ([`ILVRForConditionalGeneration`] or `PeftModel` over one): as it was prepared for training.
    """
    if not accelerator.is_fsdp2:
        yield
        return
    plugin, shards = cast(Any, accelerator.state.fsdp_plugin), _shards(model)
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        # The layers alone: other parts stay gathered until a backward pass, as before.
        for layer in ilvr_model(model).model.core.get_decoder().layers:
            layer.set_reshard_after_forward(plugin.reshard_after_forward, recurse=False)
        for shard in shards:
            shard.reshard()


class ShardingCallback(TrainerCallback):
    """Settles, once the engine has wrapped the model, what stays gathered during a step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        gather_embeddings_once(self.trainer.student)
