"""Answers of a model to the questions of a data set, in batches, or one by one with the latents.

B batch, T sequence, K latents a span, D hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature

from ilvr import ILVRForConditionalGeneration, ILVRProcessor
from ilvr.data import prompt_of


GREEDY = {"do_sample": False, "max_new_tokens": 256}


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Args:
        text (`str`): the generated words, without latents and other special tokens.
        tokens (`int`): generated tokens, those of spans and the end included.
        spans (`int`): spans generated in full.
        finished (`bool`): whether the answer came to its end, and was not cut off by `max_new_tokens`.
        latents (`torch.Tensor` of shape `(spans, K, D)`, *optional*): if they were asked for.
    """

    text: str
    tokens: int
    spans: int
    finished: bool
    latents: torch.Tensor | None = None


def answer_batch(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    samples: list[dict[str, Any]],
    *,
    output_latents: bool = False,
    **generate_kwargs: Any,
) -> list[Answer]:
    """Answers to the first question of each sample, generated at once.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        samples (`list[dict]`): with `messages` and `images`.
        output_latents (`bool`, *optional*, defaults to `False`): whether answers hold their latents.
        generate_kwargs: passed to `generate`; greedy decoding of up to 256 tokens by default.

    Returns:
        `list[Answer]`: one for each sample.
    """
    conversations = [prompt_of(sample) for sample in samples]
    return answer_conversations(model, processor, conversations, output_latents=output_latents, **generate_kwargs)


@torch.inference_mode()
def answer_conversations(
    model: ILVRForConditionalGeneration,
    processor: ILVRProcessor,
    conversations: list[list[dict[str, Any]]],
    *,
    output_latents: bool = False,
    **generate_kwargs: Any,
) -> list[Answer]:
    """Answers to conversations, generated at once.

    Args:
        model ([`ILVRForConditionalGeneration`]), processor ([`ILVRProcessor`]).
        conversations (`list[list[dict]]`): as `apply_chat_template` takes them, with their images in their parts.
        output_latents (`bool`, *optional*, defaults to `False`): whether answers hold their latents.
        generate_kwargs: passed to `generate`; greedy decoding of up to 256 tokens by default.

    Returns:
        `list[Answer]`: one for each conversation.
    """
    model.eval()
    inputs = encode_prompts(processor, conversations).to(model.device)
    settings = {**GREEDY, **generate_kwargs, "return_dict_in_generate": True}
    if output_latents:
        settings["output_latents"] = True
    output = model.generate(**inputs, **settings)
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]  # (B, T)
    lengths, finished = _lengths(new_ids, model.generation_config.eos_token_id)
    spans = (new_ids == processor.latent_token_ids[2]).sum(1).tolist()
    texts = processor.batch_decode(new_ids, skip_special_tokens=True)
    latents = output.latents if output_latents else [None] * len(texts)
    return [Answer(*row) for row in zip(texts, lengths, spans, finished, latents)]


def encode_prompts(processor: ILVRProcessor, conversations: list[list[dict[str, Any]]]) -> BatchFeature:
    """What `generate` takes, for conversations that an answer is to follow."""
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def _lengths(new_ids: torch.Tensor, end_ids: int | list[int] | None) -> tuple[list[int], list[bool]]:
    """Tokens of each row of `new_ids` (B, T) up to its first end, which is counted; and whether it has one."""
    ends = torch.tensor([end_ids] if isinstance(end_ids, int) else end_ids or [], device=new_ids.device)
    is_end = torch.isin(new_ids, ends)
    lengths = ((is_end.cumsum(1) - is_end.long()) == 0).sum(1)  # columns with no end before them
    return lengths.tolist(), is_end.any(1).tolist()


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
    answers = []
    for start in tqdm(range(0, len(dataset), batch_size), desc=desc):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        answers += [answer.text for answer in answer_batch(model, processor, rows, **generate_kwargs)]
    return answers


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
    (answer,) = answer_batch(model, processor, [sample], output_latents=True, **generate_kwargs)
    assert answer.latents is not None
    return answer.text, answer.latents
