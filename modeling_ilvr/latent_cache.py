"""The past of a chunk of a sequence, for forward passes whose gradients flow through all chunks.

Keys and values are (B, heads, columns, head size), B batch.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls the cache, among inputs and in outputs: it was `past_key_values` up to 5.23.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class _Past(torch.autograd.Function):
    """Writes a chunk's keys or values behind those of the chunks before it and returns all of them, without a copy.

    `turn` comes from the chunk before and goes to the next one. It has no value: it makes the backward pass visit the
    chunks from the last to the first, so that each finds in `gradients` what all later ones have left for it.
    """

    @staticmethod
    def forward(
        ctx: Any, chunk: torch.Tensor, turn: torch.Tensor | None, states: "_States", start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.states, ctx.start, ctx.stop = states, start, start + chunk.shape[-2]
        # `.data` has its own version counter: later chunks do not touch the columns that are handed out here.
        written = states.buffer.data[..., : ctx.stop, :]
        written[..., start:, :] = chunk
        return written, chunk.new_zeros(())

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor | None, _: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
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

    def __init__(self) -> None:
        self.buffer = self.gradients = None
        self.visited = 0

    def extend(
        self, chunk: torch.Tensor, turn: torch.Tensor | None, start: int, num_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.buffer is None:
            self.buffer = chunk.new_empty(*chunk.shape[:-2], num_columns, chunk.shape[-1])
        return _Past.apply(chunk, turn, self, start)


class _ChunkLayer(DynamicLayer):
    """Keys and values of a layer up to the end of a chunk, which a replay of the chunk writes again.

    The turns are kept here and not with the states, to which the graph refers: nothing would free that circle.
    """

    def __init__(
        self,
        num_columns: int,
        start: int = 0,
        states: tuple[_States, _States] | None = None,
        turns: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:
        super().__init__()
        self.num_columns, self.start = num_columns, start
        self.states, self.turns = states or (_States(), _States()), turns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
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


class _ConcatLayer(DynamicLayer):
    """Keys and values of a layer before a chunk, which may be computed many times, each time with its own copy."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        self.extended = key_states, value_states
        return self.extended

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def advance(self, stop: int) -> "_ConcatLayer":
        return _ConcatLayer(*self.extended)


class _ChunkLinearLayer(LinearAttentionLayer):
    """The states of a linear-attention layer before a chunk, which `update_…` does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.record_past = True  # so that the layer does not take its path for one token, which writes in place

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        missing = max(0, conv_kernel_size - conv_states.shape[-1])
        conv_states = torch.nn.functional.pad(conv_states, (missing, 0))
        self.extended_conv = conv_states[..., -conv_kernel_size:]
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        self.extended_recurrent = recurrent_states
        return recurrent_states

    def advance(self, stop: int) -> "_ChunkLinearLayer":
        following = _ChunkLinearLayer()
        following.conv_states[0], following.recurrent_states[0] = self.extended_conv, self.extended_recurrent
        following.has_previous_state[0] = True
        return following


# A sliding window is cut out by the mask, of all keys.
LAYER_TYPES = {"full_attention", "sliding_attention", "linear_attention"}


class ChunkCache(Cache):
    """The past of one chunk of a differentiable walk.

    A `DynamicCache` copies all that came before at each chunk, keeps every copy for the backward pass, and is written
    to again by the forward pass that gradient checkpointing replays. Here all chunks share one buffer a layer, and
    each has its own view of how far it was filled.
    """

    @classmethod
    def of_size(cls, config: PreTrainedConfig, num_columns: int) -> "ChunkCache":
        """The past of the first chunk of a walk over `num_columns` columns.

        Args:
            config (`PreTrainedConfig`): of the text decoder.

        Raises:
            ValueError: if the decoder has layers whose state cannot be kept for an exact backward pass.
        """
        return cls._of_layers(config, lambda: _ChunkLayer(num_columns))

    @classmethod
    def concatenating(cls, config: PreTrainedConfig) -> "ChunkCache":
        """The past of the first of two chunks, for a second one that is computed several times.

        Args and errors are those of `of_size`.
        """
        return cls._of_layers(config, _ConcatLayer)

    @classmethod
    def _of_layers(cls, config: PreTrainedConfig, attention_layer: Callable[[], DynamicLayer]) -> "ChunkCache":
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        unknown = sorted(set(types) - LAYER_TYPES)
        if unknown:
            raise ValueError(
                f"The text decoder ({config.model_type}) has layers of type {unknown}; latent spans are computed "
                f"through {sorted(LAYER_TYPES)} only. Use another backbone, or pass latent_values."
            )
        layers = {"linear_attention": _ChunkLinearLayer}
        return cls(layers=[layers.get(layer_type, attention_layer)() for layer_type in types])

    def advance(self, stop: int) -> "ChunkCache":
        """The past of the chunk that starts at `stop`."""
        return ChunkCache(layers=[layer.advance(stop) for layer in self.layers])


@contextmanager
def checkpointing_with_cache(model: nn.Module) -> Generator[list[nn.Module]]:
    """Lets gradient checkpointing keep the cache while the walk runs.

    Layers drop the cache under checkpointing, because a replay would write to it a second time. A `ChunkCache` is
    safe under replay. Yields the layers that are checkpointed.
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
        yield layers
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache
