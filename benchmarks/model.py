"""What is measured: a Qwen2.5-VL of 8 layers, 512 wide, and samples of a given number of spans, latents and tokens.

The weights are random, since the time of a step does not depend on them.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Image, List, disable_progress_bars
from PIL import Image as PILImage
from transformers.utils import logging

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.tasks.small_qwen import build_small_qwen
from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig


WORDS = ["Right", "Down", "Left", "Up"]
PATCH_SIZE = 14
IMAGE_SIZE = 448  # pixels; 16 x 16 visual tokens, as many candidates as the paper keeps of a helper image
WORDS_BETWEEN_SPANS = 16

disable_progress_bars()
logging.disable_progress_bar()


@dataclass(frozen=True)
class Workload:
    """One point of the grid: S spans of K latents in each of B samples of T tokens."""

    spans: int = 4
    latents: int = 8
    batch: int = 1
    tokens: int = 607

    def __str__(self):
        return f"S={self.spans} K={self.latents} B={self.batch} T={self.tokens}"


def build_backbone(folder: Path) -> None:
    """Saves the backbone. Its vision tower has the share of the decoder's size that Qwen2.5-VL-7B's has."""
    torch.manual_seed(0)
    build_small_qwen(
        folder,
        [" ".join(["", *WORDS])] * 20,
        hidden_size=512,
        num_layers=8,
        vision_hidden_size=256,
        vision_layers=4,
        patch_size=PATCH_SIZE,
    )


def load(folder: Path, latents: int):
    """Student and processor for spans of `latents` vectors, fed back as they are, as published."""
    processor = ILVRProcessor.from_backbone(folder, latent_size=latents)
    processor.image_processor.size = {"shortest_edge": 4 * PATCH_SIZE**2, "longest_edge": IMAGE_SIZE**2}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ILVRForConditionalGeneration.from_backbone(folder, latent_size=latents, latent_head="identity")
    return model.to(device).train(), processor


def make_sample(workload: Workload, processor) -> dict:
    """A conversation of exactly `workload.tokens` tokens; words of the question make up the length."""
    text = "".join(f" {WORDS[i % 4]}" for i in range(WORDS_BETWEEN_SPANS))
    answer = [{"type": "text", "text": text}]
    for _ in range(workload.spans):
        answer += [{"type": "image", "text": None}, {"type": "text", "text": text}]
    images = [_board(i) for i in range(workload.spans + 1)]

    def conversation(num_words: int, image=None) -> list[dict]:
        picture = {"type": "image", "text": None} if image is None else {"type": "image", "image": image}
        question = "".join(f" {WORDS[i % 4]}" for i in range(num_words))
        user = [picture, {"type": "text", "text": question}]
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    def length(num_words: int) -> int:
        encoded = processor.apply_chat_template(conversation(num_words, images[0]), tokenize=True, return_dict=True)
        return len(encoded["input_ids"][0])

    num_words = workload.tokens - length(0)
    if num_words < 1 or length(num_words) != workload.tokens:
        raise ValueError(f"{workload}: spans and images take {length(0)} tokens; ask for a longer sequence.")
    return {"messages": conversation(num_words), "images": images}


def _board(seed: int) -> PILImage.Image:
    pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PILImage.fromarray(pixels.numpy()).resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.NEAREST)


def make_trainer(
    model, processor, workload: Workload, stage: int, folder: Path, copies: int = 1, peft_config=None, **kwargs
):
    """The trainer that a user would build, on `copies` batches; deterministic, so that losses can be compared."""
    settings = {
        "stage": stage,
        "per_device_train_batch_size": workload.batch,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        "alignment_noise": 0.0,
        "unselected_slots": "pad",  # the published algorithm's
        "bf16": torch.cuda.is_available(),  # for the teacher, whose weights are fp32
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **kwargs,
    }
    samples = [make_sample(workload, processor)] * (workload.batch * copies)
    dataset = Dataset.from_list(samples).cast_column("images", List(Image()))
    args = ILVRTrainingConfig(str(folder / f"stage{stage}"), **settings)
    return ILVRTrainer(model, args, train_dataset=dataset, processing_class=processor, peft_config=peft_config)


def make_batch(trainer) -> dict[str, torch.Tensor]:
    """The first batch, as the trainer's collator makes it."""
    rows = [trainer.train_dataset[i] for i in range(trainer.args.per_device_train_batch_size)]
    return {name: tensor.to(trainer.args.device) for name, tensor in trainer.data_collator(rows).items()}


def whole_teacher(trainer):
    """The teacher as the published code has it: a second model, with its vision tower and head."""
    teacher = copy.deepcopy(trainer.student).eval().requires_grad_(False)
    teacher.__dict__.pop("forward", None)  # SFTTrainer's patch, bound to the student
    teacher.model.load_state_dict(trainer.teacher.state_dict(), strict=False)
    return teacher
