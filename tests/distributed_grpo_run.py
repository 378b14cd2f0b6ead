"""GRPO of a few steps on given completions, alone or as one of several processes; launched by `test_grpo_engines.py`.

torchrun … distributed_grpo_run.py RUNS.json OUTPUT_DIR
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, Image, List
from distributed_run import shard_on_cpu, whole
from helpers import SAMPLES, make_dataset, make_image
from peft import LoraConfig
from safetensors.torch import save_file

from ilvr import ILVRForConditionalGeneration, ILVRProcessor, pad_spans
from ilvr.evaluation import SwapGapCallback
from ilvr.evaluation.in_training import evaluating
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer
from ilvr.trainer.running.sharding import gathered


ASKED = [{**sample, "answer": f"answer {i}"} for i, sample in enumerate(SAMPLES[:3])]


class GivenRollouts(ILVRGRPOTrainer):
    """Completions that depend on the prompt and the place in its group, so that processes have those of one process.

    Some have no span: a process may have none at all.
    """

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        config = self.student.config
        start, pad, end = config.latent_token_ids
        span = [start, *[pad] * config.latent_size, end]
        eos = self.eos_token_ids[0]
        choices = [[9, *span, 11, eos], [*span, 9, 10, *span, eos], [12, 13, 14, eos], [10, eos]]
        rows = [choices[2 * (len(ids) % 2) + i % num_generations] for i, ids in enumerate(prompt_ids)]
        size = config.latent_size, config.get_text_config().hidden_size
        latents = [torch.full((row.count(start), *size), 0.1 * len(row)) for row in rows]
        self._latents, self._rollout_latents = pad_spans(latents), latents
        return rows, None


def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def generated(trainer: ILVRGRPOTrainer, num_tokens: int) -> list[int]:
    """Tokens as a rollout makes them, by a rank that needs more forwards than another, or fewer."""
    inputs = trainer.processing_class(text="Plan", return_tensors="pt").to(trainer.accelerator.device)
    with gathered(trainer.accelerator, trainer.model), torch.no_grad():
        tokens = trainer.student.generate(
            **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
        )
    return tokens[0].tolist()


def run(name: str, output_dir: Path, *, folder: str, batch_size: int, resume: int = 0, lora: bool = False, **settings):
    """Trains and saves losses and whole weights; with `resume`, goes on from that step's checkpoint."""
    torch.manual_seed(0)
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Plan" + " Go" * i}]}],
            "images": [make_image("red")],
        }
        for i in range(8)
    ]
    defaults = {
        "per_device_train_batch_size": batch_size,
        "num_generations": 2,
        "max_completion_length": 16,
        "beta": 0.1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    trainer = GivenRollouts(
        ILVRForConditionalGeneration.from_pretrained(folder),
        length_reward,
        ILVRGRPOConfig(str(output_dir / "run"), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
        processing_class=ILVRProcessor.from_pretrained(folder),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
    )
    checkpoint = output_dir / "run" / f"checkpoint-{resume}"
    trainer.train(resume_from_checkpoint=str(checkpoint) if resume else None)
    tokens = generated(trainer, 4 + 3 * trainer.accelerator.process_index)
    weights = {name: whole(p) for name, p in trainer.student.named_parameters()}
    tokens = trainer.accelerator.gather_for_metrics([tokens], use_gather_object=True)
    with evaluating(trainer):
        gap = SwapGapCallback(trainer, make_dataset(ASKED), max_new_tokens=12).measure()
    if trainer.is_world_process_zero():
        save_file(weights, output_dir / f"{name}.safetensors")
        facts = {
            "log": trainer.state.log_history,
            "wrapper": type(trainer.model_wrapped).__name__,
            "tokens": tokens,
            "gap": gap,
        }
        (output_dir / f"{name}.json").write_text(json.dumps(facts))


def main(runs_file: str, output_dir: str):
    torch.set_num_threads(1)
    gc.freeze()  # each run collects garbage several times, and would walk all of torch
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_cpu()
    for name, settings in json.loads(Path(runs_file).read_text()).items():
        run(name, Path(output_dir), **settings)
    PartialState().destroy_process_group()  # an open one can abort a process that ends


if __name__ == "__main__":
    main(*sys.argv[1:])
