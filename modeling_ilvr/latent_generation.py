"""Latent spans inside `generate`: which ids are forced, and which vector the next step is fed.

The decoding loop is that of transformers; only hooks that it calls are overridden. What travels from step to step is
one vector a row, `latent_feedback` (B, D), kept on the cache, so that it is reordered and returned with it. With
`jacobi_iterations` the cache also holds `latent_plan` (B, K, D), the latents of the span that a row is in, and
`columns_ahead` (B, columns, D), the last hidden states of columns that it has computed before their steps.

B batch (times beams), T sequence, K latents a span, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor
from transformers.generation import GenerationMixin


class LatentSpanLogitsProcessor(LogitsProcessor):
    """Once a row has produced `<|latent_start|>`, forces K times `<|latent_pad|>` and then `<|latent_end|>`.

    Each row is in its own phase, read off its last K + 1 ids. A forced id has log-probability 0. Outside a span
    `<|latent_pad|>`, `<|latent_end|>` and the ids in `suppressed` (image and video placeholders) cannot be sampled.
    """

    def __init__(self, start_id: int, pad_id: int, end_id: int, latent_size: int, suppressed: tuple[int, ...] = ()):
        self.start_id, self.pad_id, self.end_id, self.latent_size = start_id, pad_id, end_id, latent_size
        self.never_free = [pad_id, end_id, *suppressed]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        recent = input_ids[:, -self.latent_size :] == self.pad_id
        num_pads = recent.flip(1).long().cumprod(1).sum(1)  # (B,): pads in a row at the end
        in_span = (input_ids[:, -1] == self.start_id) | (num_pads > 0)
        forced_id = torch.where(num_pads < self.latent_size, self.pad_id, self.end_id)  # (B,)

        forced = torch.full_like(scores, -torch.inf).scatter(1, forced_id.unsqueeze(1), 0.0)
        free = scores.clone()
        free[:, self.never_free] = -torch.inf
        return torch.where(in_span.unsqueeze(1), forced, free)


@dataclass
class LatentControl:
    """What a call of `generate` asked to be done with the latents.

    `history` maps the column of a latent to the vectors (B, D) that were put in there.
    """

    intervention: Callable | None = None
    history: dict[int, torch.Tensor] | None = None
    jacobi_iterations: int | None = None


class LatentGenerationMixin:
    """Overrides of `GenerationMixin` hooks; a class lists it before `GenerationMixin`."""

    def generate(
        self,
        *args,
        output_latents: bool = False,
        latent_intervention: Callable | None = None,
        jacobi_iterations: int | None = None,
        **kwargs,
    ):
        """Generates words and latent spans. As [`~transformers.GenerationMixin.generate`], and:

        Args:
            output_latents (`bool`, *optional*, defaults to `False`):
                Whether to return the latents; needs `return_dict_in_generate=True`.
            latent_intervention (`Callable`, *optional*):
                Replaces latents before they are used: called as `latent_intervention(latents, span, index)` with
                `latents` (B, D), `span` (B,) the number of the span in its row and `index` (B,) that of the latent in
                its span, both from 0; returns (B, D). Rows outside a span are ignored.
            jacobi_iterations (`int`, *optional*):
                Computes the latents of a span at once, by this many forwards that each refine all of them and one more
                that keeps them, in place of one forward a latent; K - 1 iterations are exact. Saves time where all
                rows of a batch enter their spans together, as one row does. Needs a cache that can be cropped.

        Returns:
            As `generate`. With `output_latents`, the output has a field `latents`: a list with a tensor of shape
            `(spans, K, D)` for each returned sequence, of the spans generated in full.

        Raises:
            ValueError: for assisted or prompt-lookup decoding, and where latents are asked for without a cache or
                without `return_dict_in_generate=True`, or at once with hidden states or attentions of all layers.
        """
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None:
            raise ValueError(
                "Assisted decoding drafts words and cannot draft latents. Remove assistant_model and "
                "prompt_lookup_num_tokens."
            )
        if output_latents or latent_intervention is not None or jacobi_iterations is not None:
            if kwargs.get("use_cache") is False:
                raise ValueError("output_latents, latent_intervention and jacobi_iterations need use_cache=True.")
            history = {} if output_latents else None
            kwargs["latent_control"] = LatentControl(latent_intervention, history, jacobi_iterations)
        if jacobi_iterations is not None:
            if jacobi_iterations < 1:
                raise ValueError(f"`jacobi_iterations` must be at least 1, got {jacobi_iterations}.")
            if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
                raise ValueError("jacobi_iterations keeps no hidden states or attentions of each step to return.")
        if output_latents and not kwargs.get("return_dict_in_generate"):
            raise ValueError("output_latents=True needs return_dict_in_generate=True, to have a place for them.")
        outputs = super().generate(*args, **kwargs)
        ahead = getattr(getattr(outputs, "past_key_values", None), "columns_ahead", None)
        if ahead is not None and ahead.shape[1]:  # stopped within a span
            outputs.past_key_values.crop(-ahead.shape[1])
            del outputs.past_key_values.columns_ahead
        if output_latents:
            outputs.latents = self._collect_latents(outputs, kwargs["latent_control"].history)
        return outputs

    generate.__signature__ = inspect.signature(GenerationMixin.generate)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, latent_control=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        feedback = getattr(past_key_values, "latent_feedback", None)
        if latent_control is None or feedback is None:
            return inputs
        pads = input_ids == self.config.latent_pad_token_id
        in_span, number = pads[:, -1], pads.sum(1) - 1  # (B,)
        if latent_control.jacobi_iterations is not None:
            starts = in_span & (input_ids[:, -2] == self.config.latent_start_token_id)
            if starts.any():
                self._plan_span(inputs, starts, number, latent_control)
            plan = getattr(past_key_values, "latent_plan", None)
            if plan is not None:
                planned = plan[torch.arange(len(plan), device=plan.device), number % self.config.latent_size]
                feedback = torch.where(in_span.unsqueeze(1), planned, feedback)
        else:
            feedback = self._intervene(latent_control, feedback, in_span, number)
        past_key_values.latent_feedback = feedback
        if latent_control.history is not None:
            latent_control.history[input_ids.shape[1] - 1] = feedback
        return inputs

    def _intervene(self, control: LatentControl, latents, rows, number):
        """`latents` (B, D), the ones of `number` (B,) in their rows, with what the intervention makes of those."""
        if control.intervention is None:
            return latents
        size = self.config.latent_size
        changed = control.intervention(latents, number // size, number % size)
        return torch.where(rows.unsqueeze(1), changed.to(latents), latents)

    def _plan_span(self, inputs, starts, number, control: LatentControl):
        """Computes the latents of the spans that the rows `starts` (B,) enter, by Jacobi iteration over K columns."""
        cache, size, mask = inputs["past_key_values"], self.config.latent_size, inputs.get("attention_mask")
        if cache.is_compileable or not cache.is_croppable:
            raise ValueError(
                f"jacobi_iterations computes columns again, which a {type(cache).__name__} of this model does not "
                "allow. Use a dynamic cache with attention layers alone, or leave jacobi_iterations out."
            )
        cache.activate_past_recording()  # sliding windows are cropped, too
        embeds = self.get_input_embeddings()(inputs["input_ids"].expand(-1, size))  # of `<|latent_pad|>`, in `starts`
        offsets = torch.arange(size, device=embeds.device)

        def forward(latents):
            length = latents.shape[1]
            grown = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), length - 1)], dim=1)
            return self.model.core(
                inputs_embeds=latents.to(embeds.dtype),
                attention_mask=grown,
                position_ids=inputs["position_ids"][..., -1:] + offsets[:length],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state

        def intervene(latents):
            columns = [self._intervene(control, latents[:, i], starts, number + i) for i in range(latents.shape[1])]
            return torch.stack(columns, dim=1)

        first = cache.latent_feedback.unsqueeze(1)
        latents = intervene(torch.cat([first, embeds[:, 1:].to(first.dtype)], dim=1))
        for _ in range(control.jacobi_iterations if size > 1 else 0):
            hidden = forward(latents[:, :-1])
            cache.crop(1 - size)
            latents = intervene(torch.cat([first, self.model.latent_head(hidden)], dim=1))
        plan = getattr(cache, "latent_plan", latents)
        cache.latent_plan = torch.where(starts.view(-1, 1, 1), latents, plan)
        if starts.all():
            cache.columns_ahead = forward(latents)

    def _collect_latents(self, outputs, history) -> list[torch.Tensor]:
        """Sorts the recorded vectors by returned row and span: a list of (spans, K, D)."""
        sequences, size = outputs.sequences, self.config.latent_size
        beam_indices = getattr(outputs, "beam_indices", None)
        hidden_size = self.config.get_text_config().hidden_size
        latents = []
        for row, ids in enumerate(sequences):
            pads = (ids == self.config.latent_pad_token_id).nonzero().flatten().tolist()
            columns = [column for column in pads if column in history]
            found = []
            for column in columns[: len(columns) // size * size]:
                # The step that produced the next column was fed this latent, in the row of the beam that went on.
                next_column = column + 1 - len(ids)
                source = row if beam_indices is None else int(beam_indices[row, next_column])
                found.append(history[column][source])
            empty = torch.zeros(0, size, hidden_size, device=ids.device)
            latents.append(torch.stack(found).view(-1, size, hidden_size) if found else empty)
        return latents

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        config = self.config
        placeholders = tuple(i for i in (config.image_token_id, config.video_token_id) if i is not None)
        processors.append(
            LatentSpanLogitsProcessor(
                config.latent_start_token_id,
                config.latent_pad_token_id,
                config.latent_end_token_id,
                config.latent_size,
                placeholders,
            )
        )
        return processors

    def _reorder_cache(self, past_key_values, beam_idx):
        past_key_values.reorder_cache(beam_idx)
        for name in ("latent_feedback", "latent_plan", "columns_ahead"):
            if getattr(past_key_values, name, None) is not None:
                setattr(past_key_values, name, getattr(past_key_values, name).index_select(0, beam_idx))
        return past_key_values

    def _validate_model_kwargs(self, model_kwargs):
        backbone_inputs = inspect.signature(self.model.vlm.forward).parameters
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in backbone_inputs})

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        return self.model.vlm._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
