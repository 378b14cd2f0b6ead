"""Rollouts with latents: how they are generated, and how a model scores them with the latents they had.

Shapes: B batch, T sequence, S spans, K latents a span, D hidden.
"""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from ilvr.latent_decoding import WholeSpansLogitsProcessor


@contextmanager
def rollouts_with_latents(model: Any, sigma: float | None = None) -> Generator[list[torch.Tensor]]:
    """Within it, `model.generate` ends no sequence within a span, and its latents are kept.

    `GRPOTrainer` calls `generate` in the midst of a method, through the wrappers of its engine and of an adapter, and
    keeps ids alone.

    Args:
        model ([`ILVRForConditionalGeneration`]): without wrappers.
        sigma (`float`, *optional*): standard deviation of normal noise that is added to each latent.

    Yields:
        `list[torch.Tensor]`: for each row that was generated, its latents (spans, K, D).
    """
    generate, config, latents = model.generate, model.config, []

    def draw(predicted: torch.Tensor, span: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.normal(predicted, cast(float, sigma))

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
            latent_intervention=None if sigma is None else draw,
            **inputs,
        )
        latents.extend(outputs.latents)
        return outputs.sequences

    model.generate = recorded
    try:
        yield latents
    finally:
        del model.generate


class WithLatents:
    """Stands in for a model that scores rows of rollouts in chunks, and puts in the latents that they had.

    `GRPOTrainer` calls it with a fixed list of inputs, and its head returns no latents, so that what the model
    predicts in their place is picked up on the way.

    Args:
        model (`nn.Module`): called with the rows in their order, each once.
        core ([`ILVRModel`]): of that model, without wrappers.
        values (`torch.Tensor` of shape `(B, S, K, D)`), mask (`torch.BoolTensor` of shape `(B, S, K)`): of all rows.
    """

    def __init__(self, model: nn.Module, core: nn.Module, values: torch.Tensor, mask: torch.Tensor) -> None:
        self.model, self.core, self.values, self.mask = model, core, values, mask
        self.predictions: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        start = sum(len(chunk) for chunk in self.predictions)
        rows = slice(start, start + len(input_ids))
        values = self.values[rows]

        def keep(module: nn.Module, args: Any, outputs: Any) -> Any:
            predicted = outputs.predicted_latents
            self.predictions.append(torch.zeros_like(values) if predicted is None else predicted)
            # DDP looks for what has a gradient from the outputs that it sees.
            outputs.last_hidden_state = outputs.last_hidden_state + 0 * self.predictions[-1].sum()
            return outputs

        hook = self.core.register_forward_hook(keep)
        try:
            return self.model(input_ids=input_ids, latent_values=values, latent_mask=self.mask[rows], **inputs)
        finally:
            hook.remove()

    @property
    def predicted(self) -> torch.Tensor:
        """What the model predicts in the place of the latents, (B, S, K, D)."""
        return torch.cat(self.predictions)
