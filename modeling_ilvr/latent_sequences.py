"""Whole sequences as the backbone takes them, encoded once and cut into chunks of columns.

B batch, T sequence, S spans, K latents a span, D hidden.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .latent_attention import AttentionSeat, check_padding_mask
from .latent_cache import CACHE
from .latent_spans import filled_slots, gather_spans, placeholders_of, slice_features


def encode_inputs(
    vlm: PreTrainedModel, config: PreTrainedConfig, input_ids: torch.Tensor, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Computes positions and image features once, since the backbone is called with slices of a sequence.

    Args:
        vlm (`PreTrainedModel`): the backbone.
        config (`ILVRConfig`): knows the placeholders of images.
        input_ids (`torch.LongTensor` of shape `(B, T)`): the columns after those in the cache.
        inputs (`dict`): the other inputs of a forward.

    Returns:
        `dict`: with `attention_mask` and `position_ids`, and features in place of pixels.
    """
    inputs = dict(inputs)
    past = inputs[CACHE].get_seq_length() if CACHE in inputs else 0
    placeholders = placeholders_of(config, input_ids)
    modalities = placeholders["image"].int() + 2 * placeholders["video"].int()
    if "attention_mask" not in inputs:
        inputs["attention_mask"] = input_ids.new_ones(input_ids.shape[0], past + input_ids.shape[1])
    if "position_ids" not in inputs:
        # Backbones with M-RoPE give images text positions, silently, unless they are told where the images are.
        inputs.setdefault("mm_token_type_ids", modalities)
        position_ids = vlm._prepare_position_ids_for_generation(input_ids, inputs)
        inputs["position_ids"] = position_ids[..., -input_ids.shape[1] :]
    inputs.pop("mm_token_type_ids", None)
    if "token_type_ids" in inspect.signature(vlm.base_model.forward).parameters:
        # Gemma 3: an image's tokens see each other in both directions. It counts columns from the cache's first.
        token_type_ids = inputs.get("token_type_ids", modalities)
        missing = int(past) + input_ids.shape[1] - token_type_ids.shape[1]
        inputs["token_type_ids"] = nn.functional.pad(token_type_ids, (missing, 0))
    return vlm._prepare_multimodal_encoder_kwargs_for_generation(inputs)


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
        cache (`Cache`, *optional*): of a generation, which the columns come after.
        others (`dict`): inputs that are the same for all columns.
    """

    embeds: torch.Tensor
    is_latent: torch.Tensor
    placeholders: dict[str, torch.Tensor]
    latent_size: int
    seat: AttentionSeat
    past: int
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    mm_encoder_outputs: dict[str, Any]
    token_type_ids: torch.Tensor | None = None
    cache: Cache | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        vlm: PreTrainedModel,
        config: PreTrainedConfig,
        input_ids: torch.Tensor,
        seat: AttentionSeat,
        inputs: dict[str, Any],
    ) -> "Sequences":
        """The sequences `input_ids` (B, T) with the other inputs of a forward."""
        inputs = encode_inputs(vlm, config, input_ids, inputs)
        cache = inputs.pop(CACHE, None)
        return cls(
            embeds=vlm.get_input_embeddings()(input_ids),
            is_latent=input_ids == config.latent_pad_token_id,
            placeholders=placeholders_of(config, input_ids),
            latent_size=config.latent_size,
            seat=seat,
            past=0 if cache is None else int(cache.get_seq_length()),
            attention_mask=inputs.pop("attention_mask"),
            position_ids=inputs.pop("position_ids"),
            mm_encoder_outputs=inputs.pop("mm_encoder_outputs"),
            token_type_ids=inputs.pop("token_type_ids", None),
            cache=cache,
            others=inputs,
        )

    def inputs(self, start: int, embeds: torch.Tensor, cache: Cache | None) -> dict[str, Any]:
        """The backbone's inputs for the columns from `start` on that `embeds` (B, columns, D) holds."""
        stop = start + embeds.shape[1]
        whole = stop == self.is_latent.shape[1]
        mask = self.attention_mask if whole else self.attention_mask[:, : self.past + stop]
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": self.seat.mask(embeds, mask, cache),
            "position_ids": self.position_ids[..., start:stop],
            CACHE: cache,
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

    def place_of(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In which span a row's latent in a column is, and where in it, (B,) each; of no meaning in other rows."""
        number = self.is_latent[:, : column + 1].sum(1) - 1
        return number // self.latent_size, number % self.latent_size

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
