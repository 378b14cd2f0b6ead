"""Three ways to fill latent spans in forward passes over whole sequences: with given latents, by a walk that computes
them one after the other, or all at once by Jacobi iteration.

Each returns the backbone's outputs for all columns, and the fields `predicted_latents` and `latent_inputs`, each
(B, S, K, D), of the model's output.

B batch, T sequence, S spans, K latents a span, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .latent_attention import AttentionSeat, check_padding_mask
from .latent_cache import ChunkCache, checkpointing_with_cache
from .latent_spans import chunk_bounds, filled_slots, gather_spans, scatter_spans, slice_features
from .weight_gradients import GatheredWeightGradients


Filled = tuple[ModelOutput, dict[str, torch.Tensor]]


@dataclass
class Sequences:
    """Sequences with latent spans and all that the backbone wants to know of their columns.

    Args:
        embeds (`torch.Tensor` of shape `(B, T, D)`): embeddings of the input ids.
        is_latent (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        placeholders (`dict`): see `slice_features`.
        latent_size (`int`): K.
        seat (`AttentionSeat`): decides who sees whom.
        past (`int`): length of the cache before the first column.
        attention_mask (`torch.Tensor` of shape `(B, past + T)`): 0 at padding.
        position_ids (`torch.LongTensor` of shape `(…, B, T)`): as the backbone counts.
        mm_encoder_outputs (`dict`): image features, see `slice_features`.
        token_type_ids (`torch.LongTensor` of shape `(B, past + T)`, *optional*): which columns are images, for
            backbones in which an image's tokens see each other.
        others (`dict`): inputs that are the same for all columns.
    """

    embeds: torch.Tensor
    is_latent: torch.BoolTensor
    placeholders: dict[str, torch.BoolTensor]
    latent_size: int
    seat: AttentionSeat
    past: int
    attention_mask: torch.Tensor
    position_ids: torch.LongTensor
    mm_encoder_outputs: dict[str, Any]
    token_type_ids: torch.LongTensor | None = None
    others: dict[str, Any] = field(default_factory=dict)
    PER_COLUMN: ClassVar = ("attention_mask", "position_ids", "mm_encoder_outputs", "token_type_ids")

    def inputs(self, start: int, embeds: torch.Tensor, cache: Cache | None) -> dict[str, Any]:
        """The backbone's inputs for the columns from `start` on that `embeds` (B, columns, D) holds."""
        stop = start + embeds.shape[1]
        whole = stop == self.is_latent.shape[1]
        mask = self.attention_mask if whole else self.attention_mask[:, : self.past + stop]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": self.seat.mask(embeds, mask, cache),
            "position_ids": self.position_ids[..., start:stop],
            "past_key_values": cache,
            "mm_encoder_outputs": slice_features(self.mm_encoder_outputs, self.placeholders, start, stop),
            **self.others,
        }
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids[:, : self.past + stop]
        return inputs

    def check(self, feedback: torch.Tensor | None = None) -> None:
        """Refuses what cannot be computed a chunk at a time, or a first latent that no `feedback` (B, D) gives."""
        check_padding_mask(self.attention_mask)
        if feedback is None and self.is_latent[:, 0].any():
            raise ValueError("A sequence starts inside a latent span: <|latent_pad|> needs a column before it.")

    @property
    def num_spans(self) -> int:
        return -(-int(self.is_latent.sum(1).max()) // self.latent_size)

    def gather(self, values: torch.Tensor, num_spans: int | None = None) -> torch.Tensor:
        """What stands at the latent positions of `values` (B, T, D): (B, S, K, D)."""
        num_spans = self.num_spans if num_spans is None else num_spans
        return gather_spans(values, self.is_latent, num_spans, self.latent_size)

    def predict(
        self, hidden_states: torch.Tensor, latent_head: nn.Module, num_spans: int | None = None
    ) -> torch.Tensor:
        """What the columns before the latents, of `hidden_states` (B, T, D), predict in their place: (B, S, K, D).

        Zeros, and not the bias of the head, for the spans that a row does not have.
        """
        latents = latent_head(self.gather(hidden_states.roll(1, dims=1), num_spans))  # h_{t-1} in column t
        filled = filled_slots(self.is_latent, *latents.shape[1:3])
        return torch.where(filled.unsqueeze(-1), latents, latents.new_zeros(()))


# ------------------------------------------------------------------------------------------------------- given latents


def fill_forced(
    core: PreTrainedModel,
    latent_head: nn.Module,
    sequences: Sequences,
    latent_values: torch.Tensor,
    latent_mask: torch.BoolTensor | None,
    cache: Cache | None = None,
    use_cache: bool | None = None,
) -> Filled:
    """Puts given latents in (teacher forcing): one forward.

    Args:
        core (`PreTrainedModel`): the backbone without its language-model head.
        latent_head (`nn.Module`): from the last hidden state to the next latent.
        sequences (`Sequences`): where they are put in.
        latent_values (`torch.Tensor` of shape `(B, S, K, D)`): the latents.
        latent_mask (`torch.BoolTensor` of shape `(B, S, K)`, *optional*, defaults to all): which of them are used.
        cache (`Cache`, *optional*): of a generation.
        use_cache (`bool`, *optional*): whether to make a cache if there is none.

    Raises:
        ValueError: if the latents have another K than the model.
    """
    num_spans, size = latent_values.shape[1:3]
    if size != sequences.latent_size:
        raise ValueError(
            f"latent_values holds {size} latents a span; the model's latent_size is {sequences.latent_size}."
        )
    if latent_mask is None:
        latent_mask = torch.ones(latent_values.shape[:3], dtype=torch.bool, device=latent_values.device)
    embeds = scatter_spans(sequences.embeds, sequences.is_latent, latent_values, latent_mask)
    outputs = core(**sequences.inputs(0, embeds, cache), use_cache=use_cache)
    return outputs, {
        "predicted_latents": sequences.predict(outputs.last_hidden_state, latent_head, num_spans),
        "latent_inputs": sequences.gather(embeds, num_spans),
    }


# ------------------------------------------------------------------------------------------ chunks and their gradients


class ChunkGradients:
    """How the forward of a chunk keeps what its backward pass needs.

    Args:
        core (`PreTrainedModel`): the backbone without its language-model head.
        checkpointed (`list[nn.Module]`): its layers that are checkpointed.
    """

    def __init__(self, core: PreTrainedModel, checkpointed: list[nn.Module]):
        self.checkpointed = checkpointed
        partitioned = any(hasattr(parameter, "ds_id") for parameter in core.parameters())
        self.weight_gradients = None if partitioned else GatheredWeightGradients()

    @contextmanager
    def of_chunk(self, num_columns: int) -> Iterator[None]:
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

    def __call__(self, start: int, embeds: torch.Tensor, cache: Cache | None, use_cache: bool = False) -> ModelOutput:
        """Outputs for the columns from `start` on that `embeds` (B, columns, D) holds."""
        inputs = self.sequences.inputs(start, embeds, cache)
        with self.gradients.of_chunk(embeds.shape[1]):
            return self.core(**inputs, use_cache=use_cache)


def _joined(chunks: list[ModelOutput], cache: Cache | None = None) -> ModelOutput:
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
    cache: Cache | None = None,
    feedback: torch.Tensor | None = None,
) -> Filled:
    """The cached walk: each column is computed once, a chunk at a time, and the last hidden state of a chunk is the
    latent that the next one starts with.

    Args:
        core, latent_head, sequences: see `fill_forced`.
        min_chunks (`int`): number of forwards to run at least; the last ones have no effect.
        cache (`Cache`, *optional*): of a generation, which the walk goes on with.
        feedback (`torch.Tensor` of shape `(B, D)`, *optional*): what a latent in the first column is, if the walk goes
            on with a cache.

    Raises:
        ValueError: if a sequence starts with a latent and there is no feedback, or the mask is none of the padding.
    """
    sequences.check(feedback)
    is_latent, embeds = sequences.is_latent, sequences.embeds
    chunk_cache = ChunkCache.of_size(core.config.get_text_config(), is_latent.shape[1]) if cache is None else None
    chunks, inputs = [], []
    with checkpointing_with_cache(core) as checkpointed:
        forward = ChunkForward(core, sequences, ChunkGradients(core, checkpointed))
        for start, stop in chunk_bounds(is_latent):
            chunk = embeds[:, start:stop]
            if feedback is not None:
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
    latents = sequences.gather(torch.cat(inputs, dim=1))
    return _joined(chunks, cache), {"predicted_latents": latents, "latent_inputs": latents}


def idle_forwards(forward: ChunkForward, count: int, latent_head: nn.Module, feedback: torch.Tensor) -> torch.Tensor:
    """The sum of `count` forwards of one column (B, 1, D), for ranks with shorter walks than others."""
    column, position_ids = forward.sequences.embeds[:, :1], forward.sequences.position_ids[..., :1]
    total = 0
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
