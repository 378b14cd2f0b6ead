"""Three ways to fill latent spans in forward passes over whole sequences: with given latents, by a walk that computes
them one after the other, or all at once by Jacobi iteration.

Each returns the backbone's outputs for all columns, and the fields `predicted_latents` and `latent_inputs`, each
(B, S, K, D), of the model's output.

B batch, T sequence, S spans, K latents a span, D hidden.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .latent_cache import ChunkCache, checkpointing_with_cache
from .latent_decoding import Intervention
from .latent_sequences import Sequences
from .latent_spans import chunk_bounds, scatter_spans
from .weight_gradients import GatheredWeightGradients


Filled = tuple[Any, dict[str, torch.Tensor]]


# ------------------------------------------------------------------------------------------------------- given latents


def fill_forced(
    core: PreTrainedModel,
    latent_head: nn.Module,
    sequences: Sequences,
    latent_values: torch.Tensor,
    latent_mask: torch.Tensor | None = None,
) -> Filled:
    """Puts given latents in (teacher forcing): one forward.

    Args:
        core (`PreTrainedModel`): the backbone without its language-model head.
        latent_head (`nn.Module`): from the last hidden state to the next latent.
        sequences (`Sequences`): where they are put in.
        latent_values (`torch.Tensor` of shape `(B, S, K, D)`): the latents.
        latent_mask (`torch.BoolTensor` of shape `(B, S, K)`, *optional*, defaults to all): which of them are used.

    Raises:
        ValueError: if the latents are not those of these sequences and this model.
    """
    _check_latents(sequences, latent_values, latent_mask)
    num_spans = latent_values.shape[1]
    if latent_mask is None:
        latent_mask = torch.ones(latent_values.shape[:3], dtype=torch.bool, device=latent_values.device)
    embeds = scatter_spans(sequences.embeds, sequences.is_latent, latent_values, latent_mask)
    outputs = core(**sequences.inputs(0, embeds, sequences.cache))
    return outputs, {
        "predicted_latents": sequences.predict(outputs.last_hidden_state, latent_head, num_spans),
        "latent_inputs": sequences.gather(embeds, num_spans),
    }


def _check_latents(sequences: Sequences, latent_values: torch.Tensor, latent_mask: torch.Tensor | None) -> None:
    batch_size, num_spans, size, hidden_size = latent_values.shape
    if size != sequences.latent_size:
        raise ValueError(
            f"latent_values holds {size} latents a span; the model's latent_size is {sequences.latent_size}."
        )
    rows, _, width = sequences.embeds.shape
    if (batch_size, hidden_size) != (rows, width):
        raise ValueError(
            f"latent_values has shape {tuple(latent_values.shape)}; it should be ({rows}, spans, {size}, {width})."
        )
    counts = sequences.is_latent.sum(1)
    if counts.max() > num_spans * size:
        raise ValueError(
            f"Row {int(counts.argmax())} has {int(counts.max())} latent positions and latent_values holds "
            f"{num_spans * size} a row: {num_spans} spans of {size}. Give latents for all spans."
        )
    if latent_mask is not None and latent_mask.shape != latent_values.shape[:3]:
        raise ValueError(
            f"latent_mask has shape {tuple(latent_mask.shape)}; latent_values needs {tuple(latent_values.shape[:3])}."
        )


# ------------------------------------------------------------------------------------------ chunks and their gradients


class ChunkGradients:
    """How the forward of a chunk keeps what its backward pass needs.

    Args:
        core (`PreTrainedModel`): the backbone without its language-model head.
        checkpointed (`list[nn.Module]`): its layers that are checkpointed.
    """

    def __init__(self, core: PreTrainedModel, checkpointed: list[nn.Module]) -> None:
        self.checkpointed = checkpointed
        partitioned = any(hasattr(parameter, "ds_id") for parameter in core.parameters())
        self.weight_gradients = None if partitioned else GatheredWeightGradients()

    @contextmanager
    def of_chunk(self, num_columns: int) -> Generator[None]:
        """Gathers gradients of weights, but for chunks that a checkpoint replays, where nobody would gather them.

        A single column is not worth a checkpoint. With ZeRO-3, which gathers weights for each replay, all have one, so
        that ranks with walks of different lengths replay equally often.
        """
        if self.weight_gradients is None or (self.checkpointed and num_columns > 1):
            yield
            return
        for layer in self.checkpointed:
            layer.gradient_checkpointing = False
        try:
            with self.weight_gradients:
                yield
        finally:
            for layer in self.checkpointed:
                layer.gradient_checkpointing = True


@dataclass
class ChunkForward:
    """Runs the backbone `core` on a chunk of `sequences`, with `gradients` kept as a chunk's are."""

    core: PreTrainedModel
    sequences: Sequences
    gradients: ChunkGradients

    def __call__(self, start: int, embeds: torch.Tensor, cache: Cache | None, use_cache: bool = False) -> Any:
        """Outputs for the columns from `start` on that `embeds` (B, columns, D) holds."""
        inputs = {**self.sequences.inputs(start, embeds, cache), "use_cache": use_cache}
        with self.gradients.of_chunk(embeds.shape[1]):
            return self.core(**inputs)


def _joined(chunks: list[Any], cache: Cache | None = None) -> Any:
    """The backbone's outputs for all columns, from those of consecutive chunks."""
    outputs = chunks[-1]
    outputs.last_hidden_state = torch.cat([chunk.last_hidden_state for chunk in chunks], dim=1)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(torch.cat(layer, dim=1) for layer in zip(*(c.hidden_states for c in chunks)))
    outputs.past_key_values, outputs.attentions = cache, None
    return outputs


# ------------------------------------------------------------------------------------------------- one after the other


def fill_by_walk(
    core: PreTrainedModel,
    latent_head: nn.Module,
    sequences: Sequences,
    min_chunks: int = 0,
    feedback: torch.Tensor | None = None,
    intervention: Intervention | None = None,
) -> Filled:
    """The cached walk: each column is computed once, a chunk at a time, and the last hidden state of a chunk is the
    latent that the next one starts with.

    Args:
        core, latent_head, sequences: see `fill_forced`.
        min_chunks (`int`): number of forwards to run at least; the last ones have no effect.
        feedback (`torch.Tensor` of shape `(B, D)`, *optional*): what a latent in the first column is, if the walk goes
            on with a cache.
        intervention (`Callable`, *optional*): replaces latents before they are used, as in `generate`.

    Raises:
        ValueError: if a sequence starts with a latent and there is no feedback, or the mask is none of the padding.
    """
    sequences.check(feedback)
    is_latent, embeds, cache = sequences.is_latent, sequences.embeds, sequences.cache
    chunk_cache = ChunkCache.of_size(core.config.get_text_config(), is_latent.shape[1]) if cache is None else None
    chunks, inputs = [], []
    with checkpointing_with_cache(core) as checkpointed:
        forward = ChunkForward(core, sequences, ChunkGradients(core, checkpointed))
        for start, stop in chunk_bounds(is_latent):
            chunk = embeds[:, start:stop]
            if feedback is not None:
                if intervention is not None:
                    feedback = intervention(feedback, *sequences.place_of(start))
                first = torch.where(is_latent[:, start, None], feedback.to(chunk.dtype), chunk[:, 0])  # (B, D)
                chunk = torch.cat([first.unsqueeze(1), chunk[:, 1:]], dim=1)
            inputs.append(chunk)
            if cache is None:
                chunks.append(forward(start, chunk, chunk_cache))
                chunk_cache = chunk_cache.advance(stop)
            else:
                chunks.append(forward(start, chunk, cache, use_cache=True))
            feedback = latent_head(chunks[-1].last_hidden_state[:, -1])  # (B, D)
        if min_chunks > len(chunks):
            idle = idle_forwards(forward, min_chunks - len(chunks), latent_head, feedback)
            chunks[-1].last_hidden_state = chunks[-1].last_hidden_state + 0 * idle
    outputs, latents = _joined(chunks, cache), sequences.gather(torch.cat(inputs, dim=1))
    predicted = latents if intervention is None else sequences.predict(outputs.last_hidden_state, latent_head)
    return outputs, {"predicted_latents": predicted, "latent_inputs": latents}


def idle_forwards(forward: ChunkForward, count: int, latent_head: nn.Module, feedback: torch.Tensor) -> torch.Tensor:
    """The sum of `count` forwards of one column (B, 1, D), for ranks with shorter walks than others."""
    column, position_ids = forward.sequences.embeds[:, :1], forward.sequences.position_ids[..., :1]
    total = torch.zeros_like(column)
    for _ in range(count):
        # Fed back like the others, so that the backward pass, too, takes the parts of the model in their order.
        idle = column + 0 * feedback.unsqueeze(1).to(column.dtype)
        with forward.gradients.of_chunk(1):
            outputs = forward.core(inputs_embeds=idle, position_ids=position_ids, use_cache=False)
        feedback = latent_head(outputs.last_hidden_state[:, -1])
        total = total + outputs.last_hidden_state
    return total


# --------------------------------------------------------------------------------------------------------- in parallel


def fill_in_parallel(
    core: PreTrainedModel,
    latent_head: nn.Module,
    sequences: Sequences,
    iterations: int,
    gradient_iterations: int | None = None,
) -> Filled:
    """Jacobi iteration: in each forward all latents are what the forward before predicts for their places.

    Latents are the fixed point of one forward pass in which each depends on earlier ones only. Iteration n makes the
    n + 1 first latents of a row exact, so S * K - 1 iterations all of them; a contracting model needs far fewer. The
    columns before the first latent are computed once. Parallel Continuous Chain-of-Thought (arXiv 2506.18582).

    Args:
        core, latent_head, sequences: see `fill_forced`.
        iterations (`int`): n. The first one starts from the embeddings of `<|latent_pad|>`.
        gradient_iterations (`int`, *optional*, defaults to all): through how many of the last iterations the gradient
            flows back. With 0 the latents are constants.

    Raises:
        ValueError: if the numbers of iterations are out of range, or as `fill_by_walk`.
    """
    gradient_iterations = iterations if gradient_iterations is None else gradient_iterations
    if iterations < 1 or not 0 <= gradient_iterations <= iterations:
        raise ValueError(
            "`jacobi_iterations` must be at least 1 and `jacobi_gradient_iterations` between 0 and that, got "
            f"{iterations} and {gradient_iterations}."
        )
    if sequences.cache is not None:
        raise ValueError("jacobi_iterations computes whole sequences. Leave past_key_values out.")
    sequences.check()
    embeds, columns = sequences.embeds, sequences.is_latent.any(0).nonzero().flatten().tolist()
    # A batch without latents runs as many forwards as any other, since ranks of a sharded model wait for each other:
    # it iterates over the one column before the last, into which no latent is put.
    start, stop = (columns[0], columns[-1]) if columns else (embeds.shape[1] - 2, embeds.shape[1] - 1)
    is_latent = sequences.is_latent[:, start:, None]

    def fill(latents: torch.Tensor) -> torch.Tensor:
        """Embeddings of the columns from `start` on, with `latents` for the first of them."""
        latents = latents[:, : is_latent.shape[1]]
        rest = embeds[:, start + latents.shape[1] :]
        return torch.where(is_latent, torch.cat([latents.to(embeds.dtype), rest], dim=1), embeds[:, start:])

    with checkpointing_with_cache(core) as checkpointed:
        forward = ChunkForward(core, sequences, ChunkGradients(core, checkpointed))
        cache = ChunkCache.concatenating(core.config.get_text_config())
        prefix = forward(0, embeds[:, :start], cache)
        cache = cache.advance(start)
        before = prefix.last_hidden_state[:, -1:]
        inputs = fill(latent_head(before))
        for iteration in range(iterations):
            flows = torch.is_grad_enabled() and iteration >= iterations - gradient_iterations
            with torch.set_grad_enabled(flows):
                hidden = forward(start, inputs[:, : max(stop - start, 1)], cache).last_hidden_state
                latents = latent_head(torch.cat([before, hidden], dim=1))
            inputs = fill(latents)
        outputs = _joined([prefix, forward(start, inputs, cache)])
    return outputs, {
        "predicted_latents": sequences.predict(outputs.last_hidden_state, latent_head),
        "latent_inputs": sequences.gather(torch.cat([embeds[:, :start], inputs], dim=1)),
    }
