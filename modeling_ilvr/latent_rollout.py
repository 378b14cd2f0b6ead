"""Latent spans in a forward pass over whole sequences: where they are, and the cached walk that fills them.

B batch, T sequence, S spans, K latents a span, D hidden.
"""

from contextlib import contextmanager
from itertools import pairwise

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.generation.utils import _slice_mm_encoder_output
from transformers.modeling_layers import GradientCheckpointingLayer


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
    return spans.index_put((rows, slots), values[rows, columns]).view(batch_size, -1, latent_size, hidden_size)


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


class _Past(torch.autograd.Function):
    """Writes a chunk's keys or values behind those of the chunks before it and returns all of them, without a copy.

    `turn` comes from the chunk before and goes to the next one. It has no value: it makes the backward pass visit the
    chunks from the last to the first, so that each finds in `gradients` what all later ones have left for it.
    """

    @staticmethod
    def forward(ctx, chunk, turn, states, start):
        ctx.set_materialize_grads(False)
        ctx.states, ctx.start, ctx.stop = states, start, start + chunk.shape[-2]
        # `.data` has its own version counter: later chunks do not touch the columns that are handed out here.
        written = states.buffer.data[..., : ctx.stop, :]
        written[..., start:, :] = chunk
        return written, chunk.new_zeros(())

    @staticmethod
    def backward(ctx, gradient, _):
        states = ctx.states
        if states.gradients is None or ctx.stop > states.visited:  # another backward pass
            states.gradients = torch.zeros_like(states.buffer)
        states.visited = ctx.start
        if gradient is not None:
            states.gradients[..., : ctx.stop, :] += gradient
        own = states.gradients[..., ctx.start : ctx.stop, :]
        if ctx.start == 0:
            states.gradients = None
        return own, None, None, None


class _States:
    """Keys or values of a layer for all columns of a walk."""

    def __init__(self):
        self.buffer = self.gradients = None
        self.visited = 0

    def extend(self, chunk, turn, start: int, num_columns: int):
        if self.buffer is None:
            self.buffer = chunk.new_empty(*chunk.shape[:-2], num_columns, chunk.shape[-1])
        return _Past.apply(chunk, turn, self, start)


class _ChunkLayer(DynamicLayer):
    """Keys and values of a layer up to the end of a chunk, which a replay of the chunk writes again.

    The turns are kept here and not with the states, to which the graph refers: nothing would free that circle.
    """

    def __init__(self, num_columns: int, start: int = 0, states=None, turns=(None, None)):
        super().__init__()
        self.num_columns, self.start = num_columns, start
        self.states, self.turns = states or (_States(), _States()), turns

    def update(self, key_states, value_states, *args, **kwargs):
        (keys, key_turn), (values, value_turn) = (
            states.extend(chunk, turn, self.start, self.num_columns)
            for states, chunk, turn in zip(self.states, (key_states, value_states), self.turns)
        )
        self.next_turns = key_turn, value_turn
        return keys, values

    def get_seq_length(self) -> int:
        return self.start

    def advance(self, stop: int) -> "_ChunkLayer":
        return _ChunkLayer(self.num_columns, stop, self.states, self.next_turns)


class _ChunkLinearLayer(LinearAttentionLayer):
    """The states of a linear-attention layer before a chunk, which `update_…` does not change."""

    def __init__(self, num_columns: int):
        super().__init__()
        self.record_past = True  # so that the layer does not take its path for one token, which writes in place

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        missing = max(0, conv_kernel_size - conv_states.shape[-1])
        conv_states = torch.nn.functional.pad(conv_states, (missing, 0))
        self.extended_conv = conv_states[..., -conv_kernel_size:]
        return conv_states

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        self.extended_recurrent = recurrent_states
        return recurrent_states

    def advance(self, stop: int) -> "_ChunkLinearLayer":
        following = _ChunkLinearLayer(0)
        following.conv_states[0], following.recurrent_states[0] = self.extended_conv, self.extended_recurrent
        following.has_previous_state[0] = True
        return following


# A sliding window is cut out by the mask, of all keys.
CHUNK_LAYERS = {
    "full_attention": _ChunkLayer,
    "sliding_attention": _ChunkLayer,
    "linear_attention": _ChunkLinearLayer,
}


class ChunkCache(Cache):
    """The past of one chunk of a differentiable walk.

    A `DynamicCache` copies all that came before at each chunk, keeps every copy for the backward pass, and is written
    to again by the forward pass that gradient checkpointing replays. Here all chunks share one buffer a layer, and
    each has its own view of how far it was filled.
    """

    @classmethod
    def of_size(cls, config, num_columns: int) -> "ChunkCache":
        """The past of the first chunk of a walk over `num_columns` columns.

        Args:
            config (`PreTrainedConfig`): of the text decoder.

        Raises:
            ValueError: if the decoder has layers whose state cannot be kept for an exact backward pass.
        """
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        unknown = sorted(set(types) - CHUNK_LAYERS.keys())
        if unknown:
            raise ValueError(
                f"The text decoder ({config.model_type}) has layers of type {unknown}; latent spans are computed "
                f"through {sorted(CHUNK_LAYERS)} only. Use another backbone, or pass latent_values."
            )
        return cls(layers=[CHUNK_LAYERS[layer_type](num_columns) for layer_type in types])

    def advance(self, stop: int) -> "ChunkCache":
        """The past of the chunk that starts at `stop`."""
        return ChunkCache(layers=[layer.advance(stop) for layer in self.layers])


@contextmanager
def checkpointing_with_cache(model):
    """Lets gradient checkpointing keep the cache while the walk runs.

    Layers drop the cache under checkpointing, because a replay would write to it a second time. A `ChunkCache` is
    safe under replay.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing loses the gradient that flows through latent spans. Pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache


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
