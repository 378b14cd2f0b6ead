"""Answers of a model to the questions of a data set, in batches, and their scores."""

from pathlib import Path

import evaluate
import torch
from tqdm.auto import tqdm

import ilvr.tasks


METRICS_FOLDER = Path(ilvr.tasks.__file__).parent


def load_metric(name: str) -> evaluate.Metric:
    """Loads one of this package's `evaluate` metrics, such as `"frozen_lake"`; works offline."""
    path = METRICS_FOLDER / name / "metric" / f"{name}.py"
    if not path.is_file():
        known = sorted(p.parent.name for p in METRICS_FOLDER.glob("*/metric"))
        raise ValueError(f"There is no metric {name!r}; choose one of {known}.")
    return evaluate.load(str(path))


def prompt_of(sample: dict) -> list[dict]:
    """The first user turn of a sample as a conversation, its image parts filled in."""
    images = iter(sample["images"])
    content = sample["messages"][0]["content"]
    parts = [{"type": "image", "image": next(images)} if part["type"] == "image" else part for part in content]
    return [{"role": "user", "content": parts}]


@torch.inference_mode()
def generate_answers(model, processor, dataset, *, batch_size=64, desc="Generating", **generate_kwargs) -> list[str]:
    """Answers to the first question of each sample.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        dataset (`Dataset`): with `messages` and `images`.
        batch_size (`int`, *optional*, defaults to 64).
        desc (`str`, *optional*): of the progress bar.
        generate_kwargs: passed to `generate`; greedy decoding by default.

    Returns:
        `list[str]`: the generated words, without latents and other special tokens.
    """
    generate_kwargs = {"do_sample": False, "max_new_tokens": 256, **generate_kwargs}
    model.eval()
    answers = []
    for start in tqdm(range(0, len(dataset), batch_size), desc=desc):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        inputs = processor.apply_chat_template(
            [prompt_of(row) for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        output = model.generate(**inputs, **generate_kwargs)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
