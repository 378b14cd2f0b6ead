"""Four ways to fill latent spans in forward passes over whole sequences: with given latents, by a walk that computes
them one after the other, all at once by Jacobi iteration, or as the fixed point of one forward.

Each returns the backbone's outputs for all columns, and the fields `predicted_latents` and `latent_inputs`, each
(B, S, K, D), of the model's output.

B batch, T sequence, S spans, K latents a span, D hidden.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .latent_cache import CACHE, ChunkCache, checkpointing_with_cache
from .latent_decoding import Intervention
from .latent_sequences import Sequences
from .latent_spans import chunk_bounds, scatter_spans


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

    # The context in which a weight's gradient is made once for all chunks (`weight_gradients.py`), set by the package.
    # It does not travel with checkpoints: without it autograd makes as many gradients as there are chunks.
    gather: ClassVar[type[AbstractContextManager] | None] = None

    def __init__(self, core: PreTrainedModel, checkpointed: list[nn.Module]) -> None:
        self.checkpointed = checkpointed
        partitioned = any(hasattr(parameter, "ds_id") for parameter in core.parameters())
        self.weight_gradients = None if partitioned or self.gather is None else self.gather()

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
    """Runs the backbone `core` on a chunk of `sequences`, with `gradients`, if there are, kept as a chunk's are."""

    core: PreTrainedModel
    sequences: Sequences
    gradients: ChunkGradients | None = None

    def __call__(self, start: int, embeds: torch.Tensor, cache: Cache | None, use_cache: bool = False) -> Any:
        """Outputs for the columns from `start` on that `embeds` (B, columns, D) holds."""
        inputs = {**self.sequences.inputs(start, embeds, cache), "use_cache": use_cache}
        with self.gradients.of_chunk(embeds.shape[1]) if self.gradients else nullcontext():
            return self.core(**inputs)


def _joined(chunks: list[Any], cache: Cache | None = None) -> Any:
    """The backbone's outputs for all columns, from those of consecutive chunks."""
    outputs = chunks[-1]
    outputs.last_hidden_state = torch.cat([chunk.last_hidden_state for chunk in chunks], dim=1)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(torch.cat(layer, dim=1) for layer in zip(*(c.hidden_states for c in chunks)))
    outputs.attentions = None
    setattr(outputs, CACHE, cache)
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


# ------------------------------------------------------------------------------------------------------- all at once


@dataclass
class LatentTail:
    """The columns from the first latent on, which may be computed many times behind a prefix that is computed once.

    Args:
        chunk_forward (`ChunkForward`): runs the backbone.
        latent_head (`nn.Module`): from the last hidden state to the next latent.
        start, stop (`int`): the columns of the first and the last latent of any row.
        prefix (`Any`): the backbone's outputs for the columns before.
        cache (`Cache`): their keys and values.
    """

    chunk_forward: ChunkForward
    latent_head: nn.Module
    start: int
    stop: int
    prefix: Any
    cache: Cache

    @classmethod
    def of(cls, chunk_forward: ChunkForward, latent_head: nn.Module) -> "LatentTail":
        """The tail of the sequences of a forward, whose prefix this computes.

        Raises:
            ValueError: if the sequences go on from a cache, or start with a latent.
        """
        sequences = chunk_forward.sequences
        if sequences.cache is not None:
            raise ValueError(
                "jacobi_iterations and fixed_point_tolerance compute whole sequences. Leave the cache out."
            )
        sequences.check()
        columns, width = sequences.is_latent.any(0).nonzero().flatten().tolist(), sequences.is_latent.shape[1]
        # A batch without latents runs as many forwards as any other, since ranks of a sharded model wait for each
        # other: it iterates over the one column before the last, into which no latent is put.
        start, stop = (columns[0], columns[-1]) if columns else (width - 2, width - 1)
        cache = ChunkCache.concatenating(chunk_forward.core.config.get_text_config())
        prefix = chunk_forward(0, sequences.embeds[:, :start], cache)
        return cls(chunk_forward, latent_head, start, stop, prefix, cache.advance(start))

    @property
    def first(self) -> torch.Tensor:
        """What is predicted for the first column, (B, 1, D)."""
        return self.latent_head(self.prefix.last_hidden_state[:, -1:])

    def fill(self, latents: torch.Tensor) -> torch.Tensor:
        """Embeddings of the columns, with `latents` (B, columns, D) for the first of them where a latent stands."""
        sequences = self.chunk_forward.sequences
        is_latent, embeds = sequences.is_latent[:, self.start :, None], sequences.embeds[:, self.start :]
        latents = latents[:, : is_latent.shape[1]]
        return torch.where(is_latent, torch.cat([latents.to(embeds), embeds[:, latents.shape[1] :]], dim=1), embeds)

    def forward(self, inputs: torch.Tensor) -> Any:
        """The backbone's outputs for `inputs` (B, columns, D)."""
        return self.chunk_forward(self.start, inputs, self.cache)

    def iterate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states of the columns that the latents depend on, (B, columns, D)."""
        return self.forward(inputs[:, : max(self.stop - self.start, 1)]).last_hidden_state

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is predicted for the first columns, from `hidden_states` (B, columns, D): one column more."""
        return self.latent_head(torch.cat([self.prefix.last_hidden_state[:, -1:], hidden_states], dim=1))

    def latents(self, outputs: Any, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields of the model's output, from the joined outputs and the `inputs` (B, columns, D) of the tail."""
        sequences = self.chunk_forward.sequences
        return {
            "predicted_latents": sequences.predict(outputs.last_hidden_state, self.latent_head),
            "latent_inputs": sequences.gather(torch.cat([sequences.embeds[:, : self.start], inputs], dim=1)),
        }


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
    with checkpointing_with_cache(core) as checkpointed:
        tail = LatentTail.of(ChunkForward(core, sequences, ChunkGradients(core, checkpointed)), latent_head)
        inputs = tail.fill(tail.first)
        for iteration in range(iterations):
            flows = torch.is_grad_enabled() and iteration >= iterations - gradient_iterations
            with torch.set_grad_enabled(flows):
                latents = tail.predict(tail.iterate(inputs))
            inputs = tail.fill(latents)  # the words' own embeddings always have a gradient
        outputs = _joined([tail.prefix, tail.forward(inputs)])
    return outputs, tail.latents(outputs, inputs)


# ---------------------------------------------------------------------------------------------------- as a fixed point


class _ImplicitGradient(torch.autograd.Function):
    """Hands hidden states on and, in the backward pass, gives what is predicted from them the gradient that `solve`
    finds for it."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, predicted: torch.Tensor, solve: Callable) -> torch.Tensor:
        ctx.solve = solve
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradient, ctx.solve(gradient), None


def fill_by_fixed_point(
    core: PreTrainedModel, latent_head: nn.Module, sequences: Sequences, tolerance: float
) -> Filled:
    """The walk's latents and gradients, as the fixed point z = f(z) of one forward of all columns.

    Jacobi iteration without a graph finds z; one forward with a graph follows. For the gradient g of a loss with
    respect to z, what the latents are made of gets v = g + J^T v, J = df/dz (implicit differentiation, as in deep
    equilibrium models, arXiv 1909.01377). J is strictly lower triangular, since each latent depends on earlier ones
    only: v = g + J^T g + (J^T)^2 g + … ends, and each term is a product with the graph that is there, without
    gradients of weights. Both series stop when a term changes them by less than `tolerance`.

    Args:
        core, latent_head, sequences: see `fill_forced`.
        tolerance (`float`): largest change, relative to the norm. With 0 both series run to their ends, S * K terms.

    Raises:
        ValueError: if the tolerance is negative, or as `fill_by_walk`.
    """
    if tolerance < 0:
        raise ValueError(f"`fixed_point_tolerance` must not be negative, got {tolerance}.")
    num_latents = int(sequences.is_latent.sum(1).max())
    with checkpointing_with_cache(core):
        tail = LatentTail.of(ChunkForward(core, sequences), latent_head)
        with torch.no_grad():
            inputs = tail.fill(tail.first)
            for _ in range(num_latents):
                before, inputs = inputs, tail.fill(tail.predict(tail.iterate(inputs)))
                latents = inputs * sequences.is_latent[:, tail.start :, None]
                if (inputs - before).norm() <= tolerance * latents.norm():
                    break
        latents = inputs[:, 1 : tail.stop - tail.start + 1].detach().requires_grad_(torch.is_grad_enabled())
        inputs = tail.fill(torch.cat([tail.first, latents], dim=1))
        outputs = tail.forward(inputs)
        if latents.requires_grad and latents.numel():
            hidden = outputs.last_hidden_state
            predicted = latent_head(hidden[:, : latents.shape[1]]).to(latents.dtype)

            def solve(gradient: torch.Tensor) -> torch.Tensor:
                own = term = total = torch.autograd.grad(hidden, latents, gradient, retain_graph=True)[0]
                for _ in range(num_latents - 1):
                    term = torch.autograd.grad(predicted, latents, term, retain_graph=True)[0]
                    total = total + term
                    if term.norm() <= tolerance * own.norm():
                        break
                return total

            outputs.last_hidden_state = _ImplicitGradient.apply(hidden, predicted, solve)
        outputs = _joined([tail.prefix, outputs])
    return outputs, tail.latents(outputs, inputs)
