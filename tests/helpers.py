"""What several test modules use: samples, trainers of a few steps, generation in mixed phases, gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch
from backbones import BUILDERS
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from transformers.generation import LogitsProcessorList

from ilvr.trainer import ILVRTrainer, ILVRTrainingConfig, SelectionDrawingCallback


LATENT_SIZE = 3
every_backbone = pytest.mark.parametrize("backbone_name", list(BUILDERS), indirect=True, scope="session")


def perturb(model, scale: float = 0.2, seed: int = 1):
    """Moves all weights away from their initial values, where biases are 0, norms 1 and outputs nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5)
    return model


def untie(model) -> None:
    """Gives the language-model head weights of its own."""
    head = model.vlm.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.01)
    for config in (model.config, model.vlm.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def make_image(color: str, size: int = 32) -> PILImage.Image:
    """An image with a coloured corner; 32 pixels are 2 x 2 visual tokens."""
    image = PILImage.new("RGB", (size, size), "white")
    image.paste(color, (0, 0, size // 2, size // 3))
    return image


def make_sample(words: list[str], question: str = "Plan", size: int = 32) -> dict:
    """A sample whose assistant says `words` with a helper image between each two of them."""
    colors = ["red", "green", "blue", "black", "orange", "purple"]
    content, images = [], [make_image("gray", size)]
    for i, word in enumerate(words):
        if i:
            content.append({"type": "image", "text": None})
            images.append(make_image(colors[i % 6], size))
        content.append({"type": "text", "text": word})
    user = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": content}]
    return {"messages": messages, "images": images}


def encode(processor, samples: list[dict], padding_side: str = "right", prompt_only: bool = False):
    """Model inputs of a batch of samples."""
    conversations = []
    for sample in samples:
        user, assistant = sample["messages"]
        parts = [{"type": "image", "image": sample["images"][0]}, *user["content"][1:]]
        user = {"role": "user", "content": parts}
        conversations.append([user] if prompt_only else [user, assistant])
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=prompt_only,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )


def ask_about(processor, image, question):
    """Inputs for a question about a picture, made by the processor: (1, T)."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


# ------------------------------------------------------------------------------------------------------------ training

WORDS = ["Right", "Down", "Up Left", "Left Left Up"]
SAMPLES = [make_sample([WORDS[(i + j) % 4] for j in range(2 + i % 3)], f"Plan {i}") for i in range(8)]


def make_dataset(samples=SAMPLES) -> Dataset:
    return Dataset.from_list(samples).cast_column("images", List(Image()))


def make_trainer(
    model,
    processor,
    folder,
    samples=SAMPLES,
    dataset=None,
    eval_dataset=None,
    callbacks=None,
    peft_config=None,
    **kwargs,
):
    settings = {
        "stage": 1,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "alignment_noise": 0.0,
        **kwargs,
    }
    args = ILVRTrainingConfig(str(folder), **settings)
    return ILVRTrainer(
        model,
        args,
        train_dataset=make_dataset(samples) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
        peft_config=peft_config,
    )


# --------------------------------------------------------------------------------------------------------------- model

SPAN_SAMPLES = [make_sample(["Right", "Down", "Up"]), make_sample(["Left", "Right Down Left", "Up Up"], "Plan a path")]


def next_token_loss(logits, inputs):
    mask = inputs["attention_mask"][:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return -(log_probs * mask).sum() / mask.sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    # Some gradients are zero but for rounding, as those of the biases of keys.
    return max(float((one[k] - other[k]).abs().max() / other[k].abs().max().clamp(min=1e-4)) for k in one)


def prefix_recompute(model, inputs):
    """The published algorithm: for each latent column, a forward pass over everything before it."""
    core, pads = model.model.core, inputs["input_ids"] == model.config.latent_pad_token_id
    encoded = model.model._encode(inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"})
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for column in pads.any(0).nonzero().flatten().tolist():
        before = core(inputs_embeds=embeds, **encoded).last_hidden_state[:, column - 1]
        latent = torch.where(pads[:, column, None], model.model.latent_head(before), embeds[:, column])
        embeds = torch.cat([embeds[:, :column], latent[:, None], embeds[:, column + 1 :]], dim=1)
    return model.get_output_embeddings()(core(inputs_embeds=embeds, **encoded).last_hidden_state)


# ---------------------------------------------------------------------------------------------------------- generation

PROMPTS = [make_sample(["x"], q) for q in ("Plan", "Plan a path to the goal", "Go")]
STEPS = [(1, 9), (3,), ()]
NEW_TOKENS = 24


class StartSpansAt:
    """Makes each row begin its spans at steps of its own, so that a batch is in mixed phases."""

    def __init__(self, start_id, prompt_length, steps):
        self.start_id, self.prompt_length, self.steps = start_id, prompt_length, steps

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        rows_per_prompt = len(scores) // len(self.steps)
        for row in range(len(scores)):
            scores[row, self.start_id] = 1e4 if step in self.steps[row // rows_per_prompt] else -1e4
        return scores


def generate(model, inputs, steps=STEPS, **kwargs):
    start_spans = StartSpansAt(model.config.latent_start_token_id, inputs["input_ids"].shape[1], steps)
    kwargs = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    return model.generate(**inputs, logits_processor=LogitsProcessorList([start_spans]), **kwargs)


# ------------------------------------------------------------------------------------------------------------ watching

PARTS = {"loss", "ce_loss", "entropy", "mean_token_accuracy", "spans_per_sample", "num_tokens", "grad_norm"}
SPEED = {"step_time", "tokens_per_second"}
ALIGNMENT = {"alignment_loss", "latent_cosine", "retrieval_at_1", "teacher_distance", "target_similarity"}
SELECTION = {"selected_per_span", "selected_mass", "selected_1", "selected_2", "selected_3"}


def outlined(image: PILImage.Image, grid, color) -> list[int]:
    """Numbers, in raster order, of the cells with a frame all around."""
    rows, columns = grid
    height, width = image.height / rows, image.width / columns
    found = []
    for cell in range(rows * columns):
        left, top = cell % columns * width, cell // columns * height
        x, y = left + width / 2, top + height / 2
        points = [(x, top + 1), (x, top + height - 2), (left + 1, y), (left + width - 2, y)]
        if all(image.getpixel((int(a), int(b))) == color for a, b in points):
            found.append(cell)
    return found


def run_with_pictures(model, processor, folder, every=2, **settings):
    trainer = make_trainer(model, processor, folder, **settings)
    if every:
        trainer.add_callback(SelectionDrawingCallback(trainer, make_dataset(SAMPLES[1:3]), every=every))
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------------------- readers

MONET_SPAN = "<abs_vis_token></abs_vis_token>"

REFERENCE = {
    "text_input": "Plan",
    "image_input": ["board.png"],
    "sequence_plan": [
        {"type": "text", "content": "Right "},
        {"type": "latent", "helper_image": "step 1.png"},
        {"type": "text", "content": "\\boxed{R}"},
    ],
    "original_final_answer": "R",
    "map_desc": [[1, 2], [0, -1]],
}
MIRAGE = {
    "text_input": "Here is <image> Plan",
    "image_input": "board.png",
    "image_output": "step 1.png",
    "text_output": "Right <output_image>\\boxed{\\text{R}}",
}
ZEBRA_COT = {
    "Question": "See <image_start>[problem_image_1]<image_end> Plan",
    "Text Reasoning Trace": "Right <image_start>[reasoning_image_1]<image_end> as in "
    "<image_start>[problem_image_1]<image_end>",
    "Final Answer": "R",
    "problem_image_1": "board.png",
    "problem_image_2": None,
    "reasoning_image_1": "step 1.png",
}
MONET = {
    "data": [
        {"role": "system", "content": [{"type": "text", "text": "Think."}]},
        {"role": "user", "content": [{"type": "image", "image": "board.png"}, {"type": "text", "text": "Plan"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": f"Right {MONET_SPAN}"},
                {"type": "image", "image": "step 1.png"},
                {"type": "text", "text": "<observation>Up</observation> \\boxed{R}"},
            ],
        },
    ],
    "metadata": {"dataset_name": "ReFocus", "sample_id": 7},
}
NATIVE = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Plan"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Right "}, {"type": "image"}]},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "Up"},
    ],
    "images": ["board.png", "step 1.png"],
    "answer": "Up",
}
ROWS = {"native": NATIVE, "reference": REFERENCE, "mirage": MIRAGE, "zebra_cot": ZEBRA_COT, "monet": MONET}


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ----------------------------------------------------------------------------------------------------------- processes

NO_ILVR = """
import sys
class NoILVR:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ilvr":
            raise ImportError("ilvr is not to be had here")
sys.meta_path.insert(0, NoILVR())
"""


def run_without_ilvr(script: str, modules_cache, **environment) -> str:
    """What a script prints that runs where transformers is installed and `ilvr` is not, as for a user of the Hub."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules_cache), **environment}
    command = [sys.executable, "-c", NO_ILVR + script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
