"""GRPO of a few steps on given completions, alone or as one of several processes; launched by `test_grpo_engines.py`.

torchrun … distributed_grpo_run.py MODEL_DIR OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, Image, List
from helpers import make_image
from safetensors.torch import save_file

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.trainer import ILVRGRPOConfig, ILVRGRPOTrainer


class GivenRollouts(ILVRGRPOTrainer):
    """Completions that depend on the prompt and the place in its group, so that processes have those of one process.

    Some have no span: a process may have none at all.
    """

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **kwargs):
        start, pad, end = self.student.config.latent_token_ids
        span = [start, *[pad] * self.student.config.latent_size, end]
        eos = self.eos_token_ids[0]
        choices = [[9, *span, 11, eos], [*span, 9, 10, *span, eos], [12, 13, 14, eos], [10, eos]]
        self._rollout_latents = [torch.empty(0)] * len(prompt_ids)  # no reward here looks at them
        rows = enumerate(prompt_ids)
        return [choices[2 * (len(ids) % 2) + i % num_generations] for i, ids in rows], None


def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def run(model_dir: str, output_dir: str, batch_size: int):
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Plan" + " Go" * i}]}],
            "images": [make_image("red")],
        }
        for i in range(8)
    ]
    args = ILVRGRPOConfig(
        output_dir,
        per_device_train_batch_size=batch_size,
        num_generations=2,
        max_completion_length=16,
        beta=0.1,
        max_steps=4,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        gradient_accumulation_steps=1,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=3,
    )
    trainer = GivenRollouts(
        ILVRForConditionalGeneration.from_pretrained(model_dir),
        length_reward,
        args,
        train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
        processing_class=ILVRProcessor.from_pretrained(model_dir),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        weights = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
        save_file(weights, Path(output_dir, "weights.safetensors"))
        facts = {"log": trainer.state.log_history, "wrapper": type(trainer.model_wrapped).__name__}
        Path(output_dir, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*sys.argv[1:], batch_size=2)
