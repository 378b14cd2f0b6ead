"""What the decoding of words has to know about spans: ids that are forced, settings that make no sense with latents.

B batch (times beams), T sequence, K latents a span, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor


Intervention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LatentSpanLogitsProcessor(LogitsProcessor):
    """Once a row has produced `<|latent_start|>`, forces K times `<|latent_pad|>` and then `<|latent_end|>`.

    Each row is in its own phase, read off its last K + 1 ids. A forced id has log-probability 0. Outside a span
    `<|latent_pad|>`, `<|latent_end|>` and the ids in `suppressed` (image and video placeholders) cannot be sampled.
    With `check`, a row in which nothing is left to sample is an error; that waits for the device at each step.
    """

    def __init__(
        self,
        start_id: int,
        pad_id: int,
        end_id: int,
        latent_size: int,
        suppressed: tuple[int, ...] = (),
        check: bool = False,
    ) -> None:
        self.start_id, self.pad_id, self.end_id, self.latent_size = start_id, pad_id, end_id, latent_size
        self.never_free, self.check = [pad_id, end_id, *suppressed], check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        num_latents = latents_at_end(input_ids, self.pad_id, self.latent_size)  # (B,)
        in_span = (input_ids[:, -1] == self.start_id) | (num_latents > 0)
        forced_id = torch.where(num_latents < self.latent_size, self.pad_id, self.end_id).unsqueeze(1)  # (B, 1)
        in_span = in_span.unsqueeze(1)
        scores = scores.masked_fill(in_span, -torch.inf)  # the only copy: a row is as long as the vocabulary
        scores[:, self.never_free] = -torch.inf
        scores.scatter_(1, forced_id, torch.where(in_span, 0.0, scores.gather(1, forced_id)))
        if self.check and (stuck := scores.isneginf().all(1)).any():
            raise ValueError(
                f"prefix_allowed_tokens_fn leaves rows {stuck.nonzero().flatten().tolist()} no token: outside a span "
                f"the ids {self.never_free} (latents, span ends, placeholders of images) cannot be generated. Allow "
                "others, too; within a span the function is not asked."
            )
        return scores


class WholeSpansLogitsProcessor(LogitsProcessor):
    """Forbids `<|latent_start|>` where fewer than K + 2 tokens are left, so that no sequence ends within a span.

    Args:
        start_id (`int`): of `<|latent_start|>`.
        latent_size (`int`): K.
        max_length (`int`): at which sequences are cut, the prompt included.
    """

    def __init__(self, start_id: int, latent_size: int, max_length: int) -> None:
        self.start_id, self.last_start = start_id, max_length - latent_size - 2

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] <= self.last_start:
            return scores
        scores = scores.clone()
        scores[:, self.start_id] = -torch.inf
        return scores


def latents_at_end(input_ids: torch.Tensor, pad_id: int, latent_size: int) -> torch.Tensor:
    """How many `<|latent_pad|>` each row of `input_ids` (B, T) ends with, at most K: (B,)."""
    return (input_ids[:, -latent_size:] == pad_id).flip(1).long().cumprod(1).sum(1)


@dataclass
class LatentControl:
    """What a call of `generate` asked to be done with the latents.

    `history` maps the column of a latent to the vectors (B, D) that were put in there.
    """

    intervention: Intervention | None = None
    history: dict[int, torch.Tensor] | None = None
    jacobi_iterations: int | None = None

    def check(self, config: GenerationConfig) -> None:
        """Refuses what the settings of the call do not allow."""
        if not config.use_cache:
            raise ValueError("output_latents, latent_intervention and jacobi_iterations need use_cache=True.")
        if self.history is not None and not config.return_dict_in_generate:
            raise ValueError("output_latents=True needs return_dict_in_generate=True, to have a place for them.")
        if self.jacobi_iterations is not None:
            if self.jacobi_iterations < 1:
                raise ValueError(f"`jacobi_iterations` must be at least 1, got {self.jacobi_iterations}.")
            if config.output_hidden_states or config.output_attentions:
                raise ValueError("jacobi_iterations keeps no hidden states or attentions of each step to return.")


CONTINUOUS_BATCHING = (
    "Continuous batching (generate_batch, paged caches) runs a loop of its own, which feeds no latents back. Call "
    "generate with a dynamic cache."
)


def check_decoding(config: GenerationConfig) -> None:
    """Refuses settings of a decoding that knows words alone."""
    if config.cache_implementation == "paged":
        raise ValueError(CONTINUOUS_BATCHING)
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={config.guidance_scale} runs a second, unconditional sequence, which would need latents "
            "of its own. Remove it."
        )
