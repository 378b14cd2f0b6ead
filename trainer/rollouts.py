"""What reinforcement learning asks of `generate` with latents: whole spans, and which ids were no decision."""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ilvr import ILVRForConditionalGeneration
from ilvr.latent_decoding import WholeSpansLogitsProcessor


@contextmanager
def rollouts_with_latents(model: ILVRForConditionalGeneration) -> Generator[list[torch.Tensor]]:
    """Within it, `model.generate` ends no sequence within a span, and its latents are kept.

    `GRPOTrainer` calls `generate` in the midst of a method, through the wrappers of its engine and of an adapter, and
    keeps ids alone.

    Args:
        model ([`ILVRForConditionalGeneration`]): without wrappers.

    Yields:
        `list[torch.Tensor]`: for each row that was generated, its latents (spans, K, D).
    """
    generate, config, latents = model.generate, model.config, []

    def recorded(input_ids: torch.Tensor, generation_config: GenerationConfig, **inputs: Any) -> torch.Tensor:
        max_length = input_ids.shape[1] + generation_config.max_new_tokens
        whole = WholeSpansLogitsProcessor(config.latent_token_ids[0], config.latent_size, max_length)
        generation_config = copy.copy(generation_config)
        generation_config.return_dict_in_generate = True
        outputs = generate(
            input_ids=input_ids,
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([whole]),
            output_latents=True,
            **inputs,
        )
        latents.extend(outputs.latents)
        return outputs.sequences

    model.generate = recorded
    try:
        yield latents
    finally:
        del model.generate
