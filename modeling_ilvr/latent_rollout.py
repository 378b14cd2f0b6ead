"""Latent spans in a forward pass over whole sequences: where they are, and two ways to fill them, one after the other
or all at once.

B batch, T sequence, S spans, K latents a span, D hidden.
"""

from contextlib import contextmanager
from itertools import pairwise

import torch
from transformers.generation.utils import _slice_mm_encoder_output

from .weight_gradients import GatheredWeightGradients


def gather_spans(values, pads, num_spans, latent_size):
    """Collects what stands at the latent positions of each row.

    Args:
        values (`torch.Tensor` of shape `(B, T, D)`): a vector for each column.
        pads (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        num_spans (`int`): S, the largest number of spans in a row.
        latent_size (`int`): K.

    Returns:
        `torch.Tensor` of shape `(B, S, K, D)`: zeros for the spans that a row does not have.
    """
    batch_size, _, hidden_size = values.shape
    rows, columns = pads.nonzero(as_tuple=True)
    slots = (pads.cumsum(1) - 1)[rows, columns]
    spans = values.new_zeros(batch_size, num_spans * latent_size, hidden_size)
    return spans.index_put((rows, slots), values[rows, columns]).view(batch_size, num_spans, latent_size, hidden_size)


def scatter_spans(inputs_embeds, pads, latent_values, latent_mask):
    """Puts given latents in as input embeddings (teacher forcing).

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, T, D)`): embeddings of the input ids.
        pads (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        latent_values (`torch.Tensor` of shape `(B, S, K, D)`): the latents, in the order of the pads of a row.
        latent_mask (`torch.BoolTensor` of shape `(B, S, K)`): which of them are used; the pads of the others keep
            their own embedding.

    Returns:
        `torch.Tensor` of shape `(B, T, D)`: a new tensor.
    """
    slots = (pads.cumsum(1) - 1).clamp(min=0)  # (B, T): number of the pad within its row
    values = latent_values.flatten(1, 2)  # (B, S * K, D)
    values = values.gather(1, slots.unsqueeze(-1).expand(-1, -1, values.shape[-1]))  # (B, T, D)
    forced = pads & latent_mask.flatten(1).gather(1, slots)
    return torch.where(forced.unsqueeze(-1), values.to(inputs_embeds.dtype), inputs_embeds)


def chunk_bounds(pads) -> list[tuple[int, int]]:
    """Columns at which a chunk starts and ends: a new one at each column where some row has a latent."""
    cuts = pads.any(0).nonzero().flatten().tolist()
    return list(pairwise(sorted({0, *cuts, pads.shape[1]})))


def slice_features(mm_encoder_outputs, placeholders, start, stop) -> dict:
    """The image (and video) features whose placeholders stand in the columns from `start` to `stop`.

    Args:
        mm_encoder_outputs (`dict`): per modality, the output of the backbone's `get_image_features`.
        placeholders (`dict`): per modality, where its placeholder tokens stand, `torch.BoolTensor` (B, T).
    """
    sliced = {}
    for modality, output in mm_encoder_outputs.items():
        mask = placeholders[modality]
        rows = (mask.flatten().cumsum(0) - 1).view_as(mask)  # feature row of each placeholder
        inside = mask[:, start:stop]
        if inside.sum() == mask.sum():
            sliced[modality] = output
        elif inside.any():
            sliced[modality] = _slice_mm_encoder_output(output, rows[:, start:stop][inside])
    return sliced


class SlicedForward:
    """Runs the backbone on some columns of sequences whose positions and image features are known.

    Args:
        core (`PreTrainedModel`): the backbone without its language-model head.
        checkpointed (`list[nn.Module]`): its layers that are checkpointed.
        placeholders (`dict`): see `slice_features`.
        attention_mask (`torch.Tensor` of shape `(B, past + T)`), position_ids (`torch.LongTensor` of shape
            `(…, B, T)`), mm_encoder_outputs (`dict`), token_type_ids (`torch.LongTensor` of shape `(B, T)`):
            the backbone's inputs for all columns.
        past (`int`): length of the cache before the first column.
        kwargs: inputs that are the same for all columns.
    """

    def __init__(
        self,
        core,
        checkpointed,
        placeholders,
        *,
        attention_mask,
        position_ids,
        mm_encoder_outputs,
        token_type_ids=None,
        past=0,
        **kwargs,
    ):
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise ValueError("A prompt with latent spans needs a 2D attention mask: generate with a dynamic cache.")
        self.core, self.checkpointed, self.placeholders = core, checkpointed, placeholders
        self.past, self.kwargs = past, kwargs
        partitioned = any(hasattr(parameter, "ds_id") for parameter in core.parameters())
        self.weight_gradients = None if partitioned else GatheredWeightGradients()
        self.attention_mask, self.position_ids = attention_mask, position_ids
        self.mm_encoder_outputs, self.token_type_ids = mm_encoder_outputs, token_type_ids

    def __call__(self, start: int, embeds, cache, *, use_cache=False):
        """Outputs for the columns from `start` on that `embeds` (B, columns, D) holds."""
        stop = start + embeds.shape[1]
        kwargs = dict(self.kwargs)
        if self.token_type_ids is not None:
            kwargs["token_type_ids"] = self.token_type_ids[:, start:stop]
        with self._gathered(embeds.shape[1]):
            return self.core(
                inputs_embeds=embeds,
                attention_mask=self.attention_mask[:, : self.past + stop],
                position_ids=self.position_ids[..., start:stop],
                past_key_values=cache,
                use_cache=use_cache,
                mm_encoder_outputs=slice_features(self.mm_encoder_outputs, self.placeholders, start, stop),
                **kwargs,
            )

    @contextmanager
    def _gathered(self, num_columns: int):
        """Gathers gradients of weights, but for pieces that a checkpoint replays, where nobody would gather them.

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

    def idle(self, count: int, column, latent_head, feedback) -> torch.Tensor:
        """The sum of `count` forwards of one column (B, 1, D), for ranks with shorter walks than others."""
        total = 0
        for _ in range(count):
            # Fed back like the others, so that the backward pass, too, takes the parts of the model in their order.
            idle = column + 0 * feedback.unsqueeze(1).to(column.dtype)
            with self._gathered(1):
                outputs = self.core(inputs_embeds=idle, position_ids=self.position_ids[..., :1], use_cache=False)
            feedback = latent_head(outputs.last_hidden_state[:, -1])
            total = total + outputs.last_hidden_state
        return total


def roll_out(forward: SlicedForward, latent_head, embeds, pads, cache, *, keep_cache=False, min_chunks=0):
    """The cached walk: each column is computed once, a chunk of columns at a time, latents fed back in between.

    Args:
        latent_head (`nn.Module`): from the last hidden state to the next latent.
        embeds (`torch.Tensor` of shape `(B, T, D)`): embeddings of the input ids.
        pads (`torch.BoolTensor` of shape `(B, T)`): where `<|latent_pad|>` stands.
        cache (`Cache`): a `ChunkCache`, or, with `keep_cache`, the cache of a generation.
        min_chunks (`int`): number of forwards to run at least; the last ones have no effect.

    Returns:
        `tuple`: outputs of the backbone for consecutive columns (`list`), and the embeddings that it was given,
        latents among them, `torch.Tensor` of shape `(B, T, D)`.
    """
    feedback = getattr(cache, "latent_feedback", None)
    if feedback is None and pads[:, 0].any():
        raise ValueError("A sequence starts inside a latent span: <|latent_pad|> needs a column before it.")
    outputs, inputs = [], []
    for start, stop in chunk_bounds(pads):
        chunk = embeds[:, start:stop]
        if feedback is not None:
            first = torch.where(pads[:, start, None], feedback.to(chunk.dtype), chunk[:, 0])  # (B, D)
            chunk = torch.cat([first.unsqueeze(1), chunk[:, 1:]], dim=1)
        outputs.append(forward(start, chunk, cache, use_cache=keep_cache))
        inputs.append(chunk)
        feedback = latent_head(outputs[-1].last_hidden_state[:, -1])  # (B, D)
        cache = cache if keep_cache else cache.advance(stop)
    if min_chunks > len(outputs):
        idle = forward.idle(min_chunks - len(outputs), embeds[:, :1], latent_head, feedback)
        outputs[-1].last_hidden_state = outputs[-1].last_hidden_state + 0 * idle
    return outputs, torch.cat(inputs, dim=1)


def roll_out_in_parallel(
    forward: SlicedForward, latent_head, embeds, pads, cache, *, iterations: int, gradient_iterations: int
):
    """Jacobi iteration: in each forward all latents are what the forward before predicts for their places.

    Latents are the fixed point of one forward pass in which each depends on earlier ones only. Iteration n makes the
    n + 1 first latents of a row exact, so S * K - 1 iterations all of them; a contracting model needs far fewer. The
    columns before the first latent are computed once. Parallel Continuous Chain-of-Thought (arXiv 2506.18582).

    Args:
        latent_head, embeds, pads: see `roll_out`.
        cache (`ChunkCache`): a concatenating one.
        iterations (`int`): n. The first one starts from the embeddings of `<|latent_pad|>`.
        gradient_iterations (`int`): through how many of the last iterations the gradient flows back. With 0 the
            latents are constants.

    Returns:
        `tuple`: as `roll_out`.
    """
    columns = pads.any(0).nonzero().flatten().tolist()
    if columns[:1] == [0]:
        raise ValueError("A sequence starts inside a latent span: <|latent_pad|> needs a column before it.")
    # A batch without latents runs as many forwards as any other: ranks of a sharded model wait for each other.
    start, stop = (columns[0], columns[-1]) if columns else (pads.shape[1] - 2, pads.shape[1] - 1)
    pads = pads[:, start:, None]
    prefix = forward(0, embeds[:, :start], cache)
    cache = cache.advance(start)
    before = prefix.last_hidden_state[:, -1:]

    def fill(latents):
        """Embeddings of the columns from `start` on, with `latents` for the first of them."""
        latents = latents[:, : pads.shape[1]]
        rest = embeds[:, start + latents.shape[1] :]
        return torch.where(pads, torch.cat([latents.to(embeds.dtype), rest], dim=1), embeds[:, start:])

    inputs = fill(latent_head(before))
    for iteration in range(iterations):
        flows = torch.is_grad_enabled() and iteration >= iterations - gradient_iterations
        with torch.set_grad_enabled(flows):
            hidden = forward(start, inputs[:, : max(stop - start, 1)], cache).last_hidden_state
            latents = latent_head(torch.cat([before, hidden], dim=1))
        inputs = fill(latents)
    outputs = forward(start, inputs, cache)
    return [prefix, outputs], torch.cat([embeds[:, :start], inputs], dim=1)
