"""What the engines that shard a model (accelerate's FSDP2, DeepSpeed ZeRO-3) ask of a trainer with two models."""

from accelerate import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.nn import Embedding
from transformers import TrainerCallback

from .adapters import vision_modules


def is_sharded(accelerator) -> bool:
    """Whether a forward of a layer gathers weights from all ranks, which then have to run equally many forwards."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def prepare_sharding(accelerator, student, args):
    """Keeps a frozen vision tower whole on each rank, where it encodes images outside the model's forward.

    Args:
        accelerator ([`~accelerate.Accelerator`]): before it prepares the model.
        student ([`ILVRModel`]).
        args ([`ILVRTrainingConfig`]).

    Raises:
        ValueError: for settings of an engine that cannot train this, with those that can.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP1 gathers weights in the root's forward only. Set fsdp_version: 2.")
    if not is_sharded(accelerator):
        return
    if args.stage == 1 and not args.freeze_vision_tower:
        raise ValueError(
            "Stage 1 encodes helper images outside the forward of a sharded model, with a vision tower that is whole "
            "on each rank. Set freeze_vision_tower=True, or train with DDP or ZeRO-2."
        )
    if not accelerator.is_fsdp2:
        if args.stage == 1:
            raise ValueError(
                "ZeRO-3 has no way to shard a second, averaged set of weights. Use FSDP2, which shards the teacher "
                "like the student, or ZeRO-2 or DDP, where each rank has it whole; stage 2 runs with ZeRO-3."
            )
        return
    if student.vlm.config.tie_word_embeddings and not isinstance(student.get_input_embeddings(), Embedding):
        raise ValueError(
            "FSDP2 cannot shard tied embeddings in which PEFT trains single rows. Train the adapter with DDP."
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading cannot leave modules unsharded, as the frozen vision tower is. Set it to "
            "false."
        )
    if args.freeze_vision_tower:
        vision = [student.get_submodule(name).to(accelerator.device) for name in vision_modules(student)]
        plugin.ignored_modules = [*(plugin.ignored_modules or []), *vision]


def gather_embeddings_once(model):
    """Keeps the embeddings gathered during a step: ranks look different numbers of tokens' embeddings up.

    A backbone looks up the placeholder's for each piece of a sequence that has an image.
    """
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, FSDPModule):
        embeddings.set_reshard_after_forward(False)


class ShardingCallback(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        gather_embeddings_once(self.trainer.student)
