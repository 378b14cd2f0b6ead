"""Answers of a model to the questions of a data set, in batches, or one by one with the latents."""

from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import prompt_of


@torch.inference_mode()
def generate_answers(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    desc: str = "Generating",
    **generate_kwargs: Any,
) -> list[str]:
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


@torch.inference_mode()
def answer_with_latents(
    model: ILVRForConditionalGeneration, processor: ILVRProcessor, sample: dict[str, Any], **generate_kwargs: Any
) -> tuple[str, torch.Tensor]:
    """The answer to the first question of a sample, and the latents that it was thought with.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        sample (`dict`): with `messages` and `images`.
        generate_kwargs: passed to `generate`; greedy decoding by default.

    Returns:
        `tuple[str, torch.Tensor]`: the generated words, and the latents of shape (spans, K, D).
    """
    model.eval()
    inputs = processor.apply_chat_template(
        [prompt_of(sample)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_latents": True, **generate_kwargs}
    output = model.generate(**inputs, **settings)
    new_ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new_ids, skip_special_tokens=True), output.latents[0]
