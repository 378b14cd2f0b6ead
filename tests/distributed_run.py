"""Training runs of a few steps, alone or as one of several processes; launched by `test_distributed.py`.

torchrun … distributed_run.py RUNS.json OUTPUT_DIR
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from helpers import make_sample, make_trainer
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ilvr import ILVRForConditionalGeneration, ILVRProcessor


def shard_on_cpu():
    """Lets accelerate take CPU processes for GPUs: the engines run over gloo, but it offers them on devices only."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def whole(tensor):
    if hasattr(tensor, "ds_id"):  # partitioned by ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().float().clone()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().float().clone()


def run(
    name: str,
    output_dir: Path,
    *,
    folder: str,
    samples: list,
    lora: bool = False,
    latent_head: str = "linear",
    resume: int = 0,
    **settings,
):
    """Trains and saves losses and whole weights; with `resume`, goes on from that step's checkpoint."""
    torch.manual_seed(0)
    trainer = make_trainer(
        ILVRForConditionalGeneration.from_pretrained(folder, latent_head=latent_head),
        ILVRProcessor.from_pretrained(folder),
        output_dir / "run",
        [make_sample(words, question) for words, question in samples],
        peft_config=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if lora else None,
        optim="sgd",
        **settings,
    )
    checkpoint = output_dir / "run" / f"checkpoint-{resume}"
    trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    weights = {name: whole(p) for name, p in trainer.student.named_parameters()}
    if trainer.teacher is not None:
        weights |= {f"teacher.{name}": p.clone() for name, p in trainer.teacher.state_dict().items()}
    trainer.save_model(output_dir / name)
    if trainer.is_world_process_zero():
        save_file(weights, output_dir / f"{name}.safetensors")
        facts = {"log": trainer.state.log_history, "wrapper": type(trainer.model_wrapped).__name__}
        (output_dir / f"{name}.json").write_text(json.dumps(facts))


def main(runs_file: str, output_dir: str):
    gc.freeze()  # each run collects garbage several times, and would walk all of torch
    if "ACCELERATE_USE_FSDP" in os.environ or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        shard_on_cpu()
    for name, settings in json.loads(Path(runs_file).read_text()).items():
        run(name, Path(output_dir), **settings)
    PartialState().destroy_process_group()  # an open one can abort a process that ends


if __name__ == "__main__":
    main(*sys.argv[1:])
