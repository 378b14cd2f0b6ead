"""One training run of a few steps, alone or as one of several processes; launched by `test_distributed.py`.

accelerate launch … distributed_run.py SETTINGS.json OUTPUT_DIR
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from conftest import make_sample
from safetensors.torch import save_file
from test_trainer import make_trainer
from torch.distributed.tensor import DTensor

from ilvr import ILVRForConditionalGeneration, ILVRProcessor


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().float().clone()


def shard_on_cpu():
    """Lets accelerate take CPU processes for GPUs: FSDP2 runs over gloo, but accelerate offers it on devices only."""
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def main(settings_file: str, output_dir: str):
    settings = json.loads(Path(settings_file).read_text())
    folder = settings.pop("folder")
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpu()
    samples = [make_sample(words, question) for words, question in settings.pop("samples")]
    torch.manual_seed(0)
    model = ILVRForConditionalGeneration.from_pretrained(folder)
    processor = ILVRProcessor.from_pretrained(folder)
    trainer = make_trainer(model, processor, f"{output_dir}/run", samples, optim="sgd", **settings)
    trainer.train()
    weights = {name: whole(p) for name, p in trainer.student.named_parameters()}
    if trainer.teacher is not None:
        weights |= {f"teacher.{name}": p.clone() for name, p in trainer.teacher.state_dict().items()}
    if trainer.is_world_process_zero():
        save_file(weights, f"{output_dir}/weights.safetensors")
        Path(f"{output_dir}/log.json").write_text(json.dumps(trainer.state.log_history))
        print("processes", trainer.accelerator.num_processes, type(trainer.model_wrapped).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
