"""The attention seat: the one place where it is decided which columns each column of a forward may see.

The backbone makes its own mask (causal, padding, sliding windows, image tokens that see each other); a *rule* takes
pairs away from it. A rule is a function of the facts about all columns that returns a mask function of transformers,
`(batch_idx, head_idx, q_idx, kv_idx) -> bool`, index-based like those of `transformers.masking_utils`.

B batch (times beams), Q columns of a forward, T columns of the sequence, those in the cache included.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function, create_masks_for_generate, sdpa_mask

from .latent_cache import CACHE
from .latent_spans import ColumnFacts, SpanState


MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
AttentionRule = Callable[[ColumnFacts], MaskFunction]


def hide_images_after_first_span(columns: ColumnFacts) -> MaskFunction:
    """A rule: what comes after the first span cannot look at images that stand before it, only at its latents.

    The bottleneck mask of Latent Implicit Visual Reasoning (LIVR, arXiv 2512.21218). Words between the image and the
    span have seen the image and stay visible; so does an image of a later turn, which the first span did not see.

    Args:
        columns (`ColumnFacts`): of all columns.

    Returns:
        `Callable`: a mask function.
    """
    is_hidden, is_after = columns.is_image & (columns.span == 0), columns.span > 0

    def mask_function(
        batch_idx: torch.Tensor, head_idx: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        return ~(is_after[batch_idx, q_idx] & is_hidden[batch_idx, kv_idx])

    return mask_function


class AttentionSeat:
    """Makes what the backbone is given as `attention_mask`: without a rule, the mask of the padding as it is.

    Args:
        vlm (`PreTrainedModel`): the backbone.
        rule (`Callable`, *optional*): see above.
        rows (`torch.BoolTensor` of shape `(B,)`, *optional*, defaults to all): those that the rule holds for.
        columns (`ColumnFacts`, *optional*): of all columns up to the last one of the forwards; needed by a rule.

    Raises:
        ValueError: if the backbone cannot follow a rule, or `rows` has another shape.
    """

    LAYER_TYPES = {"full_attention", "sliding_attention"}
    IMPLEMENTATIONS = ("sdpa", "eager")

    def __init__(
        self,
        vlm: PreTrainedModel,
        rule: AttentionRule | None = None,
        rows: torch.Tensor | None = None,
        columns: ColumnFacts | None = None,
    ) -> None:
        self.vlm, self.rule, self.rows, self.columns = vlm, rule, rows, columns
        if rule is not None:
            self._check()
        elif rows is not None:
            raise ValueError("attention_rule_rows says for which rows a rule holds. Pass attention_rule, too.")

    @classmethod
    def of(
        cls,
        vlm: PreTrainedModel,
        config: PreTrainedConfig,
        input_ids: torch.Tensor | None,
        state: SpanState,
        rule: AttentionRule | None = None,
        rows: torch.Tensor | None = None,
    ) -> "AttentionSeat":
        """The seat of forwards over the columns `input_ids` (B, T) that come after those of `state`.

        Raises:
            ValueError: if there are no ids for a rule to go by, or the columns in the cache are unknown.
        """
        if rule is None:
            return cls(vlm, None, rows)
        if input_ids is None:
            raise ValueError("An attention_rule asks which columns are images and latents. Pass input_ids.")
        columns = ColumnFacts.of(config, input_ids)
        known = 0 if state.columns is None else state.columns.num_columns
        if known < state.length:
            raise ValueError(
                f"The cache holds {int(state.length)} columns and attention_rule knows of {known}. Pass the same rule "
                "from the first forward of a cache on."
            )
        if state.length:
            columns = state.columns.first(state.length).followed_by(columns)
        return cls(vlm, rule, rows, columns)

    def _check(self) -> None:
        config = self.vlm.config.get_text_config()
        unruly = sorted(set(getattr(config, "layer_types", None) or []) - self.LAYER_TYPES)
        if unruly:
            raise ValueError(
                f"The text decoder ({config.model_type}) has layers of type {unruly}. They mix all columns that "
                "came before, and an attention_rule can hide none of those. Use a backbone with attention layers only."
            )
        if config._attn_implementation not in self.IMPLEMENTATIONS:
            raise ValueError(
                f"An attention_rule needs a mask of pairs of columns; {config._attn_implementation!r} takes none. "
                f"Load the model with attn_implementation set to one of {self.IMPLEMENTATIONS}."
            )
        batch_size = len(self.columns.is_latent)
        if self.rows is not None and self.rows.shape != (batch_size,):
            raise ValueError(
                f"attention_rule_rows has shape {tuple(self.rows.shape)}; the batch needs ({batch_size},)."
            )

    def ruled(self, inputs: dict[str, Any], inputs_embeds: torch.Tensor) -> dict[str, Any]:
        """Inputs of the backbone for `inputs_embeds` (B, Q, D), with this mask in place of the padding's."""
        if self.rule is None:
            return inputs
        mask = self.mask(inputs_embeds, inputs.get("attention_mask"), inputs.get(CACHE))
        return {**inputs, "attention_mask": mask}

    def mask(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """The mask of a forward.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(B, Q, D)`): embeddings of the columns of this forward.
            attention_mask (`torch.Tensor` of shape `(B, past + Q)`, *optional*): 0 at padding.
            cache (`Cache`, *optional*): holds the past.

        Returns:
            Without a rule `attention_mask`; else `torch.Tensor` of shape `(B, 1, Q, keys)`, or one for each type of
            layer, as the backbone wants it.
        """
        if self.rule is None:
            return attention_mask
        check_padding_mask(attention_mask)
        past = 0 if cache is None else int(cache.get_seq_length())
        stop = past + inputs_embeds.shape[1]
        create = getattr(self.vlm, "create_masks_for_generate", create_masks_for_generate)
        masks = create(
            config=self.vlm.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=None,
            token_type_ids=self.columns.is_image[:, :stop].long(),  # Gemma 3: an image's tokens see each other
            **{CACHE: cache},
        )
        sizes = {"batch_size": len(inputs_embeds), "q_length": stop - past, "kv_length": stop, "q_offset": past}
        sizes |= {"allow_is_causal_skip": False, "device": inputs_embeds.device}
        allowed = sdpa_mask(**sizes, mask_function=self.rule(self.columns))  # (B, 1, Q, T)
        if self.rows is not None:
            allowed = allowed | ~self.rows.view(-1, 1, 1, 1).to(allowed.device)
        causal = sdpa_mask(**sizes, mask_function=causal_mask_function)
        if isinstance(masks, dict):
            return {layer_type: _both(mask, allowed, causal) for layer_type, mask in masks.items()}
        return _both(masks, allowed, causal)


def check_padding_mask(attention_mask: torch.Tensor | dict | None) -> None:
    """Refuses masks that `generate` has made for a static cache: they cannot be cut into chunks, or ruled."""
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        raise ValueError(
            "Latent spans in a prompt, or an attention_rule, need a 2D attention mask: generate with a dynamic cache."
        )


def _both(mask: torch.Tensor | None, allowed: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """The backbone's mask without the pairs that the rule takes away."""
    if mask is None:  # plainly causal, which the backbone leaves to the kernel
        mask = causal
    allowed = allowed[..., -mask.shape[-1] :]  # the cache of a sliding window holds the last columns only
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
